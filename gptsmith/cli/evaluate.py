"""The command that measures a model's loss on a text: evaluate."""

import json
import tempfile
from argparse import Namespace
from pathlib import Path

from ..config.recipe import parse_value
from ..config.settings import MachineSettings, PrepareSettings
from .flags import Parser, add_flags
from .opening import DATA_HELP, MODEL_HELP, open_model, open_text


def add_evaluate(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, metavar="DATA", help=DATA_HELP)
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        help="of prepared data (default: validation); a source is evaluated whole",
    )
    parser.add_argument("--tokens", metavar="N", help="only the first N tokens")
    parser.add_argument("--context-length", metavar="T", help="window (default: the model's)")
    parser.add_argument("--json", action="store_true", help="write JSON")
    add_flags(parser, PrepareSettings, without=("validation_fraction", "shard_tokens"))
    add_flags(parser, MachineSettings, without=("compile", "micro_batch", "deterministic"))


def evaluate(options: Namespace) -> None:
    """Measure the loss of a model on a text."""
    from ..evaluation.heldout import evaluate

    tokens = parse_value("tokens", options.tokens, int | None)
    window = parse_value("context_length", options.context_length, int | None)
    model, tokenizer = open_model(options, options.model)
    if window is not None and not 1 <= window <= model.config.context_length:
        limit = model.config.context_length
        raise ValueError(f"context_length is {window}: 1 to the model's {limit} is needed")
    with tempfile.TemporaryDirectory() as temporary:
        found = evaluate(
            model,
            open_text(options, tokenizer, model.config, Path(temporary)),
            tokenizer=tokenizer,
            first_tokens=tokens,
            context_length=window,
        )
    values = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.bytes,
    }
    if options.json:
        print(json.dumps(values))
        return
    bits = "unknown" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    print(f"loss           {found.loss:.4f} nats per token")
    print(f"perplexity     {found.perplexity:.2f}")
    print(f"bits per byte  {bits}")
    print(f"tokens         {found.tokens:,}")
