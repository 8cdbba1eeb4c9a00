"""The commands that look at a model from outside: describe and bench."""

import json
from argparse import Namespace
from pathlib import Path

from ..config import PRESETS, GPTConfig, suggestion
from ..flags import Parser, add_flags, given
from ..folder import all_shapes, check_tensors, find_model, read_bits, read_config, tensor_bytes
from ..inspection.describe import describe as describe_model
from ..recipe import convert, read_toml, recipes, updated
from ..runtime import use_huge_pages
from ..settings import MachineSettings, TrainingSettings
from .use import choose_to_use


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


def add_bench(parser: Parser) -> None:
    parser.add_argument("what", choices=("train", "generate"), help="what to measure")
    parser.add_argument(
        "model", metavar="MODEL|PRESET|RECIPE", help="presets: " + ", ".join(PRESETS)
    )
    parser.add_argument("--steps", default="10", metavar="N", help="steps timed (default: 10)")
    parser.add_argument(
        "--rows", metavar="N", help="rows at once (default: 4 for train, 1 for generate)"
    )
    parser.add_argument("--prompt-tokens", default="32", metavar="N", help="generate: default 32")
    parser.add_argument("--max-tokens", default="128", metavar="N", help="generate: default 128")
    parser.add_argument("--optimizer", metavar="adamw|muon", help="train: default adamw")
    parser.add_argument(
        "--profile", action="store_true", help="train: where the time goes, by part of the model"
    )
    parser.add_argument("--json", action="store_true", help="write JSON")
    add_flags(parser, MachineSettings, without=("micro_batch", "deterministic"))


def bench(options: Namespace) -> None:
    """Measure tokens per second, step time and peak memory."""
    if options.what == "generate":
        use_huge_pages()
    from ..bench import bench_generate, bench_train
    from ..profile import profile_train, render

    config, title, folder = described_config(options.model)
    counts = {
        name: convert(name, getattr(options, name), int)
        for name in ("steps", "prompt_tokens", "max_tokens")
    }
    rows = convert("rows", options.rows, int | None)
    for name, count in {**counts, "rows": 1 if rows is None else rows}.items():
        if count < 1:
            raise ValueError(f"{name} is {count}: at least 1 is needed")
    if options.what == "train":
        machine = updated(MachineSettings(), given(options, MachineSettings), "bench")
        chosen = updated(TrainingSettings(), {"optimizer": options.optimizer or "adamw"}, "bench")
        measure = profile_train if options.profile else bench_train
        found = measure(
            config, machine, rows=rows or 4, steps=counts["steps"], optimizer=chosen.optimizer
        )
    elif options.profile or options.optimizer:
        raise ValueError("--profile and --optimizer are of training: say 'bench train'")
    else:
        found = bench_generate(
            config,
            choose_to_use(options, folder),
            rows=rows or 1,
            prompt_tokens=counts["prompt_tokens"],
            max_tokens=counts["max_tokens"],
        )
    if options.json:
        print(json.dumps({"model": title, **found}))
        return
    profile = found.pop("profile", None)
    width = max(map(len, found))
    print(f"{options.what}: {title}")
    for name, value in found.items():
        shown = f"{value:,.4g}" if isinstance(value, float) and value < 1000 else value
        shown = f"{value:,.0f}" if isinstance(value, int | float) and value >= 1000 else shown
        print(f"  {name.replace('_', ' '):<{width}}  {shown}")
    if profile is not None:
        print()
        print(render(profile))
