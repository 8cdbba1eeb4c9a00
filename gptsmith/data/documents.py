"""Read the documents of a source, a chunk at a time.

Knows nothing of tokens or of where sources come from. A document of any length needs only about a
megabyte of memory, and every error names the place.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from ..config.fields import suggestion
from .decoding import checked_encoding, decoded_text
from .rows import Row, opened_parquet, read_rows, row_groups
from .sources import Source


class Chunk(NamedTuple):
    """Some text of a document, or the reason why a row has none."""

    text: str
    read: int  # bytes of the source up to the end of this chunk
    ends: bool  # whether the document ends with this chunk
    problem: str = ""


def read_documents(
    source: Source,
    *,
    field: str = "text",
    encoding: str = "utf-8",
    stop: int | None = None,
    digest: "hashlib._Hash | None" = None,
) -> Iterator[Chunk]:
    """Yield the documents of a source in chunks; empty ones are skipped, bad rows are a chunk.

    For plain text, one chunk ends at byte `stop`, moved forward to the end of a character. `digest`
    is updated with all bytes. ValueError in one line for text that cannot be read.
    """
    name = "utf-8" if source.content is not None else checked_encoding(encoding)
    if source.has_rows:
        for row in read_rows(source, encoding=name, columns=[field], digest=digest):
            problem = row.problem or problem_of(row, field)
            if problem:
                yield Chunk("", row.read, False, f"{row.place} {problem}")
            elif row.fields[field]:
                yield Chunk(row.fields[field], row.read, True)
        return
    read = 0
    for text, read in decoded_text(source, name, stop, digest):
        yield Chunk(text, read, False)
    if read:
        yield Chunk("", source.size, True)


def problem_of(row: Row, field: str) -> str:
    """Return why a row has no text in this field, or ""."""
    if field not in row.fields:
        there = [str(name) for name in row.fields]
        hint = suggestion(field, there) or f" (there are: {', '.join(there[:8])})"
        return f"has no '{field}'{hint}: name the right one with --field"
    value = row.fields[field]
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        return f"has {kind} in '{field}', not text: name another --field"
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain lone surrogates
        return f"has a lone surrogate, U+{ord(value[error.start]):04X}, in '{field}'"
    return ""


def text_bytes(source: Source, *, field: str = "text") -> int:
    """Estimate the bytes of text in a source, which exceed its size if it is compressed."""
    if source.kind != "parquet":
        return source.size
    with opened_parquet(source) as table:
        numbers = row_groups(source, table.metadata)
        groups = [table.metadata.row_group(number) for number in numbers]
    columns = [group.column(place) for group in groups for place in range(group.num_columns)]
    size = sum(each.total_uncompressed_size for each in columns if each.path_in_schema == field)
    return max(source.size, size)
