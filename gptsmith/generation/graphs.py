"""One token for each row on a GPU, captured once as a CUDA graph and then replayed.

A step of GPT-2 is a hundred and fifty small kernels, and starting each from Python takes longer
than running it. A graph starts them all at once; for that, nothing in it may depend on a Python
number: the rows' lengths are a tensor, and attention goes over a fixed span of places, of which a
mask hides those to come. Knows nothing of sampling or text.

Shapes:  B batch    V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.gpt import GPT

SPAN = 256  # places: a graph is captured for each multiple of it


class StillCache(KVCache):
    """The first `span` places of another cache, with the rows' lengths in a tensor alone."""

    def __init__(self, cache: KVCache, span: int) -> None:
        self.capacity = span
        self.keys, self.values = cache.keys[:, :, :span], cache.values[:, :, :span]
        self.lengths = [span - 1] * len(cache.lengths)  # the most that a row may have
        self.ends: Tensor = cache.positions(1)  # (B, 1)

    def advance(self, tokens: int) -> None:
        """Nothing: whoever replays the step says how long the rows are."""


@dataclass(frozen=True)
class Captured:
    """A step that reads `tokens` and `ends`, (B, 1) each, and writes `logits` (B, 1, V)."""

    tokens: Tensor
    ends: Tensor
    logits: Tensor
    replay: Callable[[], object]


class GraphDecoder:
    """A model's step by one token for each row. The model's weights must stay where they are."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.steps: WeakKeyDictionary[KVCache, dict[int, Captured]] = WeakKeyDictionary()

    def takes(self, tokens: int) -> bool:
        """Whether it reads one token for each of so many rows: of any number."""
        return tokens > 0

    @torch.inference_mode()
    def next_logits(self, unread: Tensor, cache: KVCache) -> Tensor:
        """Logits after each row's one token, which the cache takes in.  (B, 1) -> (B, 1, V)"""
        cache.check_room(*unread.shape)
        span = min(cache.capacity, (cache.length // SPAN + 1) * SPAN)
        steps = self.steps.setdefault(cache, {})
        if span not in steps:
            steps[span] = capture(self.model, unread, StillCache(cache, span))
        step = steps[span]
        step.tokens.copy_(unread)
        step.ends.copy_(cache.positions(1))
        step.replay()
        cache.advance(1)
        return step.logits.clone()


def capture(model: GPT, unread: Tensor, cache: StillCache) -> Captured:
    """A step for tokens (B, 1) and a cache; on a CPU, which has no graphs, a plain call."""
    tokens = unread.clone()

    def step() -> Tensor:
        return model.lm_head(model.features(tokens, cache))

    if not tokens.is_cuda:
        logits = step()
        return Captured(tokens, cache.ends, logits, lambda: logits.copy_(step()))
    # Libraries choose their kernels and get their memory in a few passes that are not captured.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return Captured(tokens, cache.ends, logits, graph.replay)
