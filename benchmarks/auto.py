"""Is what is automatic the fastest? Every way to train a model, and what is chosen, in turn.

    python benchmarks/auto.py                           five models, from 2x96 to 124M
    python benchmarks/auto.py --models 4x192 --rounds 5

The ways are those of `gptsmith train`: precision, attention or the fused pieces, and micro-batch.
Each model is one trainer, whose whole steps (forward, backward and update) are timed in every way
in turn; so is *auto*, the way that is chosen for a long run without anything remembered. The table
has medians over the rounds, after a step that warms up; *of the best* is the time of the fastest
way divided by that of auto.
"""

import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import Results, Row, carry_out, parser

from gptsmith.cli.timing import LONG_RUN, fresh_trainer
from gptsmith.config.model import MODERN, GPTConfig
from gptsmith.config.settings import MachineSettings
from gptsmith.config.tables import columns
from gptsmith.machine import devices
from gptsmith.training.choices import choose_ways, possible, sizes, ways
from gptsmith.training.loop import Trainer
from gptsmith.training.trainer import use

SMALL: dict[str, Any] = {"vocab_size": 65, "bias": False}
# By name: the model, and the rows of a step.
MODELS: dict[str, tuple[GPTConfig, int]] = {
    "2x96": (GPTConfig(**SMALL, n_layer=2, n_head=3, n_embd=96, context_length=64), 24),
    "4x192": (GPTConfig(**SMALL, n_layer=4, n_head=4, n_embd=192, context_length=128), 32),
    "6x384": (GPTConfig(**SMALL, n_layer=6, n_head=6, n_embd=384, context_length=256), 16),
    "124M": (GPTConfig(bias=False), 2),
    "modern": (
        GPTConfig(
            **SMALL | MODERN, n_layer=4, n_head=4, n_embd=192, context_length=128, tie_weights=False
        ),
        32,
    ),
}
WITHIN = 0.07  # of the fastest: what is promised


def all_ways(trainer: Trainer, machine: MachineSettings) -> dict[str, MachineSettings]:
    """Every way that may be chosen, by name."""
    config, rows = trainer.model.config, trainer.batches.rows
    found = {}
    for name, way in ways(machine, config, rows, trainer.device).items():
        on_cpu = trainer.device.type == "cpu"
        each = sizes(way, config.context_length) if on_cpu else {f"{way.micro_batch} rows": way}
        found |= {f"{name}, {size}": sized for size, sized in each.items()}
    return found


def measure(name: str, machine: MachineSettings, rounds: int, results: Results) -> None:
    """Time a step of a model in every way, and in the way that is chosen, in turn."""
    config, rows = MODELS[name]
    trainer = fresh_trainer(
        config,
        replace(machine, dtype="float32", attention="kernel", fused="no"),
        rows=rows,
        steps=LONG_RUN,
    )
    machine = possible(devices.choose_to_learn(machine), config, trainer.device)
    started = time.perf_counter()
    auto, _ = choose_ways(trainer, machine, LONG_RUN)
    seconds = time.perf_counter() - started
    every = all_ways(trainer, machine)
    chosen = next(way for way, settings in every.items() if settings == auto)
    results.add({"model": name, "chosen": chosen, "choosing_seconds": seconds})
    for round in range(rounds + 1):
        for way, settings in {**every, "auto": auto}.items():
            use(trainer, settings)
            step = trainer.step(round).seconds
            if round:
                results.add({"model": name, "way": way, "round": round, "step_seconds": step})


def table_of(rows: list[Row]) -> list[Row]:
    """A row for each model that was measured whole: what was chosen, and what was fastest."""
    table = []
    for head in (row for row in rows if "chosen" in row):
        steps: dict[str, list[float]] = {}
        for row in rows:
            if row["model"] == head["model"] and "way" in row:
                steps.setdefault(row["way"], []).append(row["step_seconds"])
        if "auto" not in steps:
            continue
        medians = {way: statistics.median(each) for way, each in steps.items()}
        auto = medians.pop("auto")
        best = min(medians, key=medians.__getitem__)
        slowest = max(medians.values())
        config, batch = MODELS[head["model"]]
        found = {"fastest": best, "of_the_best": medians[best] / auto, "of_the_slowest": slowest}
        tokens = batch * config.context_length
        table.append({**head, **found, "tokens_per_second": tokens / auto, "seconds": auto})
    return table


def render(table: list[Row]) -> str:
    """The table in Markdown, and whether the promise holds."""
    titles = ("model", "chosen", "tokens/s", "fastest of all ways", "of the best", "times slowest")
    lines = [
        (
            row["model"],
            f"{row['chosen']} (in {row['choosing_seconds']:.1f} s)",
            f"{row['tokens_per_second']:,.0f}",
            row["fastest"],
            f"{row['of_the_best']:.1%}",
            f"{row['of_the_slowest'] / row['seconds']:.2f}",
        )
        for row in table
    ]
    kept = all(row["of_the_best"] >= 1 - WITHIN for row in table)
    verdict = f"auto is {'' if kept else 'not '}within {WITHIN:.0%} of the fastest in every model"
    return "\n".join([*columns([titles, *lines], "<<><>>"), "", verdict])


def main() -> None:
    """Measure the models that are named, and show the table."""
    known = parser(__doc__)
    known.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    known.add_argument("--rounds", type=int, default=3, help="of all ways (default: 3)")
    known.add_argument("--device", default="auto")
    known.add_argument("--threads", type=int)
    options = known.parse_args()
    if options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}: at least 1 is needed")
    machine = MachineSettings(device=options.device, threads=options.threads, compile="no")
    results = Results(Path(options.out))
    with tempfile.TemporaryDirectory() as nothing_remembered:
        os.environ["XDG_CACHE_HOME"] = nothing_remembered
        for name in options.models:
            measure(name, machine, options.rounds, results)
            rows = [row for row in results.rows if row["model"] == name]
            print(render(table_of(rows)), flush=True)
    if len(options.models) > 1:
        print("\n" + render(table_of(results.rows)))


if __name__ == "__main__":
    carry_out(main)
