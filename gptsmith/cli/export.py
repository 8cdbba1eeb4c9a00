"""The verb that writes a model in another format: export; and what import shares with it."""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..config.fields import REQUIRED, Bytes, setting
from ..machine.environment import return_freed_memory
from .flags import Parser, add_flags, chosen
from .opening import MODEL_HELP

# As in the table of convert/formats.py, which takes longer to import than help may take.
READABLE = "huggingface, nanogpt, book, llmc, gguf, tensorflow"
WRITABLE = "huggingface, nanogpt, book, llmc, gguf, onnx"

# What others call the number formats.
OTHER_WORDS = {"f32": "float32", "fp32": "float32", "f16": "fp16", "float16": "fp16"}
OTHER_WORDS |= {"bfloat16": "bf16"}


def our_word(text: str) -> str:
    """What we call a number format."""
    return OTHER_WORDS.get(text.lower(), text.lower())


NumberFormat = Annotated[Literal["float32", "fp16", "bf16"], our_word]
WrittenFormat = Annotated[Literal["float32", "fp16", "bf16", "q8_0"], our_word]

DTYPE_HELP = "number format of the weights (default: as stored)"
SHARD_HELP = "largest file of weights of a Hugging Face folder, as 5GB (default: one file)"


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What is written."""

    to: str = setting(REQUIRED, f"one of {WRITABLE}", metavar="FORMAT")
    approximate: bool = setting(
        False, "write the nearest model that the format can express, where it cannot express all"
    )
    dtype: WrittenFormat | None = setting(None, f"{DTYPE_HELP}; q8_0 is for gguf")
    shard_size: Bytes | None = setting(None, SHARD_HELP)
    json: bool = setting(False, "write the report as JSON")


def arguments(parser: Parser) -> None:
    """What may follow `gptsmith export`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="new file or folder")
    add_flags(parser, ExportSettings)


def run(options: Namespace) -> None:
    """Write a model in the format of another tool."""
    settings = chosen(options, ExportSettings)
    from ..convert import export_model

    return_freed_memory()
    report = export_model(
        options.model,
        Path(options.out),
        to=settings.to,
        approximate=settings.approximate,
        dtype=settings.dtype,
        shard_bytes=settings.shard_size,
    )
    show(report, settings.json)


def show(report: Any, as_json: bool) -> None:
    """Write the report of a conversion."""
    print(json.dumps(report.to_json(), indent=2) if as_json else report)
