"""Read all text of the sources, and decide which of it is held out for validation.

Knows nothing of tokens or shards.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..config.settings import PrepareSettings
from .documents import read_documents
from .sources import Source


class Passage(NamedTuple):
    """Some text of a document, and its split."""

    text: str
    held_out: bool
    ends: bool  # whether the document ends with it
    place: str  # for errors
    offset: int = 0  # characters of the document before it, once `stretches` has counted them


def split_rule(sources: Sequence[Source], fraction: float) -> tuple[str, str]:
    """Return the rule that chooses the validation text, and a sentence that explains it.

    Whole documents are held out if there are rows or enough files; else the tail of each document.
    """
    if fraction == 0:
        return "none", "nothing is held out"
    held_out = math.floor(len(sources) * fraction + 0.5)
    if any(source.has_rows for source in sources) or 0 < held_out < len(sources):
        return "documents", (
            f"document i, counted from 0 in the order of the sources, is held out where "
            f"floor((i + 1) * {fraction} + 0.5) > floor(i * {fraction} + 0.5)"
        )
    return "tail", (
        f"the last {fraction:.4g} of the bytes of each document is held out: from byte "
        f"int(size * (1 - {fraction})), moved forward to the start of a character"
    )


def is_held_out(number: int, fraction: float) -> bool:
    """Return whether document `number`, from 0, is held out; these are evenly spaced."""
    return math.floor((number + 1) * fraction + 0.5) > math.floor(number * fraction + 0.5)


class Reader:
    """Reads all text of the sources, and keeps account of what was read."""

    def __init__(self, sources: Sequence[Source], options: PrepareSettings) -> None:
        self.sources, self.options = sources, options
        self.read = 0  # bytes of all sources
        self.sums: list[str] = []  # SHA-256 of each source
        self.bytes, self.documents = [0, 0], [0, 0]  # of the train and the validation text
        self.bad_rows, self.first_bad = 0, ""  # rows that were skipped, and the first's problem

    def passages(self) -> Iterator[Passage]:
        """Yield the text of all sources, in order, a megabyte or a row at a time."""
        fraction = self.options.validation_fraction
        field, encoding = self.options.field, self.options.encoding
        rule, _ = split_rule(self.sources, fraction)
        documents = 0  # so far
        for source in self.sources:
            first, before, digest = documents, self.read, hashlib.sha256()
            tail = int(source.size * (1 - fraction)) if rule == "tail" else None
            splits: set[bool] = set()  # that have text of this document
            for chunk in read_documents(
                source, field=field, encoding=encoding, stop=tail, digest=digest
            ):
                if chunk.problem:
                    self.skip(chunk.problem)
                    continue
                held_out = (
                    is_held_out(documents, fraction) if tail is None else self.read - before >= tail
                )
                self.read = before + chunk.read
                self.bytes[held_out] += len(chunk.text.encode())
                if held_out not in splits:
                    splits.add(held_out)
                    self.documents[held_out] += 1
                number = f", document {documents - first + 1}" if source.has_rows else ""
                yield Passage(chunk.text, held_out, chunk.ends, source.name + number)
                if chunk.ends:
                    documents, splits = documents + 1, set()
            self.read = before + source.size
            self.sums.append(digest.hexdigest())

    def skip(self, problem: str) -> None:
        """Count a bad row; ValueError where bad rows are errors."""
        if self.options.bad_rows == "error":
            raise ValueError(f"{problem}; or skip such rows with --bad-rows skip")
        self.bad_rows += 1
        self.first_bad = self.first_bad or problem
