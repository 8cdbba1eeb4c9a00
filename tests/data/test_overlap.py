"""Searching a stream of tokens: against Python's own search in strings of bytes."""

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.data import longest_match, overlap
from gptsmith.data.longest_match import longest_matches
from gptsmith.data.overlap import Grams, gram_hashes, places_of_grams
from gptsmith.data.shards import TokenStream
from gptsmith.data.tokenfile import ShardWriter


class Listed:
    """A stream of tokens that are bytes."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    def __len__(self) -> int:
        return len(self.text)

    def read(self, start: int, stop: int) -> np.ndarray:
        return array(self.text[start:stop])


def array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, np.uint8).astype(np.int64)


def texts(least: int, most: int) -> st.SearchStrategy[bytes]:
    """Of few different bytes, so that much repeats, and of one alone."""
    any_bytes = st.binary(min_size=least, max_size=most)
    return st.builds(lambda text, n: bytes(b % n for b in text), any_bytes, st.integers(1, 5))


# Chunks far shorter than what is sought, so that almost everything lies across their bounds.
CHUNKS = st.sampled_from([1, 8, 64, 1 << 17])


@given(
    texts(1, 300),
    st.lists(texts(1, 40), min_size=1, max_size=5),
    CHUNKS,
    st.sampled_from([1, 5, 256]),
    st.sampled_from([2, 1 << 20]),
)
def test_longest_matches(
    stream: bytes, sought: list[bytes], chunk: int, first: int, pairs: int
) -> None:
    with (
        patch.multiple(overlap, CHUNK=chunk),
        patch.multiple(longest_match, FIRST_CHUNK=first, PAIRS=pairs),
    ):
        found = longest_matches([array(each) for each in sought], Listed(stream))
    for each, match in zip(sought, found, strict=True):
        assert match.length == longest(each, stream)
        if match.length:
            own = each[match.start : match.start + match.length]
            assert stream.find(own) == match.place


def longest(sought: bytes, stream: bytes) -> int:
    """The length of the longest part of a text that occurs in a stream."""
    return max(
        end - start
        for start in range(len(sought) + 1)
        for end in range(start, len(sought) + 1)
        if sought[start:end] in stream
    )


@given(texts(1, 300), texts(9, 60), st.integers(1, 9), CHUNKS, st.sampled_from([3, 17, 1 << 23]))
def test_places_of_grams(stream: bytes, text: bytes, n: int, chunk: int, part: int) -> None:
    with patch.multiple(overlap, CHUNK=chunk, PART=part):
        parts = list(places_of_grams(Listed(text), Listed(stream), n))
        counts = Grams(array(text), n).counts(Listed(stream))
    assert [start for start, _ in parts] == list(range(0, len(text), part))
    found = [place for _, places in parts for place in places]
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    assert found == [stream.find(gram) for gram in grams] + [-1] * (n - 1)
    windows = [stream[i : i + n] for i in range(len(stream) - n + 1)]
    assert counts.tolist() == [windows.count(gram) for gram in grams]


@given(texts(20, 50), st.integers(1, 20), st.sampled_from([2, 3, 32]))
def test_hashes_of_every_such_token(text: bytes, n: int, every: int) -> None:
    hashes = gram_hashes(array(text), n)
    assert gram_hashes(array(text), n, every=every).tolist() == hashes[::every].tolist()
    total = sum((byte + 1) * overlap.BASE ** (n - i) for i, byte in enumerate(text[:n]))
    assert int(hashes[0]) == total % 2**64


def test_an_equal_hash_is_no_match(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a base of 1, the hash is the sum of the tokens: only what is compared is found."""
    monkeypatch.setattr(overlap, "BASE", 1)
    stream, text = Listed(b"\1\2\3\4\5\6"), b"\5\5\2\1\2\3\4\3\2\1"
    grams = Grams(array(text), 3)
    assert grams.first_places(stream).tolist() == [-1, -1, -1, 0, 1, -1, -1, -1]
    assert grams.counts(stream).tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    assert longest_matches([array(text)], stream) == [(4, 3, 0)]


@pytest.mark.parametrize("tokens", [70, 1000, 3000])
def test_matches_across_shards(tmp_path: Path, tokens: int) -> None:
    draw = np.random.default_rng(0)
    text = draw.integers(0, 50_000, 3000)
    with ShardWriter(tmp_path, "train", 50_000, tokens) as writer:
        writer.write(text)
    stream = TokenStream(sorted(tmp_path.glob("*.bin")))
    samples: Sequence[np.ndarray] = [text[930:1070].copy(), draw.integers(0, 50_000, 9)]
    samples[0][100] = 50_001  # which no token equals
    assert longest_matches(samples, stream)[0] == (100, 0, 930)
    assert longest_matches(samples, stream)[1].length <= 2
    ((_, places),) = places_of_grams(stream, stream, 50)
    assert places.tolist() == [*range(2951), *[-1] * 49]
