"""A sweep on disk: the settings that it tries, a folder for each run, and how far it has come.

Knows nothing of processes (`sweeping.py`). A sweep is a folder with `sweep.json`, `base.toml` (the
settings that all runs share) and a folder for each run, from the first moment on: of every run that
has not begun there is the config.toml.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from ..config.fields import SettingError, suggestion
from ..config.recipe import (
    parse_value,
    read_toml,
    run_settings,
    sections,
    to_toml,
    types_of,
    without_none,
)
from ..config.settings import PrepareSettings, RunSettings
from ..data.shards import is_dataset
from ..machine.files import DamagedError, read_json, write_text, written_whole
from ..machine.terminal import Display
from .halving import Speed, last_step
from .records import CONFIG_TOML, METRICS, read_metrics
from .summary import last_event
from .text import open_data, wanted_tokenizer
from .train import with_lasting_paths

SWEEP, BASE = "sweep.json", "base.toml"
FORMAT = {"format": "gptsmith-sweep", "version": 1}
BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}

Values = dict[str, Any]  # settings by name


@dataclass
class Sweep:
    """What a sweep tries, and how far it has come; `sweep.json` has these fields."""

    set: dict[str, list[Any]]  # the values of each setting, whose product is the grid
    seeds: int
    budget: float | None  # seconds
    runs: dict[str, Values]  # what each run sets, the seed too, by the name of its folder
    done: dict[str, float] = field(default_factory=dict)  # the fraction of each run's steps
    halvings: int | None = None  # None until the first run was measured
    kept: list[list[str]] = field(default_factory=list)  # the runs of each rung that has begun
    overhead: float | None = None  # seconds of a run's process besides its steps, as measured
    spent: float = 0.0  # seconds that the processes of all runs took

    def configurations(self, names: Sequence[str]) -> dict[str, list[str]]:
        """Return the runs of each configuration, which differ in their seeds only."""
        found: dict[str, list[str]] = {}
        for name in names:
            own = {key: value for key, value in self.runs[name].items() if key != "seed"}
            found.setdefault(json.dumps(own), []).append(name)
        return found

    def save(self, folder: Path) -> None:
        """Write `sweep.json`, completely or not at all."""
        write_text(folder / SWEEP, json.dumps({**FORMAT, **asdict(self)}, indent=2) + "\n")


# -- from the words of the command line


def parse_sets(words: Sequence[str]) -> dict[str, list[Any]]:
    """Return the values of each setting from words such as "learning_rate=1e-3,3e-3".

    ValueError for a word of another form, an unknown setting, a value that it cannot have, or what
    is named twice.
    """
    found: dict[str, list[Any]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        name = {"from": "start_from"}.get(name, name.replace("-", "_"))
        if not equals or not name or not all(values.split(",")):
            raise SettingError("set", f"is '{word}': NAME=VALUE,VALUE is needed")
        if name in found:
            raise SettingError("set", f"names {name} twice: put all its values into one")
        found[name] = [typed(name, value) for value in values.split(",")]
        for value in found[name]:
            if found[name].count(value) > 1:
                raise SettingError("set", f"has {name} {value} twice: leave one out")
    return found


def typed(name: str, word: str) -> Any:
    """Return a word as a value of a setting; ValueError for an unknown one or a wrong value."""
    types = {key: hint for kind in sections().values() for key, hint in types_of(kind).items()}
    if name not in types:
        raise ValueError(f"there is no setting '{name}'{suggestion(name, types)}")
    if without_none(types[name]) is bool:
        return parse_value(name, BOOLEANS.get(word.lower(), word), types[name])
    return parse_value(name, word, types[name])


def plan_sweep(
    what: str | None,
    flags: Mapping[str, Any],
    sets: Mapping[str, list[Any]],
    seeds: int,
    budget: float | None,
) -> tuple[Sweep, RunSettings, dict[str, RunSettings], str]:
    """Return a sweep, the settings that its runs share, those of each run, and a name.

    The runs are the product of the values, and of `seeds` seeds from the settings' own on; all
    configurations have the first seed before any has the second. SettingError where a combination
    is impossible.
    """
    for name in sets:
        if name in flags:
            raise SettingError("set", f"names {name}, which has a flag too: leave one out")
    if "seed" in sets and seeds > 1:
        raise SettingError("seeds", "cannot go with --set seed: leave one out")
    if "steps" in {**flags, **sets} and "epochs" not in sets:
        flags = {**flags, "epochs": None}  # which would set the steps of fine-tuning
    base, name = run_settings(what, flags)
    if budget is not None and (base.finetune.epochs is not None or "epochs" in sets):
        raise SettingError("budget", "needs runs of as many steps, not epochs: add --steps N")
    first = base.training.seed
    combinations = [
        dict(zip(sets, each, strict=True)) for each in itertools.product(*sets.values())
    ]
    tried: list[Values] = [
        {"seed": seed, **combination}
        for seed in range(first, first + seeds)
        for combination in combinations
    ]
    digits = max(2, len(str(len(tried))))
    named = {f"{number:0{digits}}": values for number, values in enumerate(tried, 1)}
    settings = {
        run: with_lasting_paths(run_settings(what, {**flags, **values})[0])
        for run, values in named.items()
    }
    sweep = Sweep(dict(sets), seeds, budget, named)
    return sweep, with_lasting_paths(base), settings, name


# -- the folder


def make_sweep(
    folder: Path,
    sweep: Sweep,
    base: RunSettings,
    settings: Mapping[str, RunSettings],
    display: Display,
) -> None:
    """Make the folder of a sweep, completely or not at all; its text is prepared for all runs."""
    shared = folder.resolve() / "data" if shares_data(sweep, base) else None
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        with written_whole(folder, manifest=False) as temporary:
            if shared is not None:
                open_data(temporary, base, wanted_tokenizer(base, None), display, moved=False)
            write_text(temporary / BASE, to_toml(base))
            sweep.save(temporary)
            for run, each in settings.items():
                if shared is not None:
                    each = replace(each, data=replace(each.data, data=str(shared)))
                (temporary / run).mkdir()
                write_text(temporary / run / CONFIG_TOML, to_toml(each))
    except BaseException:
        for parent in new_parents:
            if parent.exists():
                parent.rmdir()
        raise


def shares_data(sweep: Sweep, base: RunSettings) -> bool:
    """Whether the text of all runs is prepared once: none has its own text or tokenizer."""
    own = {"data", "tokenizer", "start_from", *types_of(PrepareSettings)}
    source, task = base.data.data, base.finetune.task
    prepared = source is None or is_dataset(Path(source))
    return not prepared and task in (None, "text") and not own & {*sweep.set}


def same_sweep(folder: Path, sweep: Sweep, base: RunSettings) -> bool:
    """Whether a folder has the sweep of the same command."""
    before = read_sweep(folder)
    same = all(getattr(before, name) == getattr(sweep, name) for name in ("runs", "budget"))
    return same and (folder / BASE).read_text(encoding="utf-8") == to_toml(base)


def read_sweep(folder: Path) -> Sweep:
    """Read the sweep in a folder; FileNotFoundError if there is none, DamagedError if edited."""
    path = folder / SWEEP
    if not path.is_file():
        missing = f"has no {SWEEP}, so it is not the folder of a sweep"
        raise FileNotFoundError(
            f"{folder} {missing}" if folder.is_dir() else f"{folder} is missing"
        )
    values = read_json(path)
    if {key: values.pop(key, None) for key in FORMAT} != FORMAT:
        raise DamagedError(f"{path} is not a sweep of this version")
    try:
        return Sweep(**values)
    except TypeError as error:
        raise DamagedError(f"{path} lacks a part of a sweep: was it edited?") from error


def settings_of(folder: Path, sweep: Sweep) -> dict[str, RunSettings]:
    """Return the settings of each run, with the vocabulary that the data was found to have."""
    found = {run: read_toml(folder / run / CONFIG_TOML) for run in sweep.runs}
    vocabulary = min(each.model.vocab_size for each in found.values())
    return {
        run: replace(each, model=replace(each.model, vocab_size=vocabulary))
        for run, each in found.items()
    }


# -- what the runs have shown so far


def losses(folder: Path, sweep: Sweep, names: Sequence[str], fraction: float) -> dict[str, float]:
    """Return the validation loss of each configuration at a fraction of its steps.

    It is the mean over its seeds; infinite where one of them has none there.
    """
    settings = settings_of(folder, sweep)
    return {
        key: mean(loss_at(folder / run, last_step(settings[run], fraction)) for run in runs)
        for key, runs in sweep.configurations(names).items()
    }


def loss_at(run: Path, step: int) -> float:
    """Return a run's validation loss at a step; infinity where it has none."""
    records = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    found = [record.get("validation_loss") for record in records if record["step"] == step]
    return math.inf if not found or found[0] is None else found[0]


def speeds(folder: Path, sweep: Sweep) -> dict[str, Speed]:
    """Return the speed of each run, as measured when it was last opened, or as estimated by the
    first one that was; empty where none was."""
    settings, found = settings_of(folder, sweep), {}
    for run, own in settings.items():
        event = last_event(folder / run, "started", "resumed")
        steps = own.training.steps
        left = steps - event.get("step", steps)
        if left and sweep.overhead is not None:
            found[run] = Speed(sweep.overhead, event["seconds_left"] * steps / left)
    if not found:
        return {}
    first = next(iter(found))
    return {
        run: found.get(run) or found[first].scaled(settings[first], own)
        for run, own in settings.items()
    }
