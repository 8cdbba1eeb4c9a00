"""The command that looks at a model from outside: describe."""

import json
from argparse import Namespace
from pathlib import Path

from ..config import PRESETS, GPTConfig, suggestion
from ..flags import Parser
from ..folder import all_shapes, check_tensors, find_model, read_bits, read_config, tensor_bytes
from ..inspection.describe import describe as describe_model
from ..recipe import read_toml, recipes


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
        from ..inspection.trace import parse_shape, render
        from ..inspection.trace import trace as run_trace

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


def described_config(what: str) -> tuple[GPTConfig, str, Path | None]:
    """The configuration that a preset, a recipe or a model's folder stands for, its title, and
    the folder."""
    if what in PRESETS:
        return PRESETS[what], what, None
    if what in recipes():
        return read_toml(recipes()[what]).model, f"recipe {what}", None
    if what.endswith(".toml") and Path(what).is_file():
        return read_toml(Path(what)).model, what, None
    if not Path(what).exists():
        hint = suggestion(what, [*PRESETS, *recipes()])
        raise ValueError(f"'{what}' is no preset, recipe or model{hint}")
    folder = find_model(what)
    config = read_config(folder)
    check_tensors(folder, config, all_shapes(folder))  # what is damaged is said, not described
    return config, str(folder), folder
