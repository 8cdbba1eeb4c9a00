"""Find sources of text: files, folders, .jsonl and .parquet, standard input, built-in texts.

Knows nothing of their contents, which `documents.py` reads.
"""

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..config.fields import suggestion
from ..machine.files import CHUNK_BYTES
from .copying import copying
from .shakespeare import comedy_or_tragedy, plays
from .small_tasks import small_tasks
from .sorting import sorting

BUILT_IN = {"shakespeare": plays}
BUILT_IN_ROWS = {
    "small-tasks": small_tasks,
    "sorting": sorting,
    "copying": copying,
    "comedy-or-tragedy": comedy_or_tragedy,
}
STANDARD_INPUT = "-"
ROWS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
TABLES = {".csv": "csv", ".tsv": "tsv", ".json": "json"}  # rows where they are named themselves
TEXT = "txt text md markdown rst tex org adoc"
CODE = (
    "asm bash bat c cc clj cljs cmake cpp cs css cu cuh cxx d dart el elm erl ex exs f f90 f95 fs "
    "go gradle graphql groovy h hh hpp hs html hxx java jl js jsx kt kts lean lisp lua m mjs ml "
    "mli mm nim nix pas php pl pm proto ps1 py pyi pyx r rb rkt rs s scala scm scss sh sql sv "
    "swift tcl toml ts tsx v vhd vhdl vim vue yaml yml zig zsh"
)
# Files by which a folder is known as a dataset, a run, or a model: what was made from text.
MADE = (
    {"dataset.json"},
    {"dataset-part.json"},
    {"examples.json"},
    {"config.toml", ".lock"},  # a run that is going on, perhaps the one that reads this text
    {"config.toml", "metrics.jsonl"},
    {"config.json", "model.safetensors"},
)
KNOWN_SUFFIXES = {f".{word}" for words in (TEXT, CODE) for word in words.split()} | set(ROWS)


@dataclass(frozen=True)
class Source:
    """One file of text, or of rows that are documents; or a part of the rows of a file."""

    name: str  # as the user gave it
    size: int  # bytes
    kind: Literal["text", "jsonl", "parquet", "json", "csv", "tsv"] = "text"
    path: Path | None = None
    content: bytes | None = field(default=None, repr=False)  # UTF-8; for a text without a file
    part: tuple[int, int] | None = None  # only rows that begin at these bytes: from, and up to

    @property
    def has_rows(self) -> bool:
        """Whether each row is a document, not the whole file."""
        return self.kind != "text"

    @property
    def at_start(self) -> bool:
        """Whether it is a whole file, or its first part."""
        return not self.part or self.part[0] == 0

    def rows_from(self, start: int, stop: int) -> "Source":
        """Return the rows that begin at these bytes as a source of their own."""
        name = f"{self.name} from byte {start:,} on" if start else self.name
        return replace(self, name=name, size=stop - start, part=(start, stop))

    def open(self) -> BinaryIO:
        """Open the source for reading bytes; all parts of a file are together its bytes."""
        if self.content is not None:
            file: BinaryIO = io.BytesIO(self.content)
        else:
            assert self.path is not None
            file = self.path.open("rb")
        if not self.part:
            return file
        start, stop = self.part
        if self.kind == "jsonl":
            start, stop = next_line(file, start), next_line(file, stop)
        return io.BufferedReader(Section(file, start, stop))

    def sha256(self) -> str:
        """Return the hex SHA-256 of the bytes."""
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


