"""Compute the batch of any step from the seed and the step alone.

There is no position or shuffled list to keep: resuming needs only the step, every process computes
its part of the same global batch, and memory does not grow. Knows nothing of models or files.

Shapes:  R rows of this process    T tokens (the context length)
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

FEISTEL_ROUNDS = 4  # enough that the order has no visible pattern (Luby and Rackoff, 1988)


class Tokens(Protocol):
    """A long sequence of token ids with random access, such as `shards.TokenStream`."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> np.ndarray: ...


class Batches:
    """Windows of T + 1 tokens, without replacement, in a seeded order that changes every epoch.

    The stream is treated as a circle. Each epoch cuts it at a random offset into adjacent windows,
    so that every token is a target once per epoch (except for less than one window), and at every
    position over the epochs.
    """

    def __init__(
        self,
        stream: Tokens,
        context_length: int,
        rows: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(stream) < context_length + 1:
            raise ValueError(
                f"the training text has {len(stream):,} tokens, fewer than one context of "
                f"{context_length} and its target: use more text or a smaller context_length"
            )
        self.stream, self.context_length, self.seed = stream, context_length, seed
        self.rows, self.rank = rows, rank
        self.windows = len(stream) // context_length  # in an epoch
        # Ranks take consecutive blocks of the global batch; the first ones take the remainder.
        self.mine = np.array_split(np.arange(rows), world_size)[rank]

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this process's rows of a step's batch: tokens and targets, (R, T) int64.

        Steps count from 0.
        """
        starts = [self.start(step * self.rows + int(row)) for row in self.mine]
        windows = np.stack([self.window(start) for start in starts])  # (R, T + 1)
        return windows[:, :-1], windows[:, 1:]

    @property
    def row_tokens(self) -> int:
        """The tokens of every row."""
        return self.context_length

    def tokens(self, step: int) -> int:
        """Return the tokens of a step's global batch."""
        return self.rows * self.context_length

    def start(self, index: int) -> int:
        """Return the start in the stream of the run's window number `index`, from 0."""
        epoch, place = divmod(index, self.windows)
        *keys, offset = epoch_words(self.seed, epoch)
        number = permuted(place, self.windows, keys)
        return (offset + number * self.context_length) % len(self.stream)

    def window(self, start: int) -> np.ndarray:
        """Return T + 1 tokens from `start`, wrapping around at the end of the stream."""
        stop = start + self.context_length + 1
        whole = self.stream.read(start, min(stop, len(self.stream)))
        if stop <= len(self.stream):
            return whole
        return np.concatenate([whole, self.stream.read(0, stop - len(self.stream))])


@lru_cache(maxsize=4)
def epoch_words(seed: int, epoch: int) -> tuple[int, ...]:
    """Return an epoch's random 64-bit numbers: a key for each round, and the windows' offset."""
    words = np.random.SeedSequence((seed, epoch)).generate_state(FEISTEL_ROUNDS + 1, np.uint64)
    return tuple(int(word) for word in words)


def permuted(index: int, size: int, keys: Sequence[int]) -> int:
    """Return the image of `index` under a keyed permutation of range(size).

    A Feistel network permutes range(4 ** n) for the smallest such number that is at least `size`.
    Applying it again until the result is below `size` makes it a permutation of range(size) (cycle
    walking).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (mixed(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


def mixed(value: int) -> int:
    """Return a 64-bit hash: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31
