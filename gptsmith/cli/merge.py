"""The verb that adds an adapter to the weights of its base: merge."""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ..config.fields import Bytes, setting
from ..config.settings import BASE_HELP
from ..machine.environment import return_freed_memory
from .export import SHARD_HELP, DtypeName
from .flags import Parser, add_flags, chosen

DTYPES = ("float32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """How the merged model is written."""

    base: str | None = setting(None, BASE_HELP, metavar="MODEL")
    dtype: DtypeName = setting("float32", "number format of the weights", metavar="|".join(DTYPES))
    shard_size: Bytes | None = setting(None, SHARD_HELP)
    json: bool = setting(False, "write the report as JSON")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith merge`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a run or folder with a LoRA adapter")
    parser.add_argument("out", metavar="OUT", help="new folder")
    add_flags(parser, MergeSettings)


def run(options: Namespace) -> None:
    """Add a LoRA adapter to the weights of its base, and compare the logits."""
    settings = chosen(options, MergeSettings)
    from ..convert.carry import merge_adapter

    return_freed_memory()
    report = merge_adapter(
        options.adapter,
        Path(options.out),
        base=settings.base,
        dtype=settings.dtype,
        shard_bytes=settings.shard_size,
    )
    print(json.dumps(report.to_json(), indent=2) if settings.json else report)
