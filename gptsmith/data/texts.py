"""Read texts to be labelled, one at a time, and their labels where the data has them.

A file of rows has a text in each row; any other file has a text on each line. Knows nothing of
tokens, or of which labels there are.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..config.settings import PrepareSettings
from .decoding import checked_encoding, decoded_text
from .documents import problem_of
from .rows import BadRows, lines_of, read_rows
from .sources import find_sources


class LabelledText(NamedTuple):
    """A text, and its label if the data says it."""

    text: str
    label: str | None


def read_texts(
    name: str,
    options: PrepareSettings,
    *,
    label_field: str = "label",
    header: list[str] | None = None,
) -> Iterator[LabelledText]:
    """Yield the texts of a file, or of standard input for "-", in order.

    A line may be empty, and is then an empty text. `header` names the columns of a .csv or .tsv
    file that has no header. Rows without text are errors, or skipped and counted in a warning, as
    the options say. ValueError in one line for what cannot be read.
    """
    if Path(name).is_dir():
        raise ValueError(f"{name} is a folder: name a file of texts")
    encoding, bad_rows = checked_encoding(options.encoding), BadRows(options.bad_rows)
    for source in find_sources([name]):
        if not source.has_rows:
            for line, _ in lines_of(decoded_text(source, encoding, None, None)):
                yield LabelledText(line.removesuffix("\n").removesuffix("\r"), None)
            continue
        columns = [options.field, label_field]
        for row in read_rows(source, encoding=encoding, columns=columns, header=header):
            if problem := row.problem or problem_of(row, options.field):
                bad_rows.add(f"{row.place} {problem}")
                continue
            label = row.fields.get(label_field)
            yield LabelledText(row.fields[options.field], None if label is None else str(label))
    bad_rows.warn()
