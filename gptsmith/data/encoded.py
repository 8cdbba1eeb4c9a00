"""Turn examples into a folder of rows of tokens and targets, whole or not at all, and read it.

Knows nothing of the forms of examples (`examples.py`), of what is learned (`targets.py`), of how
they are divided (`example_writer.py`), or of batches.

Shapes:  N examples    T tokens of a row
"""

import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..config.finetune import ExampleKind, FinetuneSettings
from ..config.settings import PrepareSettings
from ..machine.files import DamagedError, read_json, sha256, write_json, written_whole
from ..tokenizers import Tokenizer, load_tokenizer
from .example_writer import ENDS, SPLIT, TARGETS, TOKENS, RowWriter, finished
from .examples import SPLITS, ExampleReader, none_in
from .prepare import Progress, timed
from .targets import Encoder

INFO, FORMAT, VERSION = "examples.json", "gptsmith-examples", 1
REPORTED = 256  # examples between two reports of progress
# Settings by which a folder is made; the others are for learning from it.
SETTINGS = {
    *("field", "bad_rows", "encoding", "unknown", "validation_fraction"),
    *("task", "template", "columns", "test_fraction"),
}


def prepare_examples(
    sources: Sequence[str],
    tokenizer: Tokenizer,
    out: Path,
    options: PrepareSettings,
    finetune: FinetuneSettings,
    *,
    context_length: int,
    seed: int,
) -> Iterator[Progress]:
    """Turn sources into a folder of examples for `Examples.open`, and yield the progress.

    A row has at most `context_length` tokens; `seed` decides which examples are held out. If `out`
    was made with the same arguments, it is left unchanged; any other is refused. Memory grows by
    about 50 bytes per example. ValueError or OSError in one line, with nothing left behind.
    """
    settings = {k: v for k, v in (asdict(options) | asdict(finetune)).items() if k in SETTINGS}
    settings |= {"context_length": context_length, "seed": seed}
    reader = ExampleReader(sources, options, finetune)
    yield from timed(preparing(reader, tokenizer, Path(out), settings))


def preparing(
    reader: ExampleReader, tokenizer: Tokenizer, out: Path, settings: Mapping[str, Any]
) -> Generator[tuple[int, int, int], None, None]:
    """Do the work of `prepare_examples`; yield bytes read, all bytes and tokens now and then."""
    if is_examples(out):
        sums = [source.sha256() for source, _ in reader.files]
        asked, there = described(reader, sums, tokenizer, settings), Examples.open(out)
        if differing := [key for key, value in asked.items() if there.info.get(key) != value]:
            raise ValueError(
                f"{out} was made with other {' and '.join(differing)}: choose another --out, or "
                "remove it first"
            )
        yield reader.size, reader.size, int(there.ends[-1])
        return
    with written_whole(out, manifest=False) as folder:
        yield from write_examples(folder, reader, tokenizer, settings)
    yield reader.size, reader.size, int(Examples.open(out).ends[-1])


