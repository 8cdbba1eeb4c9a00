"""Find short sequences of tokens in a much longer stream, such as samples in the training tokens.

The n-grams of what is sought are indexed by a hash, the stream is read past them once, a chunk at a
time, and every n-gram with an equal hash is compared token by token. Memory depends on what is
sought, never on the stream. Nothing is found that is not there; of two sought n-grams that have one
hash by chance (in 8 million, with a probability of 2 in a million) the second would be missed.
Knows nothing of text or models.

Shapes:  N tokens    n tokens of an n-gram    G n-grams    D of them that differ    H hits
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .batches import Tokens

CHUNK = 1 << 17  # tokens of the stream at a time: their hashes stay in the processor's cache
FIRST_CHUNK = 1 << 8  # while hardly anything was found, almost every token is a hit
PART = 1 << 23  # tokens whose n-grams are indexed at once, in about half a gigabyte
PAIRS = 1 << 20  # compared at once
FILTER_BITS = 6  # 64 bits of the filter or more for each n-gram: at most 1.6% of others pass it
BASE = 0xD6E8FEB86659FD93  # of the polynomial; any large odd number
NOWHERE = -1
MODULUS = 1 << 64
BIT = np.left_shift(1, np.arange(8)).astype(np.uint8)


def gram_hashes(tokens: np.ndarray, n: int, *, every: int = 1) -> np.ndarray:
    """Hash the n-grams that begin at tokens 0, `every`, 2 `every` ...  (..., N) -> (..., G)

    The hash of tokens t_1 ... t_n is the sum of (t_i + 1) BASE^(n + 1 - i), modulo 2^64.
    """
    block = tokens.astype(np.uint64) + np.uint64(1)
    if every > 1:  # few of them: each is summed by itself
        powers = [pow(BASE, n - i, MODULUS) for i in range(n)]
        grams = sliding_window_view(block, n, axis=-1)[..., ::every, :]
        return (grams * np.array(powers, np.uint64)).sum(-1)
    # By doubling: the hashes of 1, 2, 4, ... tokens, of which n is made up.
    block *= np.uint64(BASE)
    size, length = 1, 0  # tokens of a block, and of what is hashed so far
    hashes = np.zeros(1, np.uint64)
    while True:
        if n & size:
            following = block[..., length:]
            power = np.uint64(pow(BASE, size, MODULUS))
            hashes = hashes[..., : following.shape[-1]] * power + following
            length += size
        if 2 * size > n:
            return hashes
        power = np.uint64(pow(BASE, size, MODULUS))
        block = block[..., :-size] * power + block[..., size:]
        size *= 2


def chunks_of(
    stream: Tokens, before: int, after: int, *, first: int = CHUNK
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (start, stop, tokens) of chunks of a stream, with so many tokens of context around.

    `tokens` are those from start - before (0 at the least) up to stop + after. Chunks double from
    `first` to CHUNK tokens.
    """
    start, size = 0, first
    while start < len(stream):
        stop = min(start + size, len(stream))
        tokens = stream.read(max(0, start - before), min(stop + after, len(stream)))
        yield start, stop, tokens
        start, size = stop, min(2 * size, CHUNK)


