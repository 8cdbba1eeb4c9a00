"""What the text of a source is: documents, given a chunk at a time.

Knows nothing of tokens or of where sources come from. A document of any length needs only a
megabyte or so of memory, and every error says the place.
"""

import codecs
import encodings
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ..config.fields import suggestion
from ..machine.files import CHUNK_BYTES, chunks
from .sources import Source

PARQUET_ROWS = 256  # at once


class Chunk(NamedTuple):
    """Some text of a document."""

    text: str
    read: int  # bytes of the source up to the end of this text
    ends: bool  # whether the document ends here


def read_documents(
    source: Source,
    *,
    field: str = "text",
    encoding: str = "utf-8",
    stop: int | None = None,
    digest: "hashlib._Hash | None" = None,
) -> Iterator[Chunk]:
    """The documents of a source, in chunks; one without any text is no document.

    A text has a chunk that ends at byte `stop`, moved forward to the end of a character. All bytes
    that are read go to `digest` too. ValueError in one line for text that cannot be read.
    """
    if source.kind == "parquet":
        return parquet_rows(source, field, digest)
    if source.content is not None:
        encoding = "utf-8"
    texts = decoded_text(source, checked_encoding(encoding), stop, digest)
    if source.kind == "jsonl":
        return jsonl_rows(source, texts, field)
    return whole_text(source, texts)


def whole_text(source: Source, texts: Iterator[tuple[str, int]]) -> Iterator[Chunk]:
    """A file that is one document."""
    read = 0
    for text, read in texts:
        yield Chunk(text, read, False)
    if read:
        yield Chunk("", source.size, True)


def checked_encoding(name: str) -> str:
    """The usual name of a character encoding; ValueError where Python has none of that name."""
    try:
        # Python's own codecs only: packages may register one that takes any name for its own.
        if not (found := encodings.search_function(name.lower())):
            raise LookupError(name)
        "x".encode(found.name)  # refuses what does not make bytes of text, such as rot13
        return found.name
    except LookupError as error:
        known = ["utf-8", "utf-16", "latin-1", "cp1252", "shift_jis", "gb18030", "big5", "koi8-r"]
        hint = suggestion(name, known) or ": try utf-8 or latin-1"
        raise ValueError(f"encoding '{name}' is unknown{hint}") from error


def decoded_text(
    source: Source, encoding: str, stop: int | None, digest: "hashlib._Hash | None"
) -> Iterator[tuple[str, int]]:
    """The text of a source, and how many of its bytes have become text, a megabyte at a time."""
    decoder = codecs.getincrementaldecoder(encoding)()
    mark = "\ufeff" if encoding == "utf-8" else ""  # of byte order, at the start: no text
    position, starts = 0, True  # bytes read; whether no character was yet
    with source.open() as file:
        while True:
            pending = len(decoder.getstate()[0])  # bytes of a character that is not whole yet
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
            except UnicodeError as error:  # some codecs know no position
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
    """Text that comes in chunks, line by line, without the newline; and the bytes read so far."""
    parts: list[str] = []  # of a line that is not whole yet
    read = 0
    for text, read in texts:
        first, *more = text.split("\n")
        parts.append(first)
        for each in more:
            yield "".join(parts), read
            parts = [each]
    yield "".join(parts), read


def jsonl_rows(source: Source, texts: Iterator[tuple[str, int]], field: str) -> Iterator[Chunk]:
    """The field of every line of a file of JSON objects."""
    for number, (line, read) in enumerate(lines_of(texts), 1):
        if not line.strip():
            continue
        place = f"{source.name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{place} is not JSON ({error}): one object a line is needed"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{place} is not a JSON object: one with '{field}' is needed")
        text = checked_text(row.get(field), place, field, list(row))
        if text:
            yield Chunk(text, read, True)


def checked_text(value: Any, place: str, field: str, known: Sequence[str]) -> str:
    """The text of a row's field; ValueError where it is missing or no text."""
    if field not in known:
        hint = suggestion(field, known) or f" (there are: {', '.join(map(str, known[:8]))})"
        raise ValueError(f"{place} has no '{field}'{hint}: name the right one with --field")
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise ValueError(
            f"{place} has {kind} in '{field}': text is needed; another --field, perhaps"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a UTF-16 pair
        code = ord(value[error.start])
        raise ValueError(f"{place}: '{field}' has a lone surrogate, U+{code:04X}") from None
    return value


def parquet_rows(source: Source, column: str, digest: "hashlib._Hash | None") -> Iterator[Chunk]:
    """The column of every row of a Parquet file."""
    if digest is not None:
        assert source.path is not None
        for chunk in chunks(source.path):
            digest.update(chunk)
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
    """About how many bytes of text a source holds: more than its size where it is compressed."""
    if source.kind != "parquet":
        return source.size
    with opened_parquet(source) as table:
        groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
    columns = [group.column(place) for group in groups for place in range(group.num_columns)]
    size = sum(each.total_uncompressed_size for each in columns if each.path_in_schema == field)
    return max(source.size, size)


@contextmanager
def opened_parquet(source: Source) -> Iterator[Any]:
    """A Parquet file; ValueError in one line where it is damaged, ImportError without pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "reading .parquet is an extra: pip install 'gptsmith[parquet]'"
        ) from error
    try:
        # A small buffer: row groups can be far larger than what a few hundred rows need.
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=CHUNK_BYTES) as table:
            yield table
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source.name} cannot be read as Parquet: {error}") from error
