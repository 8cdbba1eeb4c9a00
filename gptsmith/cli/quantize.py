"""The command that makes a model smaller: quantize."""

import json
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..checkpoint.folder import find_model
from ..config.quantization import check_bits
from ..config.recipe import parse_value
from ..config.settings import PrepareSettings
from ..machine.environment import return_freed_memory
from .flags import Parser, add_flags
from .opening import DATA_HELP, MODEL_HELP, open_text


def add_quantize(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument(
        "--bits", required=True, metavar="8|4", help="of the blocks' matrices; the vocabulary has 8"
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help=f"compare on {DATA_HELP}; without it, on text that the model writes",
    )
    parser.add_argument(
        "--tokens", default="1024", metavar="N", help="compare on N tokens (default: 1024)"
    )
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    parser.set_defaults(split=None)
    add_flags(parser, PrepareSettings, without=("validation_fraction", "shard_tokens"))


def quantize(options: Namespace) -> None:
    """Write a model in 8 or 4 bits, and measure what that costs."""
    return_freed_memory()
    bits = check_bits(parse_value("bits", options.bits, int))
    tokens = parse_value("tokens", options.tokens, int)
    if tokens < 2:
        raise ValueError(f"tokens is {tokens}: at least 2 is needed")

    from ..evaluation.quantization import quantize

    with tempfile.TemporaryDirectory() as temporary:

        def data(config: Any, tokenizer: Any) -> Any:
            return open_text(options, tokenizer, config, Path(temporary))

        report = quantize(
            find_model(options.model),
            Path(options.out),
            bits,
            tokens=tokens,
            data=data if options.data else None,
        )
    print(json.dumps(report.to_json(), indent=2) if options.json else report)
