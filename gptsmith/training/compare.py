"""Compare runs: what differs in their settings, and how sure a mean over seeds is.

Knows nothing of how a table is written (`comparison_page.py`). Needs no PyTorch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.fields import suggestion
from ..config.recipe import types_of
from ..config.settings import MachineSettings
from ..evaluation.intervals import Interval, t_interval
from .summary import RunSummary, flat, runs_in, summarize

# Settings that do not change what is learned, but for rounding. All others but the seed tell one
# configuration from another.
WITHOUT_EFFECT = {
    *("compile", "fused", "attention", "threads", "micro_batch", "workers", "shard_tokens"),
    *("log_every", "evaluate_every", "save_every", "keep", "tensorboard", "wandb"),
    *("sample_every", "sample_tokens", "sample_prompt"),
}
CHOSEN_WHEN_OPENED = ("vocab_size", *types_of(MachineSettings))
# The figures of a run: the name in CSV and JSON, the heading in text, and the digits shown.
FIGURES = {
    "best_loss": ("best loss", ".4f"),
    "best_step": ("at step", ",d"),
    "last_loss": ("last loss", ".4f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "accuracy": ("accuracy", ".1%"),
    "training_loss": ("training", ".4f"),
    "tokens": ("tokens", ",d"),
    "seconds": ("seconds", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
HIGHER_IS_BETTER = ("accuracy", "tokens_per_second")
AVERAGED = ("best_loss", "last_loss", "bits_per_byte", "accuracy")  # over seeds


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison."""

    name: str  # the shortest end of its path that tells it from the others
    run: RunSummary
    settings: dict[str, Any]  # those that differ between runs, the seed among them


@dataclass(frozen=True)
class Group:
    """The runs of one configuration, which differ in their seeds only."""

    settings: dict[str, Any]  # those that differ between configurations
    rows: list[ComparedRun]
    seeds: int  # distinct ones among the runs that are finished
    means: dict[str, Interval]  # of AVERAGED; without an interval (NaN) for a single seed


@dataclass(frozen=True)
class Comparison:
    """Runs in the order in which they are shown, and the groups that they form."""

    rows: list[ComparedRun]
    groups: list[Group]
    notes: list[str]  # what makes some figures incomparable

    @property
    def differing(self) -> list[str]:
        """The names of the settings that differ."""
        return list(self.rows[0].settings)

    @property
    def has_seeds(self) -> bool:
        """Whether some runs differ in their seeds only."""
        return any(len(group.rows) > 1 for group in self.groups)


def compare_runs(folders: Iterable[str | Path], *, sort: str = "best_loss") -> Comparison:
    """Compare runs, or the runs in folders; the best first, by a figure or a setting.

    FileNotFoundError for a folder that has no run, ValueError for an unknown `sort`.
    """
    paths = [path for folder in folders for path in runs_in(Path(folder))]
    runs = [summarize(path) for path in {path.resolve(): path for path in paths}.values()]
    names = short_ends([str(run.folder.resolve()) for run in runs])
    settings = comparable_settings(runs)
    differing = [
        name
        for name in settings[0]
        if name not in WITHOUT_EFFECT and len({repr(each[name]) for each in settings}) > 1
    ]
    rows = [
        ComparedRun(name, run, {key: own[key] for key in differing})
        for name, run, own in zip(names, runs, settings, strict=True)
    ]
    check_sort(sort, differing)
    rows.sort(key=lambda row: order(figure_of(row, sort), sort))
    return Comparison(rows, grouped(rows), notes(runs))


def comparable_settings(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """Return the settings of each run by name.

    Some are chosen when a run is opened. Those of runs that never were are taken from another.
    """
    found = [{name: value for _, name, value in flat(run.settings)} for run in runs]
    opened = next((own for own, run in zip(found, runs, strict=True) if run.step), None)
    for own, run in zip(found, runs, strict=True):
        if opened is not None and not run.step:
            own |= {name: opened[name] for name in CHOSEN_WHEN_OPENED}
    return found


def check_sort(sort: str, differing: Sequence[str]) -> None:
    """Raise ValueError unless runs can be sorted by it."""
    known = [*FIGURES, "name", *differing]
    if sort not in known:
        hint = suggestion(sort, known)
        raise ValueError(f"these runs cannot be sorted by '{sort}'{hint} (by {', '.join(known)})")


def figure_of(row: ComparedRun, name: str) -> Any:
    """Return a figure of a run, its name, or one of its settings."""
    if name in FIGURES:
        return getattr(row.run, name)
    return row.name if name == "name" else row.settings[name]


def order(value: Any, name: str) -> tuple[bool, bool, Any]:
    """Return a key to sort by: the best first, and what is unknown last."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True, False, 0
    if isinstance(value, int | float):
        return False, False, -value if name in HIGHER_IS_BETTER else value
    return False, True, str(value)


def grouped(rows: Sequence[ComparedRun]) -> list[Group]:
    """Form groups of runs whose settings are the same but for the seed; the order is kept."""
    groups: dict[str, list[ComparedRun]] = {}
    for row in rows:
        own = {name: value for name, value in row.settings.items() if name != "seed"}
        groups.setdefault(repr(own), []).append(row)
    return [group_of(members) for members in groups.values()]


def group_of(rows: list[ComparedRun]) -> Group:
    """Average the finished runs of a configuration; two runs of a seed are the same run."""
    finished = {row.run.settings.training.seed: row for row in rows if row.run.state == "finished"}
    means = {}
    for name in AVERAGED:
        found = [getattr(row.run, name) for row in finished.values()]
        values = np.array([value for value in found if value is not None], np.float64)
        if len(values) > 1:
            means[name] = t_interval(values)
        elif len(values):
            means[name] = Interval(float(values[0]), math.nan, math.nan)
    settings = {name: value for name, value in rows[0].settings.items() if name != "seed"}
    return Group(settings, rows, len(finished), means)


def notes(runs: Sequence[RunSummary]) -> list[str]:
    """Return what has to be known to read the figures."""
    found = []
    if len({run.settings.finetune.task for run in runs}) > 1:
        found.append("Losses of different tasks have different units: do not compare them.")
    elif len({(run.settings.data.data, run.settings.data.tokenizer) for run in runs}) > 1:
        found.append(
            "The runs differ in data or tokenizer: compare bits per byte of the same text only."
        )
    if len({run.settings.report.evaluate_tokens for run in runs}) > 1:
        found.append("The runs were evaluated on different parts of the validation split.")
    unfinished = sum(run.state != "finished" for run in runs)
    if unfinished and len(runs) > 1:
        found.append(f"{unfinished} of {len(runs)} runs did not finish; no mean includes them.")
    return found


def short_ends(paths: Sequence[str]) -> list[str]:
    """Return the shortest ends that tell paths apart: "a" and "b" for runs/a and runs/b."""
    parts = [Path(path).parts for path in paths]
    for length in range(1, max(map(len, parts))):
        ends = ["/".join(each[-length:]) for each in parts]
        if len({*ends}) == len({*paths}):
            return ends
    return list(paths)
