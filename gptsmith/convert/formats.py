"""The table of formats, and which of them a file or folder is in.

A format is a module with a table of names and some of these verbs:

    recognise(path) -> bool             whether the content (never the name) is of this format
    read(path) -> Stored                what it holds, with one tensor at a time in memory
    nearest(config) -> GPTConfig        the closest model that the format can say
    write(stored, out, dtype) -> None   a new file, or into an empty folder, tensor by tensor
    run(path, tokens) -> logits         what the system that the format belongs to makes of it

Formats do not know one another, nor this table. One that is added needs a line in it.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from ..config.fields import suggestion
from . import book, gguf, huggingface, llmc, nanogpt, onnx, tensorflow
from .hub import PUBLISHED, fetch_published


@dataclass(frozen=True)
class Format:
    """A row of the table: what a format is called, and what can be done with it."""

    title: str
    module: ModuleType
    dtypes: tuple[str, ...] = ("float32", "fp16", "bf16")  # that it can be written in
    is_file: bool = False  # rather than a folder
    ours: bool = False  # with a manifest, and in several files if wanted
    runner: str = ""  # the package that `run` needs

    def can(self, verb: str) -> bool:
        """Whether the module has a verb."""
        return hasattr(self.module, verb)


FORMATS = {
    "huggingface": Format("Hugging Face folder", huggingface, ours=True, runner="transformers"),
    "nanogpt": Format("nanoGPT checkpoint", nanogpt),
    "book": Format("GPTModel of the book", book),
    "llmc": Format("llm.c model", llmc, ("float32", "bf16"), is_file=True),
    "gguf": Format("GGUF file", gguf, gguf.DTYPES, is_file=True),
    "tensorflow": Format("TensorFlow folder of OpenAI's", tensorflow),
    "onnx": Format("ONNX folder", onnx, ("float32", "fp16"), runner="onnxruntime"),
}
READABLE = [name for name, format in FORMATS.items() if format.can("read")]
WRITABLE = [name for name, format in FORMATS.items() if format.can("write")]


class Place(NamedTuple):
    """Where a model is or shall be, and the name of the format there."""

    path: Path
    name: str

    @property
    def format(self) -> Format:
        """The row of the table."""
        return FORMATS[self.name]


def find_source(path: Path, name: str | None) -> Place:
    """A path with its format: the one that is named, or the one that its content shows.

    Where nothing is there, "gpt2" and its like are the published weights.
    """
    if str(path) in PUBLISHED and not path.exists():
        return Place(fetch_published(str(path)), "huggingface")
    if not path.exists():
        beside = path.parent.glob("*") if path.parent.is_dir() else []
        known = [*PUBLISHED, *(other.name for other in beside)]
        raise FileNotFoundError(f"nothing at {path}{suggestion(path.name, known)}")
    if name is not None:
        return Place(path, check_name(name, READABLE, "read"))
    for name in READABLE:
        if FORMATS[name].module.recognise(path):
            return Place(path, name)
    for name in ("huggingface", "tensorflow"):  # which are folders, known by their small files
        if path.is_file() and FORMATS[name].module.recognise(path.parent):
            whole = f"{path} is a part of {path.parent}, a {FORMATS[name].title}"
            raise ValueError(f"{whole}: import the folder")
    titles = ", ".join(FORMATS[name].title for name in READABLE)
    raise ValueError(f"{path} is none of these: {titles}; --from FORMAT overrides this")


def check_name(name: str, known: list[str], what: str) -> str:
    """The name of a format; ValueError where there is none such to be `what`."""
    if name not in known:
        can = ", ".join(known)
        raise ValueError(
            f"no format '{name}' can be {what}{suggestion(name, known)} (known: {can})"
        )
    return name
