"""Divide tokens into documents, or into blocks of bytes that stand for documents.

Knows nothing of models. Of several tokenizers, each one's tokens are divided at the same bytes of
the text. No PyTorch.

Shapes:  N documents    V vocabulary    L tokens of a part
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config.settings import PrepareSettings, Split
from ..data.batches import Tokens
from ..data.same_text import Vocabulary, differ, opened_for_each
from ..machine.terminal import count
from ..tokenizers import Tokenizer

FEWEST = 30  # documents; where there are fewer, blocks stand for them
LARGEST_BLOCK, SMALLEST_BLOCK = 4096, 256  # bytes
ENOUGH_BLOCKS = 50  # for larger blocks, whose losses depend less on one another
PART = 1 << 20  # tokens that are read at once


@dataclass(frozen=True)
class Documents:
    """Where documents begin and end in a stream of tokens; document i is bounds[i:i + 2]."""

    bounds: np.ndarray  # positions of tokens, (N + 1,)
    offsets: np.ndarray  # the same places in the bytes of the text, (N + 1,)
    block_bytes: int | None = None  # of the blocks that stand for documents; None if none do
    marked: int | None = None  # documents that the data marks; None if it marks none

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def bytes(self) -> np.ndarray:
        """The bytes of each document, (N,)."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> np.ndarray:
        """The tokens of each document, (N,)."""
        return np.diff(self.bounds)

    def __str__(self) -> str:
        if self.block_bytes is None:
            return f"{len(self):,}"
        why = "not marked" if self.marked is None else f"{self.marked:,}, too few"
        blocks = f"{count(len(self), 'block')} of {self.block_bytes:,} bytes"
        return f"{why}; {blocks} stand for them"


class TokenText:
    """The first tokens of a stream, and the bytes of text that they stand for."""

    def __init__(
        self,
        stream: Tokens,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        first_tokens: int | None = None,
    ) -> None:
        """ValueError for fewer than two tokens: the first has no context, and is not predicted."""
        self.stream, self.tokenizer = stream, tokenizer
        self.length = len(stream) if first_tokens is None else min(first_tokens, len(stream))
        if self.length < 2:
            raise ValueError(
                f"a text of {self.length} tokens cannot be evaluated: at least 2 are needed"
            )
        self.sizes = np.zeros(vocab_size, np.int64)  # bytes of each id, (V,)
        if tokenizer is not None:
            self.sizes[: tokenizer.vocab_size] = tokenizer.byte_lengths()[:vocab_size]

    def parts(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yield the position of a part's first token, its ids, and the byte after each, (L,)."""
        before = 0
        for first in range(0, self.length, PART):
            ids = self.stream.read(first, min(first + PART, self.length))
            ends = before + np.cumsum(self.sizes[ids])
            before = int(ends[-1])
            yield first, ids, ends

    def marks(self) -> tuple[np.ndarray, int]:
        """Return the byte after each document that ends with a token for it, and all bytes."""
        end = None if self.tokenizer is None else self.tokenizer.document_end
        found, total = [np.empty(0, np.int64)], 0
        for _, ids, ends in self.parts():
            found.append(ends[ids == end])
            total = int(ends[-1])
        return np.concatenate(found), total

    def positions(self, edges: np.ndarray) -> np.ndarray:
        """Return the position of the first token that ends behind each byte: (M,) -> (M,).

        So a token across an edge belongs to what follows, and the token that ends a document to
        that document.
        """
        found = np.full(len(edges), self.length)
        before = 0
        for first, _, ends in self.parts():
            low, high = np.searchsorted(edges, [before, ends[-1]])
            found[low:high] = first + np.searchsorted(ends, edges[low:high], side="right")
            before = ends[-1]
        return found


@contextmanager
def opened_documents(
    data: str | Path,
    vocabularies: Sequence[Vocabulary],
    *,
    split: Split | None = None,
    first_tokens: int | None = None,
    options: PrepareSettings | None = None,
) -> Iterator[list[tuple[Tokens, Documents]]]:
    """Yield the tokens of DATA for each of several models, and the documents in them.

    ValueError as in `same_text.opened_for_each` and `documents_of`.
    """
    with opened_for_each(
        data, vocabularies, split=split, first_tokens=first_tokens, options=options
    ) as streams:
        if differ(vocabularies):  # the text was cut already
            first_tokens = None
        known = next((tokenizer for tokenizer, _ in vocabularies if tokenizer), None)
        texts = {
            # A model without a tokenizer reads the same tokens as the others.
            id(stream): TokenText(stream, tokenizer or known, vocab_size, first_tokens)
            for stream, (tokenizer, vocab_size) in zip(streams, vocabularies, strict=True)
        }
        found = dict(zip(texts, documents_of([*texts.values()]), strict=True))
        yield [(stream, found[id(stream)]) for stream in streams]


def documents_of(texts: Sequence[TokenText]) -> list[Documents]:
    """Divide the same text, as several tokenizers encode it, at the same bytes.

    They begin where a token of each begins, behind the first token of each. ValueError if the texts
    are not the same bytes, or without a tokenizer, which alone knows them.
    """
    if texts[0].tokenizer is None:
        return [Documents(np.array([1, text.length]), np.zeros(2, np.int64)) for text in texts]
    marked = all(text.tokenizer and text.tokenizer.document_end is not None for text in texts)
    (marks, total), *others = [text.marks() for text in texts]
    for more, size in others:
        if size != total or (marked and len(more) != len(marks)):
            raise ValueError(
                f"the models' tokenizers read {total:,} and {size:,} bytes of the data: only the "
                "same text can be compared"
            )
    starts, start = common_start(texts)
    inside = marks[(marks > start) & (marks < total) & marked]
    edges, block = np.unique([start, *inside, total]), None
    number = len(edges) - 1 if marked else None
    if (number or 0) < FEWEST and total > start:
        block = block_size(total - start)
        edges = np.array([*range(start, total, block), total])
    divided = []
    for text, first in zip(texts, starts, strict=True):
        bounds = np.array([first, *text.positions(edges[1:-1]), text.length])
        offsets = np.array([start, *edges[1:-1], total])
        divided.append(Documents(bounds, offsets, block, number))
    return divided


def common_start(texts: Sequence[TokenText]) -> tuple[list[int], int]:
    """Return where to begin: the position in each text, and the byte, which is the same in all."""
    heads = [next(text.parts())[2] for text in texts]
    common = heads[0]
    for ends in heads[1:]:
        common = np.intersect1d(common, ends)
    if not len(common):
        raise ValueError("the models' tokenizers never end a token at the same byte of the data")
    start = int(common[0])
    return [int(np.searchsorted(ends, start)) + 1 for ends in heads], start


def block_size(total: int) -> int:
    """Return the bytes of a block that stands for a document, of a text of so many bytes."""
    size = LARGEST_BLOCK
    while size > SMALLEST_BLOCK and total < ENOUGH_BLOCKS * size:
        size //= 2
    return size
