"""Resume a run: its newest checkpoint, and what may differ from what that checkpoint records.

Knows nothing of models or of how data is opened (`start.py`).
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..checkpoint.adapter_json import is_adapter
from ..checkpoint.config_json import from_hugging_face, to_hugging_face
from ..checkpoint.finding import checkpoints, find_checkpoint
from ..checkpoint.folder import read_config
from ..checkpoint.training_state import STATE, load_training
from ..config.classifier import without_labels
from ..config.fields import SettingError
from ..config.model import GPTConfig
from ..config.recipe import read_toml, sections, with_overrides
from ..config.settings import DataSettings, ReportSettings, RunSettings, TrainingSettings
from ..machine.files import DamagedError
from .advice import may_become_longer, more_steps
from .records import CONFIG_TOML
from .task import Task

AT_THE_START: Mapping[str, Any] = {
    "step": 0,
    "seconds": 0.0,
    "best": {},
    "micro_batch": None,
    "owed": [],
}

CHANGEABLE = ("machine", "report")  # sections that may change on resume; events.jsonl records it
# Settings that may change too. The data is compared by its contents, wherever it lies; how fresh
# weights are drawn and how many threads encode text does not matter any more. What a spike leads to
# may be decided when there is one.
MAY_CHANGE = ("data", "init", "workers", "on_spike", "rollback_rate")


def newest_state(folder: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """Return a run's newest intact checkpoint and its state; None and AT_THE_START without one.

    A warning names newer ones that are damaged; the run will write them again.
    """
    if not checkpoints(folder):
        return None, AT_THE_START
    path = find_checkpoint(folder, checkpoints(folder)[0].name, training=True)
    state = load_training(path)[1]
    complete = isinstance(state.get("step"), int) and isinstance(state.get("micro_batch"), int)
    if not complete or not isinstance(state.get("best"), dict):
        raise DamagedError(f"{path / STATE} lacks the state of a run: was it edited?")
    return path, {**AT_THE_START, **state}


def resumed_settings(
    folder: Path, checkpoint: Path | None, state: Mapping[str, Any], choices: Mapping[str, Any]
) -> tuple[RunSettings, dict[str, str]]:
    """Return the settings to go on with, and those that differ from the checkpoint's, by name.

    They are those of config.toml, with `choices` in their place. ValueError where one differs that
    may not. Settings that the checkpoint does not record, as it is older than they are, may be any.
    """
    in_file = read_toml(folder / CONFIG_TOML)
    machine = in_file.machine  # the GPU's memory may have reduced its micro-batch during the run
    machine = replace(machine, micro_batch=state["micro_batch"] or machine.micro_batch)
    in_file = replace(in_file, machine=machine)
    settings = with_overrides(in_file, choices)
    if "data" in choices:
        settings = replace(settings, data=with_absolute_data(settings.data))
    settings = replace(settings, report=with_absolute_files(settings.report))
    recorded, asked = state.get("settings") or as_recorded(in_file), as_recorded(settings)
    if checkpoint is not None:  # both as in a model's folder, which has one way to say a thing
        recorded["model"] = asdict(recorded_model(checkpoint, recorded))
        asked["model"] = asdict(from_hugging_face(to_hugging_face(settings.model)))
    differing = {}
    for section in sections():
        for name, before in recorded.get(section, {}).items():
            after = asked[section].get(name, before)
            if after == before:
                continue
            if name == "steps":
                check_steps(folder, settings.training, before, state["step"])
            elif section not in CHANGEABLE and name not in MAY_CHANGE:
                raise contradiction(folder, name, before, after, chosen=name in choices)
            differing[name] = str(after)
    return settings, differing


def recorded_model(checkpoint: Path, recorded: Mapping[str, Any]) -> GPTConfig:
    """Return the configuration of a checkpoint's model, without labels, which are the data's.

    An adapter has none of its own; that of its base may have another dropout.
    """
    if is_adapter(checkpoint):
        return from_hugging_face(to_hugging_face(GPTConfig(**recorded["model"])))
    return without_labels(read_config(checkpoint))


def with_absolute_data(data: DataSettings) -> DataSettings:
    """Return data settings whose path, if it exists, does not depend on the current folder."""
    return data if data.data is None else replace(data, data=absolute(data.data))


def with_absolute_files(report: ReportSettings) -> ReportSettings:
    """Return report settings whose files, if they exist, do not depend on the current folder."""
    return replace(report, evaluate_tasks=tuple(map(absolute, report.evaluate_tasks)))


def absolute(name: str) -> str:
    """Return the absolute path of a file or folder; a name of none as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def as_recorded(settings: RunSettings) -> dict[str, Any]:
    """Return settings as a checkpoint records them: in JSON, which has lists for tuples."""
    return json.loads(json.dumps(asdict(settings)))


def contradiction(folder: Path, name: str, before: Any, after: Any, *, chosen: bool) -> ValueError:
    """Return the error for a setting that may not differ from the checkpoint's."""
    if chosen:
        problem = f"{after} contradicts the run, which has {before}: leave it out"
        return SettingError(name, f"{problem}, or start another run")
    return ValueError(
        f"{folder / CONFIG_TOML} has {name} {after}, but the run has learned with {before}: change "
        "it back, or start another run"
    )


def check_steps(folder: Path, training: TrainingSettings, before: int, done: int) -> None:
    """Raise SettingError if a run of `before` steps cannot become one of `training.steps`."""
    problem = f"{training.steps} contradicts the run, which has"
    if training.steps < done:
        raise SettingError("steps", f"{problem} done {done} already: give at least {done}")
    if not may_become_longer(replace(training, steps=before), training.steps, done):
        why = "a cosine schedule" if training.schedule == "cosine" else "begun to decay"
        raise SettingError(
            "steps",
            f"{problem} {before} and {why}: train its weights for longer in another run with "
            f"`{more_steps(folder, training, max(1, training.steps - done))}`",
        )


def check_same_data(folder: Path, task: Task, state: Mapping[str, Any], moved: bool) -> None:
    """Raise ValueError if a run's data is not what its checkpoint was trained on.

    A checkpoint of an older version does not record its data: a warning says so if it `moved`.
    """
    if not state["step"]:
        return
    if "data" not in state and moved:
        warnings.warn(
            f"{folder} does not record what its data was, so {task.folder} is not compared with it",
            stacklevel=2,
        )
    recorded = state.get("data", task.identity)
    parts = [part for part, value in task.identity.items() if recorded.get(part) != value]
    differs = f"it has another {' and '.join(parts)}" if parts else task.damage()
    if not differs:
        return
    if task.folder == folder / "data":
        cure = "remove that folder, and the text is prepared again"
    else:
        cure = "name the place of that data with --data"
    raise ValueError(
        f"{task.folder} is not the data that {folder} was trained on ({differs}): {cure}, or "
        "start another run"
    )
