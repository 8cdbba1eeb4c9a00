"""Measure how much of the validation text occurs in the training text, by document.

Such text is known to a model that remembers, which makes its validation loss lower. Knows nothing
of models or text: both are tokens.

Shapes:  N tokens of a part    D documents
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..data.batches import Tokens
from ..data.overlap import NOWHERE, places_of_grams

GRAM, STRETCH = 13, 50  # tokens
MOST_SHOWN = 20  # documents, and stretches
PART = 1 << 22  # tokens that are read at a time


@dataclass(frozen=True)
class DocumentOverlap:
    """A validation document that is partly in the training text."""

    document: int  # from 0
    start: int  # its first token in the validation tokens
    tokens: int
    in_grams: int  # tokens that lie in an n-gram of 13 tokens that the training text has
    in_stretches: int  # the same with 50


@dataclass(frozen=True)
class Stretch:
    """Consecutive validation tokens, any 50 of which are in the training text."""

    start: int  # in the validation tokens
    tokens: int
    place: int  # in the training tokens: where the first 50 of them are


@dataclass(frozen=True)
class Contamination:
    """How much of the validation tokens is in the training tokens."""

    tokens: int  # without those that end documents
    in_grams: int
    in_stretches: int
    documents: int  # 1 if nothing marks them
    touched: int  # documents with some token in a stretch
    whole: int  # documents all of whose tokens are in stretches
    worst: tuple[DocumentOverlap, ...]  # by the share of their tokens in stretches
    stretches: tuple[Stretch, ...]  # the longest

    def to_json(self) -> dict[str, Any]:
        """Return the figures by their names."""
        names = ("tokens", "in_grams", "in_stretches", "documents", "touched", "whole")
        return {
            **{name: getattr(self, name) for name in names},
            "gram": GRAM,
            "stretch": STRETCH,
            "worst": [vars(each) for each in self.worst],
        }


def contamination(train: Tokens, validation: Tokens, end: int | None) -> Contamination:
    """Measure how much of the validation tokens is in the training tokens.

    `end` is the token that ends a document; n-grams that contain it do not count.
    """
    ends = np.concatenate(list(places_of(validation, end)))
    bounds = ends if ends.size and ends[-1] == len(validation) - 1 else [*ends, len(validation)]
    bounds = np.array(bounds, np.int64)  # (D,), one beyond the last token of each document
    firsts = np.append(0, bounds[:-1] + 1)
    covered = {n: np.zeros(len(bounds), np.int64) for n in (GRAM, STRETCH)}
    longest: list[Stretch] = []
    for n, counts in covered.items():
        last = -n  # the latest n-gram that was found
        for start, places in places_of_grams(validation, train, n):
            here = start + np.arange(len(places))
            next_end = np.append(bounds, len(validation))[np.searchsorted(bounds, here)]
            found = (places != NOWHERE) & (here + n <= next_end)
            latest = np.maximum.accumulate(np.where(found, here, last))
            documents = np.searchsorted(bounds, here[here - latest < n])
            counts += np.bincount(documents, minlength=len(bounds))
            last = int(latest[-1])
            if n == STRETCH:
                longest += stretches(start, places, found)
                longest = sorted(longest, key=lambda each: -each.tokens)[:MOST_SHOWN]
    return summary(firsts, bounds - firsts, covered, longest)


def places_of(stream: Tokens, end: int | None) -> Iterator[np.ndarray]:
    """Yield where a stream has the token `end`, a part at a time, in order: (N,) int64."""
    yield np.empty(0, np.int64)
    for start in range(0, 0 if end is None else len(stream), PART):
        tokens = stream.read(start, min(start + PART, len(stream)))
        yield start + np.flatnonzero(tokens == end)


def stretches(start: int, places: np.ndarray, found: np.ndarray) -> Iterator[Stretch]:
    """Yield the longest stretches of a part that begins at `start`.

    `places` (N,) are where its tokens are in the training tokens, `found` (N,) which of these
    count. What goes on in the next part is a stretch of its own there.
    """
    edges = np.flatnonzero(np.diff(found.astype(np.int8), prepend=0, append=0))
    begins, lengths = edges[::2], edges[1::2] - edges[::2]
    for which in np.argsort(-lengths, kind="stable")[:MOST_SHOWN]:
        begin = int(begins[which])
        yield Stretch(start + begin, int(lengths[which]) + STRETCH - 1, int(places[begin]))


def summary(
    firsts: np.ndarray, sizes: np.ndarray, covered: dict[int, np.ndarray], longest: list[Stretch]
) -> Contamination:
    """Add up documents, by their first tokens, sizes and covered tokens: (D,) each."""
    in_grams, in_stretches = covered[GRAM], covered[STRETCH]
    share = np.stack([in_grams, in_stretches]) / np.maximum(sizes, 1)  # (2, D)
    order = np.lexsort((-share[0], -share[1]))[:MOST_SHOWN]
    worst = tuple(
        DocumentOverlap(*map(int, (i, firsts[i], sizes[i], in_grams[i], in_stretches[i])))
        for i in order
        if in_grams[i]
    )
    return Contamination(
        tokens=int(sizes.sum()),
        in_grams=int(in_grams.sum()),
        in_stretches=int(in_stretches.sum()),
        documents=len(sizes),
        touched=int((in_stretches > 0).sum()),
        whole=int(((in_stretches == sizes) & (sizes > 0)).sum()),
        worst=worst,
        stretches=tuple(longest),
    )
