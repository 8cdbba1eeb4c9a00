"""From the texts of an item to tokens, and to how likely each choice is.

Texts are encoded as lm-evaluation-harness does it: where a prompt ends among the tokens is part of
what a task measures. Knows nothing of which choice is right.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
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
    of_items, cut = fitted_requests(judged, items)
    requests = [request for each in of_items for request in each]
    owners = [number for number, each in enumerate(of_items) for _ in each]
    firsts = [0, *accumulate(map(len, of_items))]
    done, counts = dict[int, Likelihood](), [0] * len(items)
    for found in likelihoods(judged.model, requests, judged.precision):
        done |= found
        for number in (owners[place] for place in found):
            counts[number] += 1
            if counts[number] == len(of_items[number]):
                choices = [done[place] for place in range(firsts[number], firsts[number + 1])]
                tokens = [len(request.continuation) for request in of_items[number]]
                yield ScoredItem(number, choices, tokens, cut[number])


def fitted_requests(
    judged: Judged, items: Sequence[Item]
) -> tuple[list[list[Request]], list[bool]]:
    """Return the requests of each item, and whether its prompt had to be cut to fit the model.

    ValueError for an item that the model cannot be asked.
    """
    limit = judged.model.config.context_length
    fitted, cut = list[list[Request]](), list[bool]()
    for item in items:
        try:
            whole = requests_of(judged, item)
            fitted.append([fitting(request, limit) for request in whole])
        except ValueError as error:
            raise ValueError(f"{item.place}: {error}") from error
        cut.append(fitted[-1] != whole)
    return fitted, cut


def requests_of(judged: Judged, item: Item) -> list[Request]:
    """Return the tokens of a prompt and of each choice after it.

    White space at the end of the prompt belongs to the choice, since tokens begin with their space.
    The choice's tokens are those of the whole text after as many as the prompt has alone. With no
    prompt, the token that begins a text is the context.
    """
    texts = [item.delimiter + choice for choice in item.choices]
    if item.by_tokens:
        context = judged.encode(item.prompt)
        return [Request(context, judged.encode(text)) for text in texts]
    prompt = item.prompt.rstrip()
    texts = [item.prompt[len(prompt) :] + text for text in texts]
    if not prompt:
        return [begun(judged.tokenizer, judged.encode(text)) for text in texts]
    context = judged.encode(prompt)
    wholes = (judged.encode(prompt + text) for text in texts)
    return [Request(context, whole[len(context) :]) for whole in wholes]


def begun(tokenizer: Tokenizer, ids: tuple[int, ...]) -> Request:
    """Return a text as a continuation of the token that begins a text; ValueError without one."""
    named = tokenizer.vocab.get(tokenizer.usage.tokenizer.get("bos_token", ""))
    first = tokenizer.document_end if named is None else named
    if first is None:
        raise ValueError(
            "there is no prompt, and the model's tokenizer has no token that begins a text, as "
            "<|endoftext|> does: use another model, or add prompts"
        )
    return Request(ids[:1], ids[1:]) if ids[:1] == (first,) else Request((first,), ids)


def fitting(request: Request, limit: int) -> Request:
    """Return a request without the first tokens of its context if more than `limit` are to be read.

    ValueError where there is nothing to read or to score, or no room for the continuation.
    """
    count = len(request.continuation)
    if not (request.context and count):
        raise ValueError(
            "the tokens of a choice cannot be told from those of its prompt: end the prompt where "
            "a token ends, as before a space"
        )
    if count > limit:
        raise ValueError(
            f"a choice has {count} tokens, but the model's context {limit}: use another model"
        )
    return request._replace(context=request.context[-(limit + 1 - count) :])  # the last is not read
