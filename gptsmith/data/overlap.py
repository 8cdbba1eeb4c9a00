"""Find n-grams in a long stream of tokens, such as those of validation text in training text.

The n-grams that are sought are indexed by a hash, the stream is read past them once, a chunk at a
time, and every n-gram with an equal hash is compared token by token. Memory depends on what is
sought, never on the stream. Nothing is found that is not there; of two sought n-grams that have one
hash by chance (in 8 million, with a probability of 2 in a million) the second would be missed.
Knows nothing of text or models.

Shapes:  N tokens    n tokens of an n-gram    G n-grams    D of them that differ    H hits
"""

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .batches import Tokens

CHUNK = 1 << 17  # tokens of the stream at a time: their hashes stay in the processor's cache
PART = 1 << 23  # tokens whose n-grams are indexed at once, in about half a gigabyte
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
        hashes = [
            gram_hashes(tokens[..., start : start + CHUNK + n - 1], n)
            for start in range(0, tokens.shape[-1] - n + 1, CHUNK)
        ]
        self.index = Index(np.concatenate(hashes, axis=-1).reshape(-1))

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
