"""The table of formats, which of them a file or folder is in, and what each can say.

A format is a row of the table and a module of the same name, with a table of names and some of
these verbs:

    recognise(path) -> bool             whether the content (never the name) is of this format
    read(path) -> Stored                what it holds, with one tensor at a time in memory
    nearest(config) -> GPTConfig        the closest model that the format can say
    write(stored, out, dtype) -> None   a new file, or into an empty folder, tensor by tensor
    run(path, tokens) -> logits         what the system that the format belongs to makes of it

Formats do not know one another. The table needs no PyTorch, so that `--help` can show what is in
it.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from ..config.fields import suggestion
from ..config.model import GPTConfig
from ..machine.dtypes import STORED
from .hub import PUBLISHED, fetch_published


@dataclass(frozen=True)
class Format:
    """A row of the table: what a format is called, and what can be done with it."""

    title: str
    readable: bool = True
    writable: bool = True
    dtypes: tuple[str, ...] = STORED  # that it can be written in
    modern: bool = False  # whether it has the modern block too
    is_file: bool = False  # rather than a folder
    ours: bool = False  # with a manifest, and in several files if wanted
    runner: str = ""  # the package that `run` needs, if the module has that


FORMATS = {
    "huggingface": Format("Hugging Face folder", modern=True, ours=True, runner="transformers"),
    "nanogpt": Format("nanoGPT checkpoint"),
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
    """Where a model is or shall be, and the name of the format there."""

    path: Path
    name: str

    @property
    def format(self) -> Format:
        """The row of the table."""
        return FORMATS[self.name]

    @property
    def module(self) -> Any:
        """The verbs of the format."""
        return module_of(self.name)


def module_of(name: str) -> Any:
    """The module of a format. It is imported where it is used, as most of them import PyTorch."""
    return import_module(f".{name}", __package__)


# -- which format something is in


def find_source(path: Path, name: str | None) -> FormatPath:
    """A path with its format: the one that is named, or the one that its content shows.

    Where nothing is there, "gpt2" and its like are the published weights.
    """
    if str(path) in PUBLISHED and not path.exists():
        return FormatPath(fetch_published(str(path)), "huggingface")
    if not path.exists():
        beside = path.parent.glob("*") if path.parent.is_dir() else []
        known = [*PUBLISHED, *(other.name for other in beside)]
        raise FileNotFoundError(f"nothing at {path}{suggestion(path.name, known)}")
    if name is not None:
        return FormatPath(path, check_name(name, READABLE, "read"))
    for name in READABLE:
        if module_of(name).recognise(path):
            return FormatPath(path, name)
    for name in ("huggingface", "tensorflow"):  # which are folders, known by their small files
        if path.is_file() and module_of(name).recognise(path.parent):
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


# -- what a format can say


def nearest(config: GPTConfig, target: FormatPath) -> tuple[GPTConfig, list[str]]:
    """The closest model that a format can say, and in words what is lost.

    ValueError where weights would not fit it. A bias more costs nothing, since it is written as
    zeros, nor does a head of its own for a tied one; dropout is no part of what a trained model
    computes.
    """
    if config.modern and not target.format.modern:
        title = target.format.title
        raise ValueError(f"{title}: it has GPT-2's block alone, the modern one cannot be written")
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
    """The number format to write: the one wanted, the one stored, or float32."""
    dtypes = target.format.dtypes
    if wanted is None:
        return stored if stored in dtypes else "float32"
    if wanted not in dtypes:
        can = ", ".join(dtypes)
        raise ValueError(f"{target.format.title}: written in {can}, not in {wanted}")
    return wanted
