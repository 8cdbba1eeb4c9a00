"""How likely is each continuation after its context, and is it what the model would write?

A context that several continuations share is read once, into a KV cache, which is then copied for
each of them. Logits are computed of the scored tokens only. Knows nothing of text or of tasks.

Shapes:  B rows of tokens    T tokens of the longest    P places whose logits are needed
         C channels          V vocabulary
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..machine.devices import with_float64
from ..model.cache import KVCache
from ..model.gpt import GPT
from .batching import BATCH_TOKENS, batches_by_length

LEAST_SHARED = 8  # tokens; shorter contexts are read again with each continuation
CACHE_BYTES = 1 << 28  # of keys and values: as much for contexts as for a pass of continuations
CPU_TOKENS = 512  # of a forward pass: more are no faster on a CPU, and fewer rows need less padding
LOGITS_AT_ONCE = 1 << 23  # 32 MB in float32


class Request(NamedTuple):
    """Token ids: a context, and the continuation to score; at least one of each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """How likely a continuation is after its context."""

    logprob: float  # summed over its tokens, in nats
    greedy: bool  # whether each of its tokens is the likeliest


Found = dict[int, Likelihood]  # by the number of the request
# (row, column) of a token that was read -> requests and the token that follows in each.
Places = dict[tuple[int, int], list[tuple[int, int]]]


def likelihoods(
    model: GPT,
    requests: Sequence[Request],
    precision: AbstractContextManager[None] | None = None,
) -> Iterator[Found]:
    """Yield the likelihoods of the requests, a batch at a time, in any order.

    All tokens of a request but the last must fit the model's context_length. The model must be in
    evaluation mode.
    """
    by_context = defaultdict[tuple[int, ...], list[int]](list)
    for number, request in enumerate(requests):
        by_context[request.context].append(number)
    shared, apart = list[list[int]](), list[int]()
    for context, numbers in by_context.items():
        if len(context) >= LEAST_SHARED and len(numbers) > 1:
            shared.append(numbers)
        else:
            apart += numbers
    contexts = [len(requests[group[0]].context) for group in shared]
    for batch in batches_by_length(contexts, tokens=cached_tokens(model)):
        with precision or nullcontext():
            found = read_contexts_once(model, requests, [shared[place] for place in batch])
        yield found
    lengths = [sum(map(len, requests[number])) - 1 for number in apart]
    for batch in batches_by_length(lengths, tokens=pass_tokens(model)):
        with precision or nullcontext():
            found = read_whole(model, requests, [apart[place] for place in batch])
        yield found


@torch.inference_mode()
def read_whole(model: GPT, requests: Sequence[Request], numbers: Sequence[int]) -> Found:
    """Return the likelihoods of requests, each of which is read with its own context."""
    rows, places, found = list[tuple[int, ...]](), Places(), Found()
    for row, number in enumerate(numbers):
        context, continuation = requests[number]
        rows.append(context + continuation[:-1])
        for column, target in enumerate(continuation, len(context) - 1):
            places[row, column] = [(number, target)]
    score(model, model.features(padded(rows, model.device)), places, found)
    return found


@torch.inference_mode()
def read_contexts_once(
    model: GPT, requests: Sequence[Request], groups: Sequence[Sequence[int]]
) -> Found:
    """Return the likelihoods of requests, of which each group has one context."""
    found, tails = Found(), list[Tail]()
    contexts = [requests[group[0]].context for group in groups]
    for batch in batches_by_length([*map(len, contexts)], tokens=pass_tokens(model)):
        tokens, places = padded([contexts[place] for place in batch], model.device), Places()
        cache = new_cache(model, *tokens.shape)
        features = model.features(tokens, cache)  # (B, T, C)
        cache.rewind([len(contexts[place]) for place in batch])
        for row, place in enumerate(batch):
            column = len(contexts[place]) - 1  # its last token is followed by several
            places[row, column] = [(n, requests[n].continuation[0]) for n in groups[place]]
            tails += [Tail(cache.row(row), n, requests[n].continuation) for n in groups[place]]
        score(model, features, places, found)
    tails = sorted((t for t in tails if len(t.ids) > 1), key=lambda t: -len(t.ids))
    while tails:
        count = tails_at_once(model, tails)
        read_tails(model, tails[:count], found)
        tails = tails[count:]
    return found


class Tail(NamedTuple):
    """A continuation whose context is read, and whose first token is scored."""

    context: KVCache  # one row
    number: int  # of the request
    ids: tuple[int, ...]


def tails_at_once(model: GPT, tails: Sequence[Tail]) -> int:
    """Return how many of the tails, longest first, can be read at once; at least one."""
    more, longest = len(tails[0].ids) - 1, 0
    for count, tail in enumerate(tails):
        longest = max(longest, tail.context.length)
        fits = (
            longest + more <= model.config.context_length
            and (count + 1) * more <= pass_tokens(model)
            and (count + 1) * (longest + more) <= cached_tokens(model)
        )
        if count and not fits:
            return count
    return len(tails)


def read_tails(model: GPT, tails: Sequence[Tail], found: Found) -> None:
    """Add what follows the first tokens of continuations."""
    tokens = padded([tail.ids[:-1] for tail in tails], model.device)  # (B, T)
    lengths, places = [tail.context.length for tail in tails], Places()
    cache = new_cache(model, len(tails), max(lengths) + tokens.shape[1])
    for row, (context, number, ids) in enumerate(tails):
        cache.keys[:, row, : context.length] = context.keys[:, 0, : context.length]
        cache.values[:, row, : context.length] = context.values[:, 0, : context.length]
        for column, target in enumerate(ids[1:]):
            places[row, column] = [(number, target)]
    cache.hold(lengths)
    score(model, model.features(tokens, cache), places, found)


def new_cache(model: GPT, rows: int, capacity: int) -> KVCache:
    """Return an empty cache in the dtype that the model computes keys and values in."""
    kind = model.device.type
    on = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if on else model.dtype
    return KVCache(model.config, rows, capacity=capacity, dtype=dtype, device=model.device)


def pass_tokens(model: GPT) -> int:
    """Return how many tokens are read in a forward pass, padding included."""
    return CPU_TOKENS if model.device.type == "cpu" else BATCH_TOKENS


def cached_tokens(model: GPT) -> int:
    """Return how many tokens have room in `CACHE_BYTES`."""
    config = model.config
    numbers = 2 * config.n_layer * config.kv_heads * config.head_size
    return max(1, CACHE_BYTES // (4 * numbers))


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows of ids with zeros on their right, which no id to the left attends to.  (B, T)"""
    T = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=device)


def score(model: GPT, features: Tensor, places: Places, found: Found) -> None:
    """Add the log-probabilities of the tokens that follow some places.  (B, T, C)"""
    x = features[tuple(torch.tensor([*places], device=features.device).T)]  # (P, C)
    step = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    following = list(places.values())
    for start in range(0, len(x), step):
        logits = with_float64(model.lm_head(x[start : start + step]).float())  # (P, V)
        wanted = [
            (place, number, target)
            for place, pairs in enumerate(following[start : start + step])
            for number, target in pairs
        ]
        index, numbers, targets = (list(each) for each in zip(*wanted, strict=True))
        own = logits[index, targets].double() - logits.logsumexp(1).double()[index]
        likeliest = logits.argmax(1)[index].tolist()
        for number, logprob, best, target in zip(
            numbers, own.tolist(), likeliest, targets, strict=True
        ):
            before = found.get(number, Likelihood(0.0, True))
            found[number] = Likelihood(before.logprob + logprob, before.greedy and best == target)
