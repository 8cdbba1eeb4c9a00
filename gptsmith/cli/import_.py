"""The verb that converts a model from another format: import."""

import json
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from ..config.fields import Bytes, setting
from ..convert.formats import FORMATS, READABLE
from ..machine.dtypes import dtype_named
from ..machine.environment import return_freed_memory
from .export import DTYPE_HELP, SHARD_HELP
from .flags import Parser, add_flags, chosen

OWN_DTYPES = FORMATS["huggingface"].dtypes


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """How a model of another system is read."""

    format: str | None = setting(
        None,
        f"format of SOURCE: {', '.join(READABLE)} (default: recognised by its content)",
        flag="from",
        metavar="FORMAT",
    )
    tokenizer: str | None = setting(
        None,
        "tokenizer: gpt2, byte, char:ABC (these characters), none, a folder or a meta.pkl "
        "(default: the source's own, or gpt2 if the vocabulary has its size)",
        metavar="NAME",
    )
    dtype: Annotated[str, partial(dtype_named, known=OWN_DTYPES)] | None = setting(
        None, DTYPE_HELP, metavar="|".join(OWN_DTYPES)
    )
    shard_size: Bytes | None = setting(None, SHARD_HELP)
    json: bool = setting(False, "write the report as JSON")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith import`."""
    parser.add_argument(
        "source", metavar="SOURCE", help="file or folder of another format, or gpt2[-medium|...]"
    )
    parser.add_argument("out", metavar="OUT", help="new folder")
    add_flags(parser, ImportSettings)


def run(options: Namespace) -> None:
    """Convert a model from another format to a Hugging Face folder."""
    settings = chosen(options, ImportSettings)
    from ..convert.carry import import_model

    return_freed_memory()
    report = import_model(
        Path(options.source),
        Path(options.out),
        format=settings.format,
        tokenizer=settings.tokenizer,
        dtype=settings.dtype,
        shard_bytes=settings.shard_size,
    )
    print(json.dumps(report.to_json(), indent=2) if settings.json else report)
