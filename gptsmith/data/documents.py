"""Read the documents of a source, a chunk at a time.

Knows nothing of tokens or of where sources come from. A document of any length needs only about a
megabyte of memory, and every error names the place.
"""

import codecs
import encodings
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..config.fields import suggestion
from ..machine.files import CHUNK_BYTES
from .sources import Source

PARQUET_ROWS = 256  # at once


class Chunk(NamedTuple):
    """Some text of a document."""

    text: str
    read: int  # bytes of the source up to the end of this chunk
    ends: bool  # whether the document ends with this chunk


def read_documents(
    source: Source,
    *,
    field: str = "text",
    encoding: str = "utf-8",
    stop: int | None = None,
    digest: "hashlib._Hash | None" = None,
) -> Iterator[Chunk]:
    """Yield the documents of a source in chunks; empty ones are skipped.

    For plain text, one chunk ends at byte `stop`, moved forward to the end of a character. `digest`
    is updated with all bytes. ValueError in one line for text that cannot be read.
    """
    if source.kind == "parquet":
        yield from parquet_rows(source, field, digest)
        return
    name = "utf-8" if source.content is not None else checked_encoding(encoding)
    texts = decoded_text(source, name, stop, digest)
    if source.kind == "jsonl":
        yield from jsonl_rows(source, texts, field)
        return
    read = 0
    for text, read in texts:
        yield Chunk(text, read, False)
    if read:
        yield Chunk("", source.size, True)


def checked_encoding(name: str) -> str:
    """Return the usual name of a character encoding; ValueError if Python does not know it."""
    try:
        # Python's own codecs only: a package may register one that accepts any name.
        if not (found := encodings.search_function(name.lower())):
            raise LookupError(name)
        "x".encode(found.name)  # refuses codecs that do not encode text as bytes, such as rot13
        return found.name
    except LookupError as error:
        known = ["utf-8", "utf-16", "latin-1", "cp1252", "shift_jis", "gb18030", "big5", "koi8-r"]
        hint = suggestion(name, known) or ": try utf-8 or latin-1"
        raise ValueError(f"encoding '{name}' is unknown{hint}") from error


def decoded_text(
    source: Source, encoding: str, stop: int | None, digest: "hashlib._Hash | None"
) -> Iterator[tuple[str, int]]:
    """Yield text of a source, a megabyte at a time, with the number of bytes decoded so far."""
    decoder = codecs.getincrementaldecoder(encoding)()
    mark = "\ufeff" if encoding == "utf-8" else ""  # a byte order mark at the start is not text
    position, starts = 0, True  # bytes read; whether there was no character yet
    with source.open() as file:
        while True:
            pending = len(decoder.getstate()[0])  # bytes of an incomplete character
            wanted = CHUNK_BYTES
            if stop is not None and position - pending < stop:
                wanted = min(CHUNK_BYTES, max(1, stop - position))
            data = file.read(wanted)
            if digest is not None:
                digest.update(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = position - pending + error.start
                raise ValueError(
                    f"{source.name}: byte 0x{error.object[error.start]:02x} at position {place} "
                    f"is not {encoding}: name the file's encoding with --encoding, as latin-1"
                ) from error
            except UnicodeError as error:  # some codecs do not report a position
                raise ValueError(
                    f"{source.name} is not {encoding} ({error}): name its --encoding, as utf-8"
                ) from error
            position += len(data)
            if text and starts:
                text, starts = text.removeprefix(mark), False
            if text:
                yield text, position - len(decoder.getstate()[0])
            if not data:
                return


def lines_of(texts: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Yield lines of text that arrives in chunks, without newlines, and the bytes read so far."""
    parts: list[str] = []  # of an incomplete line
    read = 0
    for text, read in texts:
        first, *more = text.split("\n")
        parts.append(first)
        for each in more:
            yield "".join(parts), read
            parts = [each]
    yield "".join(parts), read


def jsonl_rows(source: Source, texts: Iterator[tuple[str, int]], field: str) -> Iterator[Chunk]:
    """Yield the field of every line of a file of JSON objects."""
    for number, (line, read) in enumerate(lines_of(texts), 1):
        if not line.strip():
            continue
        place = f"{source.name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{place} is not JSON ({error}): one object per line is needed"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not a JSON object: one with '{field}' is needed")
        text = checked_text(row.get(field), place, field, list(row))
        if text:
            yield Chunk(text, read, True)


def checked_text(value: Any, place: str, field: str, known: Sequence[str]) -> str:
    """Return the text of a row's field; ValueError if it is missing or not text."""
    if field not in known:
        hint = suggestion(field, known) or f" (there are: {', '.join(map(str, known[:8]))})"
        raise ValueError(f"{place} has no '{field}'{hint}: name the right one with --field")
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(f"{place} has {kind} in '{field}', not text: name another --field")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain lone surrogates
        code = ord(value[error.start])
        raise ValueError(f"{place}: '{field}' has a lone surrogate, U+{code:04X}") from None
    return value


def parquet_rows(source: Source, column: str, digest: "hashlib._Hash | None") -> Iterator[Chunk]:
    """Yield the column of every row of a Parquet file."""
    if digest is not None:
        with source.open() as file:
            hashlib.file_digest(file, lambda: digest)  # type: ignore[arg-type]
    with opened_parquet(source) as table:
        checked_text("", source.name, column, table.schema_arrow.names)
        number, total = 0, table.metadata.num_rows
        for batch in table.iter_batches(PARQUET_ROWS, columns=[column]):
            for value in batch.column(0):
                number += 1
                text = checked_text(value.as_py(), f"{source.name}, row {number}", column, [column])
                if text:
                    yield Chunk(text, source.size * number // total, True)


def text_bytes(source: Source, *, field: str = "text") -> int:
    """Estimate the bytes of text in a source, which exceed its size if it is compressed."""
    if source.kind != "parquet":
        return source.size
    with opened_parquet(source) as table:
        groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
    columns = [group.column(place) for group in groups for place in range(group.num_columns)]
    size = sum(each.total_uncompressed_size for each in columns if each.path_in_schema == field)
    return max(source.size, size)


@contextmanager
def opened_parquet(source: Source) -> Iterator[Any]:
    """Open a Parquet file; ValueError in one line if it is damaged, ImportError without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "reading .parquet is an extra: pip install 'gptsmith[parquet]'"
        ) from error
    try:
        # Buffered reading: row groups can be far larger than a few hundred rows.
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=CHUNK_BYTES) as table:
            yield table
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source.name} cannot be read as Parquet: {error}") from error
