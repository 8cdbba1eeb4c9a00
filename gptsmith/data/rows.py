"""Read the rows of .jsonl, .json (a list), .csv, .tsv and .parquet files.

Knows nothing of which fields a row should have. Only a .json file is held in memory whole.
"""

import csv
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from ..machine.files import CHUNK_BYTES
from .decoding import decoded_text
from .sources import Source

PARQUET_ROWS = 256  # at once
QUOTES = "a field that begins with a quotation mark ends with one, and those within it are doubled"
CSV_CURES = {  # by what Python's csv says
    "unexpected end of data": QUOTES,
    "expected after": QUOTES,
    "new-line character seen": "a carriage return alone does not end a line: end lines with \\n",
}
LONGEST_FIELD = 1 << 30  # characters of a field of CSV; Python's csv stops at 131,072 by default


class Row(NamedTuple):
    """One row: its fields by name, or the reason why it is none."""

    place: str  # for errors
    fields: dict[str, Any]
    read: int  # bytes of the source up to the end of this row
    problem: str = ""


class BadRows:
    """Counts the rows that were skipped, and refuses the first where they are errors."""

    def __init__(self, treatment: Literal["error", "skip"]) -> None:
        self.treatment = treatment
        self.count, self.first = 0, ""

    def add(self, problem: str) -> None:
        """Count a bad row; ValueError where bad rows are errors."""
        if self.treatment == "error":
            raise ValueError(f"{problem}; correct it, or skip such rows with --bad-rows skip")
        self.count += 1
        self.first = self.first or problem

    def warn(self) -> None:
        """Warn of how many rows were skipped, if any."""
        if self.count:
            warnings.warn(
                f"{self.count:,} bad rows were skipped; the first: {self.first}", stacklevel=3
            )


def read_rows(
    source: Source,
    *,
    encoding: str = "utf-8",
    columns: list[str] | None = None,
    header: list[str] | None = None,
    digest: "hashlib._Hash | None" = None,
) -> Iterator[Row]:
    """Yield the rows of a source; of Parquet only the given columns, if it has them all.

    `header` names the fields of a table without a header. `digest` is updated with all bytes.
    ValueError in one line for a file that cannot be read on; ImportError for Parquet without
    pyarrow.
    """
    if source.kind == "parquet":
        yield from parquet_rows(source, columns, digest)
        return
    texts = decoded_text(source, encoding, None, digest)
    readers: dict[str, Callable[[], Iterator[Row]]] = {
        "jsonl": lambda: jsonl_rows(source, texts),
        "json": lambda: json_rows(source, texts),
        "csv": lambda: csv_rows(source, texts, ",", header),
        "tsv": lambda: csv_rows(source, texts, "\t", header),
    }
    yield from readers[source.kind]()


def lines_of(texts: Iterator[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    """Yield lines, with newlines, of text that arrives in chunks, and the bytes read so far."""
    parts: list[str] = []  # of an incomplete line
    read = 0
    for text, read in texts:
        *whole, last = text.split("\n")
        for line in whole:
            yield "".join([*parts, line, "\n"]), read
            parts.clear()
        parts.append(last)
    if last_line := "".join(parts):
        yield last_line, read


def jsonl_rows(source: Source, texts: Iterator[tuple[str, int]]) -> Iterator[Row]:
    """Yield every line of a file of JSON objects."""
    for number, (line, read) in enumerate(lines_of(texts), 1):
        if not line.strip():
            continue
        place = f"{source.name}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(place, {}, read, f"is not JSON ({error}): one object per line is needed")
            continue
        yield object_row(place, fields, read)


def json_rows(source: Source, texts: Iterator[tuple[str, int]]) -> Iterator[Row]:
    """Yield every object of a file that is one JSON list."""
    text = "".join(text for text, _ in texts)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source.name} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{source.name} is not a JSON list: a list of objects is needed")
    for number, fields in enumerate(rows, 1):
        read = source.size * number // len(rows)
        yield object_row(f"{source.name}, row {number}", fields, read)


def object_row(place: str, fields: Any, read: int) -> Row:
    """Return a row of what JSON gave."""
    if isinstance(fields, dict):
        return Row(place, fields, read)
    return Row(place, {}, read, "is not a JSON object: one with named fields is needed")


def csv_rows(
    source: Source,
    texts: Iterator[tuple[str, int]],
    delimiter: str,
    header: list[str] | None = None,
) -> Iterator[Row]:
    """Yield every row of a file of separated values, whose first row is the header unless given."""
    csv.field_size_limit(LONGEST_FIELD)
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for line, read in lines_of(texts):  # noqa: B007
            yield line

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        names = header or next(reader, [])
        for values in reader:
            place = f"{source.name}, line {reader.line_num}"
            if values == header:
                raise ValueError(f"{place} is a header: leave out --columns")
            if len(values) == len(names):
                yield Row(place, dict(zip(names, values, strict=True)), read)
            elif values:
                yield Row(place, {}, read, f"has {len(values)} fields, but the header {len(names)}")
    except csv.Error as error:
        place = f"{source.name}, line {max(1, reader.line_num)}"
        cure = next((f": {cure}" for said, cure in CSV_CURES.items() if said in str(error)), "")
        raise ValueError(f"{place}: {error}{cure}") from error


def parquet_rows(
    source: Source, columns: list[str] | None, digest: "hashlib._Hash | None"
) -> Iterator[Row]:
    """Yield every row of a Parquet file."""
    if digest is not None:
        with source.open() as file:
            hashlib.file_digest(file, lambda: digest)  # type: ignore[arg-type]
    with opened_parquet(source) as table:
        if columns and not {*columns} <= {*table.schema_arrow.names}:
            columns = None  # who asked for them can name what there is instead
        groups = row_groups(source, table.metadata)
        number, total = 0, sum(table.metadata.row_group(group).num_rows for group in groups)
        for batch in table.iter_batches(PARQUET_ROWS, row_groups=groups, columns=columns):
            for fields in batch.to_pylist():
                number += 1
                read = source.size * number // total
                yield Row(f"{source.name}, row {number}", fields, read)


def row_groups(source: Source, metadata: Any) -> list[int]:
    """Return the numbers of the row groups of a source: all, or those that begin in its part.

    A group is taken to begin at the share of the file's bytes that is the share of its rows.
    """
    if source.part is None or source.path is None:
        return list(range(metadata.num_row_groups))
    size, before, found = source.path.stat().st_size, 0, []
    for number in range(metadata.num_row_groups):
        if source.part[0] <= size * before // metadata.num_rows < source.part[1]:
            found.append(number)
        before += metadata.row_group(number).num_rows
    return found


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
