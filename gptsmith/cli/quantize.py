"""The verb that makes a model smaller: quantize."""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..checkpoint.finding import find_model
from ..config.fields import REQUIRED, at_least, setting
from ..config.settings import BASE_HELP, PrepareSettings
from ..machine.environment import return_freed_memory
from .flags import Parser, add_flags, chosen
from .opening import DATA_HELP, MODEL_HELP


@dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """What a model is quantized to, and what it is compared on."""

    bits: Literal[8, 4] = setting(
        REQUIRED, "bits of the matrices in the blocks; embedding and head always get 8"
    )
    data: str | None = setting(
        None,
        f"compare on {DATA_HELP} (default: text that the model generates)",
        metavar="DATA",
    )
    tokens: int = setting(1024, "compare on N tokens")
    base: str | None = setting(None, BASE_HELP, metavar="MODEL")
    json: bool = setting(False, "write the report as JSON")

    def __post_init__(self) -> None:
        at_least(self, 2, "tokens")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith quantize`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="new folder")
    add_flags(parser, QuantizeSettings)
    others = ("validation_fraction", "deduplicate", "shard_tokens")
    add_flags(parser, PrepareSettings, without=others)


def run(options: Namespace) -> None:
    """Write a model in 8 or 4 bits, and measure what that costs."""
    settings, text = chosen(options, QuantizeSettings), chosen(options, PrepareSettings)
    return_freed_memory()
    from ..evaluation.quantization import quantize

    report = quantize(
        find_model(options.model),
        Path(options.out),
        settings.bits,
        tokens=settings.tokens,
        data=settings.data,
        text=text,
        base=settings.base,
    )
    print(json.dumps(asdict(report), indent=2) if settings.json else report)
