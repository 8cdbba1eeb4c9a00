"""The verb that measures how fast this machine trains and generates: bench.

Programs in `benchmarks/` compare with other systems, load a server and profile a training step.
Knows nothing of how a measurement is made (`timing.py`).
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from ..checkpoint.described import described_config
from ..config.classifier import check_writes
from ..config.fields import SettingError, at_least, setting
from ..config.model import PRESETS, GPTConfig
from ..config.recipe import parse_value
from ..config.settings import Dtype, MachineSettings
from ..config.tables import columns, spread
from ..machine.environment import use_huge_pages
from ..machine.terminal import count, tell
from .flags import Parser, add_flags, chosen, given
from .opening import dtype_to_use

LONG_PROMPT = 1024  # tokens of the prompt for measuring prefill, if the context holds them
MOVED = {"--against": "generate.py", "--profile": "profile_training.py"} | dict.fromkeys(
    ("--clients", "--seconds", "--seed", "--slots", "--api-key"), "serve.py"
)
FOREIGN = {"train": ("rounds", "generate"), "generate": ("optimizer", "train")}
LEGEND = """
value: the median over the rounds, and the range
peak memory: largest resident size of the process, including Python, libraries and files"""

Figures = dict[str, Any]
BatchShape = tuple[int, int, int]  # rows, prompt tokens, new tokens


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to measure, and how often."""

    steps: int = setting(10, "train: optimizer steps that are timed")
    optimizer: Literal["adamw", "muon"] = setting("adamw", "train: what updates the weights")
    rows: str | None = setting(
        None,
        "rows at once: 4 in train; 1,8 in generate, where one number is a single measurement",
        metavar="N[,N]",
    )
    prompt_tokens: int | None = setting(
        None, "generate: default 32, and 1024 for prefill, or what the context holds"
    )
    max_tokens: int | None = setting(None, "generate: default 128, or what the context holds")
    rounds: int | None = setting(None, "generate: measure everything N times, and show a table")
    dtypes: tuple[str, ...] = setting(
        (),
        "precision of matrix products (generate: default float32; several with commas)",
        flag="dtype",
        metavar="|".join(get_args(Dtype)),
    )
    json: bool = setting(False, "write JSON")

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "prompt_tokens", "max_tokens", "rounds")

    def row_counts(self) -> list[int]:
        """Return the numbers of rows in --rows; empty if it was not given."""
        words = [] if self.rows is None else self.rows.split(",")
        counts = [parse_value("--rows", word, int) for word in words]
        if wrong := [count for count in counts if count < 1]:
            raise SettingError("rows", f"is {wrong[0]}: at least 1 is needed")
        return counts


class Moved(argparse.Action):
    """A flag that moved to a program in `benchmarks/`; the error names the program."""

    def __call__(self, parser: Any, namespace: Any, values: Any, flag: str | None = None) -> None:
        parser.error(f"bench has no {flag}: run python benchmarks/{MOVED[str(flag)]} instead")


