"""Divide the sources of a text into the pieces of several parts, and sum up what they read.

Knows nothing of tokens, or of what is made of a part (`parts.py`).
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ..machine.files import CHUNK_BYTES
from .sources import Source


class Piece(NamedTuple):
    """What of a source belongs to a part."""

    source: int  # its number among all sources
    text: Source


def divide(sources: Sequence[Source], of: int, encoding: str) -> list[list[Piece]]:
    """Return the pieces of every part, in order; all parts have about the same number of bytes.

    A document belongs to the part in which it begins. Only files whose rows can be found without
    reading all before them are divided: .jsonl in UTF-8, at lines, and .parquet, at row groups.
    """
    total = sum(source.size for source in sources)
    bounds = [total * number // of for number in range(of + 1)]
    parts: list[list[Piece]] = [[] for _ in range(of)]
    start = 0
    for number, source in enumerate(sources):
        stop = start + source.size
        first, last = bisect_right(bounds, start) - 1, bisect_left(bounds, stop) - 1
        utf_8 = source.content is not None or encoding == "utf-8"
        if first == last or not (source.kind == "parquet" or (source.kind == "jsonl" and utf_8)):
            parts[first].append(Piece(number, source))
        else:
            for part in range(first, last + 1):
                begins, ends = max(bounds[part], start), min(bounds[part + 1], stop)
                if begins < ends:
                    text = source.rows_from(begins - start, ends - start)
                    parts[part].append(Piece(number, text))
        start = stop
    return parts


def with_sums_of_later(
    pieces: Sequence[Piece], sums: Sequence[str], later: Sequence[Sequence[Piece]]
) -> list[dict[str, Any]]:
    """Return the pieces for the description of a part, given the SHA-256 of each.

    If a source begins here and goes on in later parts, the SHA-256 of all of it, and those of its
    pieces in the later parts, are added: only reading all of it in order gives the first.
    """
    found: list[dict[str, Any]] = []
    for piece, sha256 in zip(pieces, sums, strict=True):
        entry = {"source": piece.source, "sha256": sha256}
        if piece.text.part and piece.text.at_start:
            others = [each.text for part in later for each in part if each.source == piece.source]
            entry["whole"], (again, *entry["later"]) = sums_of([piece.text, *others])
            if again != sha256:
                raise ValueError(f"{piece.text.name} was changed while it was read: try again")
        found.append(entry)
    return found


def sums_of(texts: Iterable[Source]) -> tuple[str, list[str]]:
    """Return the SHA-256 of several sources one after another, and of each."""
    whole, each = hashlib.sha256(), []
    for text in texts:
        digest = hashlib.sha256()
        with text.open() as file:
            while data := file.read(CHUNK_BYTES):
                digest.update(data)
                whole.update(data)
        each.append(digest.hexdigest())
    return whole.hexdigest(), each