class Section(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self.file, self.start, self.stop = file, start, stop
        file.seek(start)

    def readable(self) -> bool:
        """Return True: it is for reading."""
        return True

    def seekable(self) -> bool:
        """Return True: any byte can be read next."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a byte, counted from the first; return its number."""
        origin = (self.start, self.file.tell(), self.stop)[whence]
        return self.file.seek(origin + offset) - self.start

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there are bytes; return their number."""
        data = self.file.read(max(0, min(len(buffer), self.stop - self.file.tell())))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()


def next_line(file: BinaryIO, offset: int) -> int:
    """Return where the first line begins that does not begin before byte `offset`."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    while data := file.readline(CHUNK_BYTES):
        if data.endswith(b"\n"):
            break
    return file.tell()


def find_sources(names: Sequence[str]) -> list[Source]:
    """Return the sources of names: built-in texts, files, folders, or "-" for standard input.

    FileNotFoundError if a name does not exist; ValueError for a folder without text.
    """
    if not names:
        raise ValueError("no source given: a file, a folder, - or a built-in text is needed")
    return [source for name in names for source in sources_of(str(name))]


def sources_of(name: str) -> list[Source]:
    """Return the sources of one name."""
    if not name:
        raise ValueError("the name of a source is empty: a file, a folder or - is needed")
    if name == STANDARD_INPUT:
        return [spooled(sys.stdin.buffer)]
    if name in BUILT_IN:
        texts = [(part, text.encode()) for part, text in BUILT_IN[name]()]
        return [Source(f"{name}/{part}", len(text), content=text) for part, text in texts]
    if name in BUILT_IN_ROWS:
        lines = "".join(json.dumps(row) + "\n" for row in BUILT_IN_ROWS[name]()).encode()
        return [Source(name, len(lines), "jsonl", content=lines)]
    path = Path(os.path.expanduser(name))  # Path.expanduser needs a home
    if path.is_dir():
        return sources_in(path)
    if path.exists():  # named alike on all systems, as dataset.json keeps the name
        return [file_source(path, name.replace(os.sep, "/"))]
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    raise FileNotFoundError(
        f"no file, folder or built-in text '{name}'"
        f"{suggestion(path.name, [*BUILT_IN, *BUILT_IN_ROWS, *beside])}"
    )


def file_source(path: Path, name: str) -> Source:
    """Return a file as a source, whose kind follows from its suffix; by default it is text."""
    kind: Any = (ROWS | TABLES).get(path.suffix.lower(), "text")
    if not path.is_file():  # a pipe, such as <(zcat text.gz), can be read only once
        with path.open("rb") as file:
            return spooled(file, name, kind)
    if kind == "json" and not is_json_list(path):
        kind = "text"
    return Source(name, path.stat().st_size, kind, path)


def is_json_list(path: Path) -> bool:
    """Return whether a JSON file is a list, not an object or a value."""
    with path.open("rb") as file:
        # The marks at the beginning of UTF-8 and UTF-16, and the zeros of the latter.
        return file.read(CHUNK_BYTES).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n").startswith(b"[")


def sources_in(folder: Path) -> list[Source]:
    """Return all text files in a folder and below, sorted; a warning counts the others.

    Datasets, runs and models in it are passed over, or a second run would learn the first.
    """
    found: list[Path] = []
    others: list[Path] = []
    made: list[Path] = []
    seen: set[Path] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place)
        if here.resolve() in seen:  # a link to a folder that was visited
            folders.clear()
            continue
        seen.add(here.resolve())
        if any(names <= {*files} for names in MADE):
            made.append(here)
            folders.clear()
            continue
        folders.sort()  # so that of two links to a folder, always the same one is followed
        others += [here / each for each in folders if each.startswith(".")]
        folders[:] = [each for each in folders if not each.startswith(".")]
        for path in (here / each for each in files):
            known = path.suffix.lower() in KNOWN_SUFFIXES
            hidden = path.name.startswith(".")
            (found if known and not hidden and path.is_file() else others).append(path)
    if made == [folder]:
        raise ValueError(
            f"{folder} is a dataset, a run or a model, not text: name a file or a folder of text"
        )
    if made:
        warnings.warn(
            f"{folder}: skipped {len(made)} of its folders, such as "
            f"{min(made).relative_to(folder)}: datasets, runs and models are not text",
            stacklevel=2,
        )
    if not found:
        raise ValueError(
            f"{folder} has no text files, such as .txt, .md, .jsonl, .parquet or source code: name "
            "a file itself to read it whatever its suffix"
        )
    if others:
        such = min(others).relative_to(folder)
        warnings.warn(
            f"{folder}: skipped {len(others)} files or folders that are hidden or not known as "
            f"text, such as {such}",
            stacklevel=2,
        )
    found.sort(key=lambda path: path.relative_to(folder).parts)
    return [file_source(path, path.as_posix()) for path in found]


def spooled(stream: BinaryIO, name: str = STANDARD_INPUT, kind: Any = "text") -> Source:
    """Copy a pipe to a temporary file, whose size is known; deleted with the source."""
    folder = tempfile.TemporaryDirectory(prefix="gptsmith-")
    path = Path(folder.name, "input")
    with path.open("wb") as file:
        shutil.copyfileobj(stream, file, CHUNK_BYTES)
    source = Source(name, path.stat().st_size, kind, path)
    weakref.finalize(source, folder.cleanup)
    return source
