"""From the texts of an item to tokens, and to how likely each choice is.

Texts are encoded as lm-evaluation-harness does it: where a prompt ends among the tokens is part of
what a task measures. Knows nothing of which choice is right.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..tokenizers import Tokenizer
from ..tokenizers.tokenizer import Unknown
from .likelihood import Likelihood, Request, likelihoods
from .task_forms import Item


@dataclass(frozen=True)
class Judged:
    """A model that is evaluated, and how its texts are read."""

    model: Any  # GPT, or for texts with labels a Classifier
    tokenizer: Tokenizer
    unknown: Unknown = "error"
    precision: AbstractContextManager[None] | None = None

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text."""
        return tuple(self.tokenizer.encode(text, unknown=self.unknown))


class ScoredItem(NamedTuple):
    """How likely the choices of an item are."""

    number: int  # of the item
    choices: list[Likelihood]
    tokens: list[int]  # of each choice
    cut: bool  # whether the context could not hold the whole prompt


def scored(judged: Judged, items: Sequence[Item]) -> Iterator[ScoredItem]:
    """Yield the items as their choices are scored, in any order."""
    requests, owners, firsts, cut = list[Request](), list[int](), list[int](), list[bool]()
    for number, item in enumerate(items):
        whole = requests_of(judged, item)
        fitted = [fitting(judged, item, request) for request in whole]
        firsts.append(len(requests))
        cut.append(fitted != whole)
        owners += [number] * len(fitted)
        requests += fitted
    done, counts = dict[int, Likelihood](), [0] * len(items)
    for found in likelihoods(judged.model, requests, judged.precision):
        done |= found
        for place in found:
            number = owners[place]
            counts[number] += 1
            if counts[number] == len(items[number].choices):
                its = range(firsts[number], firsts[number] + counts[number])
                tokens = [len(requests[place].continuation) for place in its]
                yield ScoredItem(number, [done[place] for place in its], tokens, cut[number])


def requests_of(judged: Judged, item: Item) -> list[Request]:
    """Return the tokens of a prompt and of each choice after it.

    White space at the end of the prompt belongs to the choice, since tokens begin with their space.
    The choice's tokens are those of the whole text after as many as the prompt has alone. With no
    prompt, the token that begins a text is the context.
    """
    texts = [item.delimiter + choice for choice in item.choices]
    if item.by_tokens:
        context = judged.encode(item.prompt)
        return [checked(item, Request(context, judged.encode(text))) for text in texts]
    prompt = item.prompt.rstrip()
    texts = [item.prompt[len(prompt) :] + text for text in texts]
    if not prompt:
        return [checked(item, begun(judged, item, judged.encode(text))) for text in texts]
    context = judged.encode(prompt)
    wholes = (judged.encode(prompt + text) for text in texts)
    return [checked(item, Request(context, whole[len(context) :])) for whole in wholes]


def begun(judged: Judged, item: Item, ids: tuple[int, ...]) -> Request:
    """Return a text as a continuation of the token that begins a text."""
    tokenizer = judged.tokenizer
    named = tokenizer.vocab.get(tokenizer.usage.tokenizer.get("bos_token", ""))
    first = tokenizer.document_end if named is None else named
    if first is None:
        raise ValueError(
            f"{item.place} has no prompt, and the model's tokenizer no token that begins a text, "
            "such as <|endoftext|>: use another model, or prompts"
        )
    return Request(ids[:1], ids[1:]) if ids[:1] == (first,) else Request((first,), ids)


def checked(item: Item, request: Request) -> Request:
    """Return a request; ValueError if one of its parts has no token."""
    if not (request.context and request.continuation):
        raise ValueError(
            f"{item.place} has a choice whose tokens cannot be told from those of its prompt: end "
            "the prompt where a token ends, as before a space"
        )
    return request


def fitting(judged: Judged, item: Item, request: Request) -> Request:
    """Return a request without the first tokens of its context if it is too long for the model."""
    limit, count = judged.model.config.context_length, len(request.continuation)
    if count > limit:
        raise ValueError(
            f"{item.place} has a choice of {count} tokens, but the model's context has {limit}: "
            "use a model with a longer one"
        )
    return request._replace(context=request.context[-(limit + 1 - count) :])  # the last is not read