def measurement(word: str) -> str:
    """Return the word after `bench`; for `serve`, name the program that loads a server instead."""
    if word == "serve":
        raise argparse.ArgumentTypeError("to load a server, run python benchmarks/serve.py MODEL")
    return word


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith bench`."""
    kinds, presets = ("train", "generate"), f"presets: {', '.join(PRESETS)}"
    parser.add_argument("what", type=measurement, choices=kinds, help="what to measure")
    parser.add_argument("model", metavar="MODEL|PRESET|RECIPE", help=presets)
    add_flags(parser, BenchSettings)
    add_flags(parser, MachineSettings, without=("dtype", "micro_batch", "deterministic", "shard"))
    for flag in MOVED:
        parser.add_argument(flag, action=Moved, nargs="?", help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    """Measure tokens per second, the time of a step or of the first token, and peak memory."""
    asked, wanted = given(options, BenchSettings), chosen(options, BenchSettings)
    name, other = FOREIGN[options.what]
    if name in asked:
        raise ValueError(f"bench {options.what} has no --{name}: use it with 'bench {other}'")
    config, title, folder = described_config(options.model)
    check_writes(config, title)
    machines = chosen_machines(options, wanted.dtypes, folder)
    if options.what == "train":
        rows = wanted.row_counts() or [4]
        if len(machines) > 1 or len(rows) > 1:
            raise ValueError(
                "bench train measures one dtype and number of rows at a time: give one of each"
            )
        from .timing import bench_train

        how = {"rows": rows[0], "steps": wanted.steps}
        found = bench_train(config, machines[0], optimizer=wanted.optimizer, **how)
    else:
        found = measure_generation(options, wanted, config, machines, folder)
    head = f"{options.what}: {title}"
    text = table_text(head, found) if "table" in found else f"{head}\n{figures_text(found)}"
    print(json.dumps({"model": title, **found}) if wanted.json else text)


def chosen_machines(
    options: argparse.Namespace, dtypes: Sequence[str], folder: Path | None
) -> list[MachineSettings]:
    """Return machine settings for each dtype to measure."""
    words: list[Any] = [word for words in dtypes for word in words.split(",")]
    machine = chosen(options, MachineSettings)
    if options.what == "generate":
        words = [dtype_to_use(word, folder, machine.device) for word in words or [None]]
    words = list(dict.fromkeys(words or [machine.dtype]))
    return [replace(machine, dtype=parse_value("--dtype", word, Dtype)) for word in words]


# -- generation: one measurement, in this process


def measure_generation(
    options: argparse.Namespace,
    wanted: BenchSettings,
    config: GPTConfig,
    machines: Sequence[MachineSettings],
    folder: Path | None,
) -> Figures:
    """Measure greedy generation: one measurement, or a table of several."""
    rows = wanted.row_counts()
    use_huge_pages()
    from ..machine.devices import choose
    from .timing import bench_generate, fitting

    prompt, new = fitting(config, wanted.prompt_tokens, wanted.max_tokens)
    if len(rows) == len(machines) == 1 and wanted.rounds is None:
        how = {"rows": rows[0], "prompt_tokens": prompt, "max_tokens": new}
        return bench_generate(config, machines[0], folder=folder, **how)
    if new < 2:
        raise ValueError("max_tokens is 1, but decoding starts at the second: 2 or more are needed")
    long = min(LONG_PROMPT, config.context_length) if wanted.prompt_tokens is None else prompt
    shapes = [*((count, prompt, new) for count in rows or [1, 8]), (1, long, 1)]
    # An impossible dtype fails here, before the first measurement.
    dtypes = [choose(machine).dtype for machine in machines]
    return measure_table(options, dtypes, shapes, wanted.rounds or 1)


def figures_text(found: Figures) -> str:
    """Return one measurement as text, without its tokens, which only programs need."""
    width, lines = max(map(len, found)), []
    for name, value in found.items():
        if isinstance(value, int | float) and value >= 1000:
            value = f"{value:,.0f}"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        if name != "tokens":
            lines.append(f"  {name.replace('_', ' '):<{width}}  {value}")
    return "\n".join(lines)


# -- or a table of several measurements, each in a process of its own


def measure_table(
    options: argparse.Namespace, dtypes: Sequence[str], shapes: Sequence[BatchShape], rounds: int
) -> Figures:
    """Measure every dtype with every shape; return the table and the single measurements."""
    from .timing import alone

    machine = given(options, MachineSettings)
    found: dict[tuple[str, BatchShape], list[Figures]] = {}
    measurements = []
    for round, dtype, shape in product(range(1, rounds + 1), dtypes, shapes):
        rows, prompt, new = shape
        where = f"round {round} of {rounds}: gptsmith, {dtype}, {rows_text(rows)}"
        tell(f"{where}, {prompt} + {new} tokens")
        case = {"dtype": dtype, "rows": rows, "prompt_tokens": prompt, "max_tokens": new}
        figures = alone(options.model, machine | case)
        del figures["tokens"]  # only programs that compare systems need them
        measurements.append({"round": round, "system": "gptsmith", **case, **figures})
        found.setdefault((dtype, shape), []).append(figures)
    table = [
        table_line(dtype, title, name, found[dtype, shape])
        for dtype, (title, shape, name) in product(dtypes, measures(shapes))
    ]
    # The first measurement's figures also stand where scripts expect those of a single one.
    first = found[dtypes[0], shapes[0]][0]
    return {**first, "rounds": rounds, "table": table, "measurements": measurements}


def measures(shapes: Sequence[BatchShape]) -> list[tuple[str, BatchShape, str]]:
    """Return title, shape and figure of each line; the last shape is that of the long prompt."""
    *decodes, prefill = shapes
    first, one = decodes[0], rows_text(decodes[0][0])
    return [
        *((f"decode, {rows_text(s[0])}, tokens/s", s, "decode_tokens_per_second") for s in decodes),
        (f"prefill, {prefill[1]} tokens, tokens/s", prefill, "prefill_tokens_per_second"),
        (f"first token, {one}, prompt of {first[1]}, ms", first, "first_token_milliseconds"),
        (f"peak memory, {one}, MB", first, "peak_memory_megabytes"),
    ]


def table_line(dtype: str, title: str, name: str, figures: Sequence[Figures]) -> Figures:
    """Return one line of the table: a figure over all rounds.

    `ratio` and `differs_from` are null: the JSON once compared with other systems.
    """
    values = [each[name] for each in figures]
    value = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
    return {
        "dtype": dtype,
        "measure": title,
        "system": "gptsmith, compiled" if figures[0]["compiled"] else "gptsmith",
        "value": value,
        "ratio": None,
        "differs_from": None,
    }


def rows_text(rows: int) -> str:
    """Return a number of rows in words: "1 row", "8 rows"."""
    return f"{rows} row{'s' if rows > 1 else ''}"


def table_text(head: str, found: Figures) -> str:
    """Return the table as text, with a legend."""
    tokens = f"{found['prompt_tokens']} + {found['new_tokens']} tokens"
    head = f"{head}, {found['parameters']:,} parameters, greedy, {tokens}"
    threads = count(found["threads"], "thread")
    where = f"on {found['device']}, {threads}, rounds: {found['rounds']}\n"
    rows = [(x["dtype"], x["measure"], x["system"], spread(**x["value"])) for x in found["table"]]
    lines = [("dtype", "measure", "system", "value"), *rows]
    return "\n".join([head, where, *columns(lines, "<<<<"), LEGEND])
