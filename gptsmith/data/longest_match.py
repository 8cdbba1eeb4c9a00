"""Find the longest match of short sequences, such as samples of a model, in a stream of tokens.

The stream is read once, in chunks. Knows nothing of text or models.

Shapes:  N tokens    G n-grams    H hits
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .batches import Tokens
from .overlap import NOWHERE, Index, chunks_of, gram_hashes

FIRST_CHUNK = 1 << 8  # while hardly anything was found, almost every token is a hit
PAIRS = 1 << 20  # compared at once


class Match(NamedTuple):
    """The longest stretch of a sequence that occurs in a stream too."""

    length: int  # tokens; 0: not even one occurs
    start: int  # in the sequence
    place: int  # in the stream, the first if there are several


def longest_matches(sequences: Sequence[np.ndarray], stream: Tokens) -> list[Match]:
    """Return the longest match of each sequence (N,) in a stream, which is read once.

    Sought is always what is longer than the longest match so far. With n one more than the shortest
    of those, a match of at least m tokens contains an n-gram that begins at a multiple of
    m - n + 1, so that only those are indexed; each hit is extended on both sides.
    """
    best = [Match(0, 0, NOWHERE) for _ in sequences]
    margin = max(map(len, sequences), default=0)
    # One array of all sequences, with a token around each that no other equals.
    fence = np.array([NOWHERE])
    joined = np.concatenate([fence, *(part for each in sequences for part in (each, fence))])
    starts = np.cumsum([1, *(len(each) + 1 for each in sequences)])[:-1]
    seeds = None
    for start, stop, tokens in chunks_of(stream, margin, margin, first=FIRST_CHUNK):
        seeds = seeds or Seeds.of(sequences, starts, best)
        if seeds is None:
            break  # all occur whole
        origin = start - min(start, margin)  # place of the first of these tokens
        # From before the start on: seeds that changed may lie there in a match that goes on here.
        chunk = tokens[: stop - origin + seeds.n - 1]
        if len(chunk) < seeds.n:
            continue
        found, numbers = seeds.hashes.find(gram_hashes(chunk, seeds.n))
        fenced = np.concatenate([fence - 1, tokens, fence - 1])
        improved = False
        for ours, theirs in seeds.pairs(found + 1, numbers):
            for which, match in extended(joined, ours, fenced, theirs, starts):
                if match.length > best[which].length:
                    place = match.place - 1 + origin
                    best[which] = Match(match.length, match.start, place)
                    improved = True
        seeds = None if improved else seeds
    return best


class Seeds(NamedTuple):
    """The n-grams of which any longer match of some sequences contains one."""

    n: int
    places: np.ndarray  # (G,), in the array of all sequences
    hashes: Index

    @classmethod
    def of(
        cls, sequences: Sequence[np.ndarray], starts: np.ndarray, best: Sequence[Match]
    ) -> "Seeds | None":
        """Return the seeds for matches longer than the best; None if there can be none."""
        open_ones = [i for i, each in enumerate(sequences) if best[i].length < len(each)]
        if not open_ones:
            return None
        n = min(best[i].length for i in open_ones) + 1
        places, hashes = [], []
        for i in open_ones:
            every = best[i].length + 2 - n
            own = gram_hashes(sequences[i], n)[::every]
            hashes.append(own)
            places.append(starts[i] + every * np.arange(len(own)))
        return cls(n, np.concatenate(places), Index(np.concatenate(hashes)))

    def pairs(
        self, found: np.ndarray, numbers: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places in the sequences and in the chunk that have equal hashes: (H,), (H,)."""
        index = self.hashes
        counts = index.starts[numbers + 1] - index.starts[numbers]
        ends = np.cumsum(counts)
        begin = 0
        while begin < len(found):
            done = ends[begin - 1] if begin else 0
            end = max(begin + 1, int(np.searchsorted(ends, done + PAIRS)))
            some = counts[begin:end]
            within = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
            ranks = np.repeat(index.starts[numbers[begin:end]], some) + within
            yield self.places[index.order[ranks]], np.repeat(found[begin:end], some)
            begin = end


def extended(
    ours: np.ndarray, at: np.ndarray, theirs: np.ndarray, there: np.ndarray, starts: np.ndarray
) -> Iterator[tuple[int, Match]]:
    """Yield the longest match of each sequence through places `at` (H,) and `there` (H,).

    Both arrays of tokens end, and sequences are separated, by tokens without an equal.
    """
    left = common(ours, at - 1, theirs, there - 1, -1)
    length = left + common(ours, at, theirs, there, 1)
    which = np.searchsorted(starts, at, side="right") - 1
    # The longest of each sequence, and the first place of several, comes last.
    order = np.lexsort((left - there, length, which))
    last = np.flatnonzero(np.append(np.diff(which[order]) > 0, True))[: len(order)]
    for hit in order[last]:
        begin = int(at[hit] - left[hit] - starts[which[hit]])
        yield int(which[hit]), Match(int(length[hit]), begin, int(there[hit] - left[hit]))


def common(
    ours: np.ndarray, at: np.ndarray, theirs: np.ndarray, there: np.ndarray, step: int
) -> np.ndarray:
    """Return how many tokens are equal from each pair of places on, in steps of 1 or -1: (H,)."""
    lengths = np.zeros(len(at), np.int64)
    alive = np.arange(len(at))
    distance = 0
    while alive.size:
        alive = alive[ours[at[alive] + distance] == theirs[there[alive] + distance]]
        lengths[alive] += 1
        distance += step
    return lengths
