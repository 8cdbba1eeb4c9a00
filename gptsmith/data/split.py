"""Read all text of the sources, and decide which of it is held out for validation.

Knows nothing of tokens or shards.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config.settings import PrepareSettings
from .documents import Chunk, read_documents
from .repeats import new_digest
from .rows import BadRows
from .sources import Source


class Passage(NamedTuple):
    """Some text of a document, and its split."""

    text: str
    held_out: bool
    ends: bool  # whether the document ends with it
    place: str  # for errors
    offset: int = 0  # characters of the document before it, once `stretches` has counted them
    separator: int = 0  # characters at its end that were added to separate documents


@dataclass
class Counts:
    """What a dataset is made of: first the train, then the validation text."""

    bytes: list[int] = field(default_factory=lambda: [0, 0])
    documents: list[int] = field(default_factory=lambda: [0, 0])
    # Of the documents, one after another; empty where their tails are held out.
    digests: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    dropped_documents: int = 0
    dropped_bytes: int = 0


def split_rule(
    sources: Sequence[Source], options: PrepareSettings, repeated: bytes = b""
) -> tuple[str, str]:
    """Return the rule that chooses the validation text, and a sentence that explains it.

    Whole documents are held out if there are enough of them; else the tail of each document.
    `repeated` says which are dropped, as for `Reader`.
    """
    fraction = options.validation_fraction
    if fraction == 0:
        return "none", "nothing is held out"
    if has_both_splits(sources, options, repeated):
        dropped = " and without repeats" if options.deduplicate else ""
        return "documents", (
            f"document i, counted from 0 in the order of the sources{dropped}, is held out where "
            f"floor((i + 1) * {fraction} + 0.5) > floor(i * {fraction} + 0.5)"
        )
    return "tail", (
        f"the last {fraction:.4g} of the bytes of each document is held out: from byte "
        f"int(size * (1 - {fraction})), moved forward to the start of a character"
    )


def has_both_splits(sources: Sequence[Source], options: PrepareSettings, repeated: bytes) -> bool:
    """Return whether holding out whole documents leaves some to train on, and some held out.

    Only as many documents are read as it takes.
    """
    splits: set[bool] = set()
    number = documents = 0  # of all, and of those that are not dropped
    for source in sources:
        chunks = read_documents(source, field=options.field, encoding=options.encoding)
        if source.has_rows:
            ends: Iterable[bool] = (chunk.ends for chunk in chunks)
        else:
            ends = [next(chunks, None) is not None]  # one document, unless there is no text in it
        for _ in filter(None, ends):
            number += 1
            if repeated and repeated[number - 1]:
                continue
            splits.add(is_held_out(documents, options.validation_fraction))
            documents += 1
            if len(splits) == 2:
                return True
    return False


def has_documents(sources: Sequence[Source]) -> bool:
    """Return whether the text is several documents, not one."""
    return len(sources) > 1 or any(source.has_rows for source in sources)


def is_held_out(number: int, fraction: float) -> bool:
    """Return whether document `number`, from 0, is held out; these are evenly spaced."""
    return math.floor((number + 1) * fraction + 0.5) > math.floor(number * fraction + 0.5)


class Reader:
    """Reads all text of the sources, and keeps account of what was read."""

    def __init__(
        self,
        sources: Sequence[Source],
        options: PrepareSettings,
        separator: str = "",
        repeated: bytes = b"",
        rule: str | None = None,
    ) -> None:
        """Each of several documents ends with `separator`, where no token of its own does that.

        `repeated` has a byte for each document, in order: 1 if it is dropped. Empty: none is.
        `rule` is that of `split_rule`, where the sources are a part of the text.
        """
        self.sources, self.options = sources, options
        self.separator = separator
        self.repeated, self.rule = repeated, rule
        self.read = 0  # bytes of all sources
        self.sums: list[str] = []  # SHA-256 of each source
        self.counts = Counts()
        self.bad_rows = BadRows(options.bad_rows)

    def passages(self) -> Iterator[Passage]:
        """Yield the text of all sources, in order, a megabyte or a row at a time."""
        fraction = self.options.validation_fraction
        rule = self.rule or split_rule(self.sources, self.options, self.repeated)[0]
        counts = self.counts
        number = documents = 0  # of all so far, and of those that are not dropped
        for source in self.sources:
            first, before, sha256 = number, self.read, hashlib.sha256()
            splits: set[bool] = set()  # that have text of this document
            last, digest = "", new_digest()  # text of this document
            for chunk, in_tail in self.chunks(source, rule == "tail", sha256):
                if chunk.problem:
                    self.bad_rows.add(chunk.problem)
                    continue
                self.read = before + chunk.read
                data = chunk.text.encode()
                if self.repeated and self.repeated[number]:
                    counts.dropped_bytes += len(data)
                    counts.dropped_documents += chunk.ends
                    number += chunk.ends
                    continue
                by_number = rule == "documents" and is_held_out(documents, fraction)
                held_out = in_tail if rule == "tail" else by_number
                digest.update(data)
                last, separator = chunk.text or last, ""
                if chunk.ends and not last.endswith(self.separator):
                    separator = self.separator
                counts.bytes[held_out] += len(data) + len(separator)
                counts.documents[held_out] += held_out not in splits
                splits.add(held_out)
                place = source.name
                if source.has_rows:
                    place += f", document {number - first + 1}"
                yield Passage(
                    chunk.text + separator, held_out, chunk.ends, place, separator=len(separator)
                )
                if chunk.ends:
                    if rule != "tail":
                        counts.digests[held_out].extend(digest.digest())
                    number, documents = number + 1, documents + 1
                    splits, last, digest = set(), "", new_digest()
            self.read = before + source.size
            self.sums.append(sha256.hexdigest())

    def chunks(
        self, source: Source, tails: bool, digest: "hashlib._Hash"
    ) -> Iterator[tuple[Chunk, bool]]:
        """Yield the chunks of a source, and with `tails` whether each is in its document's tail."""
        field, encoding = self.options.field, self.options.encoding
        share = 1 - self.options.validation_fraction
        stop = int(source.size * share) if tails and not source.has_rows else None
        read = 0
        for chunk in read_documents(
            source, field=field, encoding=encoding, stop=stop, digest=digest
        ):
            if tails and source.has_rows and chunk.ends:
                data = chunk.text.encode()
                start = int(len(data) * share)
                while data[start : start + 1] and data[start] & 0xC0 == 0x80:
                    start += 1  # to the first byte of a character
                yield chunk._replace(text=data[:start].decode(), ends=False), False
                yield chunk._replace(text=data[start:].decode()), True
            else:
                yield chunk, stop is not None and read >= stop
            read = chunk.read
