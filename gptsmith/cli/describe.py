"""The command that looks at a model from outside: describe."""

import json
import re
from argparse import Namespace

from ..checkpoint.folder import read_bits, tensor_bytes
from ..config.describe import describe as describe_model
from ..config.model import PRESETS
from .flags import Parser
from .opening import described_config


def add_describe(parser: Parser) -> None:
    parser.add_argument(
        "what", metavar="MODEL|PRESET|RECIPE", help=f"presets: {', '.join(PRESETS)}"
    )
    parser.add_argument("--trace", metavar="BxT", help="run a forward pass and show every shape")
    parser.add_argument("--json", action="store_true", help="write JSON")


def describe(options: Namespace) -> None:
    """Show every component of a model: shapes, parameters, memory, FLOPs."""
    config, title, folder = described_config(options.what)
    if folder is not None and (bits := read_bits(folder)) is not None:
        title += f" (quantized to {bits} bits: {tensor_bytes(folder):,} bytes of weights)"
    description = describe_model(config, title=title)
    values = description.to_json()
    trace = None
    if options.trace:
        from ..model.trace import render
        from ..model.trace import trace as run_trace

        batch, tokens = parse_shape(options.trace)
        trace = list(run_trace(config, batch, tokens))
        values["trace"] = [line.to_json() for line in trace]
    if options.json:
        print(json.dumps(values, indent=2))
        return
    print(description)
    if trace is not None:
        print()
        print(render(trace))


def parse_shape(text: str) -> tuple[int, int]:
    """ "2x4" -> (2, 4): a batch of 2, of 4 tokens each."""
    if not re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text):
        raise ValueError(f"a trace of '{text}': BxT is needed, a batch of B texts of T tokens: 2x4")
    batch, tokens = text.split("x")
    return int(batch), int(tokens)