class Index:
    """Hashes, to be found among others."""

    def __init__(self, hashes: np.ndarray) -> None:
        """Index hashes (G,); equal ones have one number."""
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        new = np.ones(len(hashes), bool)
        new[1:] = ordered[1:] != ordered[:-1]
        self.order = order.astype(np.int32)  # (G,), equal hashes beside one another
        self.keys = ordered[new]  # (D,)
        self.starts = np.append(np.flatnonzero(new), len(hashes)).astype(np.int32)  # (D + 1,)
        bits = max(10, len(self.keys).bit_length() + FILTER_BITS)
        self.shift = np.uint64(64 - bits)
        # The filter has a bit for the first bits of a hash, eight in a byte; the keys are sorted.
        places = (self.keys >> self.shift).view(np.int64)
        cells = places >> 3
        firsts = np.flatnonzero(np.diff(cells, prepend=-1))
        self.filter = np.zeros(1 << (bits - 3), np.uint8)
        self.filter[cells[firsts]] = np.bitwise_or.reduceat(BIT[places & 7], firsts)

    def find(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of some hashes are there, in order, and their numbers: (H,), (H,)."""
        bits = (hashes >> self.shift).view(np.int64)
        places = np.flatnonzero(self.filter[bits >> 3] & BIT[bits & 7])
        # Sorted, one search after another needs the same part of the memory.
        places = places[np.argsort(hashes[places])]
        sought = hashes[places]
        numbers = np.searchsorted(self.keys, sought)
        numbers[numbers == len(self.keys)] = 0
        there = np.flatnonzero(self.keys[numbers] == sought)
        there = there[np.argsort(places[there])]
        return places[there], numbers[there]


class Grams:
    """All n-grams of some tokens, to be found in streams."""

    def __init__(self, tokens: np.ndarray, n: int) -> None:
        """Index the n-grams of a text (N,), or of each row of several, (M, N)."""
        self.n = n
        self.grams = sliding_window_view(tokens, n, axis=-1).reshape(-1, n)  # (G, n)
        self.index = Index(gram_hashes(tokens, n).reshape(-1))

    def hits(self, stream: Tokens, every: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield places in a stream, and the numbers of the n-grams that are there: (H,), (H,).

        Looks at the n-grams that begin at every such token of the stream.
        """
        index, n = self.index, self.n
        for start, _, tokens in chunks_of(stream, 0, n - 1):
            if len(tokens) < n:
                return
            found, numbers = index.find(gram_hashes(tokens, n, every=every))
            found *= every
            sought = self.grams[index.order[index.starts[numbers]]]
            same = (sliding_window_view(tokens, n)[found] == sought).all(-1)
            yield start + found[same], numbers[same]

    def first_places(self, stream: Tokens, *, every: int = 1) -> np.ndarray:
        """Return where each n-gram is first found in a stream, (G,) int64; else NOWHERE."""
        places = np.full(len(self.index.keys), NOWHERE)
        for found, numbers in self.hits(stream, every):
            fresh = places[numbers] == NOWHERE
            # The first of several comes last, and stays.
            places[numbers[fresh][::-1]] = found[fresh][::-1]
        return self.of_grams(places, NOWHERE)

    def counts(self, stream: Tokens) -> np.ndarray:
        """Return how often each n-gram occurs in a stream, (G,) int64."""
        counts = np.zeros(len(self.index.keys), np.int64)
        for _, numbers in self.hits(stream):
            np.add.at(counts, numbers, 1)
        return self.of_grams(counts, 0)

    def of_grams(self, values: np.ndarray, nothing: int) -> np.ndarray:
        """Give each n-gram the value of its hash, (D,) -> (G,).

        A hash has the value of its first n-gram; `nothing` is for others that have it by chance.
        """
        index, repeats = self.index, np.diff(self.index.starts)
        found = np.empty(len(index.order), np.int64)
        found[index.order] = np.repeat(values, repeats)
        first = np.empty(len(index.order), np.int32)
        first[index.order] = np.repeat(index.order[index.starts[:-1]], repeats)
        doubtful = np.flatnonzero((found != nothing) & (first != np.arange(len(first))))
        for start in range(0, len(doubtful), CHUNK):
            some = doubtful[start : start + CHUNK]
            same = (self.grams[some] == self.grams[first[some]]).all(-1)
            found[some[~same]] = nothing
        return found


def places_of_grams(text: Tokens, stream: Tokens, n: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield where the n-grams of a text occur in a stream, a part of the text at a time.

    Each part is its start in the text, and for each of its tokens the first place of the n-gram
    that begins there, (N,) int64, or NOWHERE. The stream is read once for every PART tokens.
    """
    for start in range(0, len(text), PART):
        part = text.read(start, min(start + PART + n - 1, len(text)))
        places = np.full(min(PART, len(text) - start), NOWHERE)
        if len(part) >= n:  # the last n - 1 tokens begin none
            places[: len(part) - n + 1] = Grams(part, n).first_places(stream)
        yield start, places


# -- the longest match


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
