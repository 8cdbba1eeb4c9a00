"""Decoding steps on a GPU: one token per row, captured once as a CUDA graph and then replayed.

A decoding step of GPT-2 is about 150 small kernels, and launching one from Python takes longer than
running it. A graph launches them all at once. Nothing in it may depend on a Python number, so the
rows' lengths are a tensor, and attention covers a fixed span of positions, with a mask that hides
the future ones. Knows nothing of sampling or text.

Shapes:  B batch    V vocabulary
"""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.gpt import GPT

SPAN = 256  # positions; one graph is captured for each multiple of it


class StillCache(KVCache):
    """A view of another cache's first `span` positions, whose rows' lengths are only a tensor."""

    def __init__(self, cache: KVCache, span: int) -> None:
        self.capacity = span
        self.keys, self.values = cache.keys[:, :, :span], cache.values[:, :, :span]
        self.lengths = [span - 1] * len(cache.lengths)  # the largest possible
        self.ends: Tensor = cache.positions(1)  # (B, 1)

    def advance(self, tokens: int) -> None:
        """Do nothing: `GraphDecoder` sets the lengths before each replay."""


@dataclass(frozen=True)
class Captured:
    """A captured step, which reads `tokens` and `ends`, (B, 1), and writes `logits` (B, 1, V)."""

    tokens: Tensor
    ends: Tensor
    logits: Tensor
    replay: Callable[[], object]


class GraphDecoder:
    """A model's decoding step, one token per row. The model's weights must not move in memory."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.steps: WeakKeyDictionary[KVCache, dict[int, Captured]] = WeakKeyDictionary()

    def takes(self, tokens: int) -> bool:
        """Whether it can decode a number of rows; it can decode any."""
        return tokens > 0

    @torch.inference_mode()
    def next_logits(self, unread: Tensor, cache: KVCache) -> Tensor:
        """Return the logits after one token per row, and extend the cache.  (B, 1) -> (B, 1, V)"""
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
    """Capture a step for tokens (B, 1) and a cache; on a CPU, which has no graphs, a plain call."""
    tokens = unread.clone()

    def step() -> Tensor:
        return model.lm_head(model.features(tokens, cache))

    if not tokens.is_cuda:
        logits = step()
        return Captured(tokens, cache.ends, logits, lambda: logits.copy_(step()))
    # Libraries select kernels and allocate workspaces in their first passes, which a graph must not
    # capture. PyTorch wants them on a stream of their own.
    warmup = torch.cuda.Stream()
    warmup.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warmup):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(warmup)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return Captured(tokens, cache.ends, logits, graph.replay)
