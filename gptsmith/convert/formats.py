"""The table of formats: recognize a file's format, and find what a format cannot express.

A format is a row of the table and a module of the same name, with a table of tensor names and some
of these functions:

    recognise(path) -> bool             whether the content (not the name) is of this format
    read(path) -> Stored                the model, with one tensor at a time in memory
    nearest(config) -> GPTConfig        the closest model that the format can express
    write(stored, out, dtype) -> None   write a new file, or into an empty folder, tensor by tensor
    run(path, tokens) -> logits         the output of the format's own system

Formats do not import one another. The table needs no PyTorch, so that `--help` can show it.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.finding import find_model, is_run
from ..config.fields import suggestion
from ..config.model import GPTConfig
from ..machine.dtypes import STORED
from .hub import PUBLISHED, fetch_published


@dataclass(frozen=True)
class Format:
    """A row of the table: the title of a format and what it supports."""

    title: str
    readable: bool = True
    writable: bool = True
    dtypes: tuple[str, ...] = STORED  # for writing
    modern: bool = False  # whether it can express the modern block
    is_file: bool = False  # not a folder
    ours: bool = False  # written with a manifest, and in shards if wanted
    runner: str = ""  # the package that the module's `run` needs, if it has one


FORMATS = {
    "huggingface": Format("Hugging Face folder", modern=True, ours=True, runner="transformers"),
    "nanogpt": Format("nanoGPT checkpoint"),
    "mingpt": Format("minGPT state dict"),
    "book": Format("GPTModel of the book"),
    "llmc": Format("llm.c model", dtypes=("float32", "bf16"), is_file=True),
    "gguf": Format("GGUF file", dtypes=(*STORED, "q8_0"), is_file=True),
    "tensorflow": Format("TensorFlow folder of OpenAI's", writable=False),
    "onnx": Format(
        "ONNX folder",
        readable=False,
        dtypes=("float32", "fp16"),
        modern=True,
        runner="onnxruntime",
    ),
}
READABLE = [name for name, format in FORMATS.items() if format.readable]
WRITABLE = [name for name, format in FORMATS.items() if format.writable]
DTYPES = tuple(dict.fromkeys(dtype for format in FORMATS.values() for dtype in format.dtypes))


class FormatPath(NamedTuple):
    """The path of a model to read or write, and the name of its format."""

    path: Path
    name: str

    @property
    def format(self) -> Format:
        """The row of the table."""
        return FORMATS[self.name]

    @property
    def module(self) -> Any:
        """The module with the format's functions."""
        return module_of(self.name)


def module_of(name: str) -> Any:
    """Import the module of a format; only when needed, because most of them import PyTorch."""
    return import_module(f".{name}", __package__)


# -- recognizing a format


def find_source(path: Path, name: str | None) -> FormatPath:
    """Return a path with its format: the one that is named, or the one of its content.

    A run is its best checkpoint. If the path does not exist, "gpt2" and the like mean the published
    weights.
    """
    if str(path) in PUBLISHED and not path.exists():
        return FormatPath(fetch_published(str(path)), "huggingface")
    if not path.exists():
        beside = path.parent.glob("*") if path.parent.is_dir() else []
        known = [*PUBLISHED, *(other.name for other in beside)]
        raise FileNotFoundError(f"nothing at {path}{suggestion(path.name, known)}")
    if name is not None:
        return FormatPath(path, check_name(name, READABLE, "read"))
    if is_run(path):
        return FormatPath(find_model(path), "huggingface")
    for name in READABLE:
        if module_of(name).recognise(path):
            return FormatPath(path, name)
    for name in ("huggingface", "tensorflow"):  # folders that are recognized by small files
        if path.is_file() and module_of(name).recognise(path.parent):
            whole = f"{path} is a part of {path.parent}, a {FORMATS[name].title}"
            raise ValueError(f"{whole}: import the folder")
    titles = ", ".join(FORMATS[name].title for name in READABLE)
    raise ValueError(f"{path} is none of these: {titles}; --from FORMAT says why")


def check_name(name: str, known: list[str], what: str) -> str:
    """Return the name of a format; ValueError if none of this name can be read (or written)."""
    if name not in known:
        can = ", ".join(known)
        raise ValueError(
            f"no format '{name}' can be {what}{suggestion(name, known)} (known: {can})"
        )
    return name


# -- what a format can express


def nearest(config: GPTConfig, target: FormatPath) -> tuple[GPTConfig, list[str]]:
    """Return the closest model that a format can express, and a list of what is lost.

    ValueError if the weights do not fit it. Absent biases can be written as zeros, and a tied head
    as a copy, so these are no loss; nor is dropout, which a trained model does not use.
    """
    if config.modern and not target.format.modern:
        title = target.format.title
        raise ValueError(f"{title}: it has only GPT-2's block, so the modern one cannot be written")
    near = target.module.nearest(config)
    if near.mlp_size != config.mlp_size:
        raise ValueError(
            f"{target.format.title}: its MLP has {near.mlp_size} channels (4 * n_embd), not "
            f"{config.mlp_size}"
        )
    lost = [
        f"{name} {getattr(config, name)} (it has {getattr(near, name)})"
        for name in ("activation", "norm_eps")
        if getattr(config, name) != getattr(near, name)
    ]
    if near.tie_weights and not config.tie_weights:
        lost.append("a head of its own (it has the embedding)")
    for name in ("bias", "has_qkv_bias"):
        if getattr(config, name) and not getattr(near, name):
            lost.append(f"{name} (it has none)")
    return near, lost


def check_dtype(target: FormatPath, wanted: str | None, stored: str) -> str:
    """Return the number format to write: the one wanted, the one stored, or float32."""
    dtypes = target.format.dtypes
    if wanted is None:
        return stored if stored in dtypes else "float32"
    if wanted not in dtypes:
        can = ", ".join(dtypes)
        raise ValueError(f"{target.format.title}: {wanted} cannot be written, only {can}")
    return wanted