def described(
    reader: ExampleReader, sums: Sequence[str], tokenizer: Tokenizer, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the part of examples.json that the arguments determine.

    `sums` are the SHA-256 of the sources.
    """
    file = Path(settings["template"])
    return {
        "format": FORMAT,
        "version": VERSION,
        "base": {
            "fingerprint": tokenizer.fingerprint,
            "template": tokenizer.usage.templates.get("default"),
        },
        "template_file": file.read_text(encoding="utf-8-sig") if file.is_file() else None,
        "sources": [
            {"path": source.name, "bytes": source.size, "sha256": each}
            for (source, _), each in zip(reader.files, sums, strict=True)
        ],
        "settings": dict(settings),
    }


# -- writing


def write_examples(
    folder: Path, reader: ExampleReader, tokenizer: Tokenizer, settings: Mapping[str, Any]
) -> Iterator[tuple[int, int, int]]:
    """Write all files of a folder of examples; yield bytes read, all bytes and tokens so far."""
    encoder = None
    with RowWriter(folder, settings["seed"]) as writer:
        for example in reader.examples():
            encoder = encoder or Encoder(
                tokenizer,
                example,
                reader.finetune,
                context_length=settings["context_length"],
                unknown=settings["unknown"],
            )
            try:
                writer.add(example, encoder.rows(example))
            except ValueError as error:
                reader.bad_rows.add(f"{example.place}: {error}")
            if len(writer.said) % REPORTED == 0:
                yield reader.read, reader.size, writer.tokens
    if encoder is None or not writer.said:
        raise ValueError(none_in(reader.names, reader.bad_rows))
    reader.bad_rows.warn()
    if encoder.same_answers:
        warnings.warn(
            f"{encoder.same_answers:,} examples have the same text in 'chosen' and 'rejected', "
            "which teaches nothing",
            stacklevel=2,
        )
    encoder.tokenizer.save(folder)
    asked = described(reader, reader.sums, tokenizer, settings)
    write_json(folder / INFO, asked | finished(folder, reader, encoder, writer, settings))


# -- reading


@dataclass(frozen=True)
class ExampleRows:
    """The examples of one split; threads may read them in parallel."""

    folder: Path
    ends: np.ndarray  # of all rows of the folder
    numbers: np.ndarray  # of this split's examples in the folder, (N,)
    rows: int  # of an example

    def __len__(self) -> int:
        return len(self.numbers)

    @cached_property
    def lengths(self) -> np.ndarray:
        """The tokens of the longest row of each example, (N,)."""
        lengths = np.diff(self.ends, prepend=0).reshape(-1, self.rows).max(1)
        return lengths[self.numbers]

    def read(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the rows of an example, from 0: tokens and targets, each (T,) int64."""
        first = int(self.numbers[number]) * self.rows
        found = []
        for row in range(first, first + self.rows):
            start, end = int(self.ends[row - 1]) if row else 0, int(self.ends[row])
            # Opened for each row: a memory map's pages would count as memory of this process.
            tokens, targets = (
                np.fromfile(self.folder / name, np.int32, end - start, offset=4 * start)
                for name in (TOKENS, TARGETS)
            )
            found.append((tokens.astype(np.int64), targets.astype(np.int64)))
        return found


@dataclass(frozen=True)
class Examples:
    """A folder of examples made by `prepare_examples`."""

    folder: Path
    info: dict[str, Any]  # examples.json
    ends: np.ndarray  # the end of each row in the tokens
    order: np.ndarray  # numbers of examples: those of train, then of validation, then of test

    @classmethod
    def open(cls, folder: Path) -> "Examples":
        """Open a folder; FileNotFoundError or DamagedError in one line."""
        if not (folder / INFO).is_file():
            raise FileNotFoundError(f"{folder} has no {INFO}: it is no folder of examples")
        info = read_json(folder / INFO)
        if (info.get("format"), info.get("version")) != (FORMAT, VERSION):
            raise DamagedError(f"{folder / INFO} is not of this format, {FORMAT} {VERSION}")
        if missing := {"task", "labels", "tokenizer", "settings", "splits", "counts"} - {*info}:
            raise DamagedError(f"{folder / INFO} lacks {', '.join(sorted(missing))}")
        try:
            ends, order = (np.load(folder / name) for name in (ENDS, SPLIT))
            sizes = {(folder / name).stat().st_size for name in (TOKENS, TARGETS)}
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{folder} is damaged: {error}") from error
        if sizes != {4 * int(ends[-1])}:
            raise DamagedError(f"{folder} has {TOKENS} or {TARGETS} of another size than {ENDS}")
        return cls(folder, info, ends, order)

    @property
    def task(self) -> ExampleKind:
        """What the examples are for."""
        return self.info["task"]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, by number; () for other tasks."""
        return tuple(self.info["labels"])

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this data from other data, wherever it lies."""
        return {name: self.info[name] for name in ("task", "tokenizer", "labels", "files")}

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made it, with the template and the special tokens that it uses."""
        return load_tokenizer(self.folder)

    def split(self, name: str) -> ExampleRows:
        """Return the examples of train, validation or test."""
        sizes = [self.info["splits"][each]["examples"] for each in SPLITS]
        start = sum(sizes[: SPLITS.index(name)])
        numbers = self.order[start : start + sizes[SPLITS.index(name)]]
        return ExampleRows(self.folder, self.ends, numbers, len(self.ends) // len(self.order))

    def verify(self) -> None:
        """Raise DamagedError if a file's SHA-256 is not the one in examples.json."""
        for name, expected in self.info["files"].items():
            if sha256(self.folder / name) != expected:
                raise DamagedError(f"{self.folder / name} was changed since it was written")


def is_examples(folder: Path) -> bool:
    """Return whether a folder was made by `prepare_examples`."""
    return (folder / INFO).is_file()
