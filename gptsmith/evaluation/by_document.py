"""Write what was measured of each document to a file: .jsonl, .csv or .parquet."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..data.batches import Tokens
from ..machine.files import renamed_once_written
from ..tokenizers import Tokenizer
from .result import Evaluation

ENDINGS = (".jsonl", ".csv", ".parquet")
COLUMNS = {
    "model": str,
    "document": int,  # its number, from 1
    "start": int,  # its first byte in the text
    "bytes": int,
    "tokens": int,
    "loss": float,  # nats per token
    "bits_per_byte": float,
    "begins": str,  # the document's first characters
}
BEGINNING = 40  # characters

Row = dict[str, Any]


def document_rows(
    name: str, found: Evaluation, stream: Tokens, tokenizer: Tokenizer | None
) -> Iterator[Row]:
    """Yield a row of COLUMNS for each document."""
    documents, nats = found.documents, found.nats
    assert documents is not None
    assert nats is not None
    bits = found.bits_by_document.tolist() if found.bytes else [None] * len(documents)
    for number, first in enumerate(documents.bounds[:-1].tolist()):
        tokens = int(documents.tokens[number])
        ids = stream.read(first, first + min(tokens, BEGINNING))
        values = (
            name,
            number + 1,
            int(documents.offsets[number]),
            int(documents.bytes[number]),
            tokens,
            float(nats[number]) / tokens if tokens else None,
            bits[number],
            None if tokenizer is None else " ".join(tokenizer.decode(ids)[:BEGINNING].split()),
        )
        yield dict(zip(COLUMNS, values, strict=True))


@contextmanager
def rows_written(path: Path) -> Iterator[Callable[[Iterable[Row]], None]]:
    """Yield a function that appends rows to a file, which is there once all are written.

    ImportError for .parquet without pyarrow.
    """
    if path.suffix == ".parquet":
        with parquet_rows_written(path) as write:
            yield write
        return
    with (
        renamed_once_written(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        if path.suffix == ".csv":
            table = csv.DictWriter(file, [*COLUMNS])
            table.writeheader()
            yield table.writerows
        else:
            yield lambda rows: file.writelines(
                json.dumps(row, ensure_ascii=False) + "\n" for row in rows
            )


@contextmanager
def parquet_rows_written(path: Path) -> Iterator[Callable[[Iterable[Row]], None]]:
    """As `rows_written`, for Parquet."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "writing .parquet is an extra: pip install 'gptsmith[parquet]'"
        ) from error
    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, types[kind]) for name, kind in COLUMNS.items()])
    with (
        renamed_once_written(path) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema) as writer,
    ):
        yield lambda rows: writer.write_table(pyarrow.Table.from_pylist([*rows], schema))
