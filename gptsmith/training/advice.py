"""What to type next: commands that start another run from a run's settings and weights.

Each can be pasted into a shell, whatever the folders are called. Knows nothing of how they run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.finding import checkpoints
from ..config.recipe import read_toml
from ..config.settings import RunSettings, TrainingSettings
from ..data.shards import is_dataset
from ..machine.shell import typed
from .records import CONFIG_TOML
from .rollback import LEFT_OUT
from .schedules import learning_rate


def train_command(
    folder: Path, flags: Mapping[str, float], *, start_from: Path | None = None
) -> str:
    """Return the command that trains with a run's settings and data, and with these flags."""
    words = ["gptsmith", "train", folder / CONFIG_TOML]
    if start_from is not None:
        words += ["--from", start_from]
    if is_dataset(folder / "data"):
        words += ["--data", folder / "data"]
    for name, value in flags.items():
        words += [
            "--" + name.replace("_", "-"),
            f"{value:.2g}" if isinstance(value, float) else value,
        ]
    return typed(*words)


def resume_command(folder: Path) -> str:
    """Return the command that resumes a run."""
    return typed("gptsmith", "train", "--resume", folder)


def more_steps(folder: Path, training: TrainingSettings, steps: int) -> str:
    """Return the command that trains a run's weights for so many steps in another run.

    Its adapters are merged first, as another run with the same settings adds its own.
    """
    flags: dict[str, float] = {"steps": steps}
    if training.warmup_steps >= steps:
        flags["warmup_steps"] = steps // 10
    if read_toml(folder / CONFIG_TOML).finetune.lora is None:
        return train_command(folder, flags, start_from=folder)
    merge = typed("gptsmith", "merge", folder, folder / "merged")
    return f"{merge} && {train_command(folder, flags, start_from=folder / 'merged')}"


def compare_command(folder: Path, settings: RunSettings) -> str:
    """Return the command that compares another model, OTHER, with a run's on the run's data."""
    data = folder / "data" if is_dataset(folder / "data") else settings.data.data
    words = ["gptsmith", "evaluate", "OTHER", "--data", data, "--against", folder]
    return typed(*words)


def may_become_longer(training: TrainingSettings, steps: int, done: int) -> bool:
    """Whether a run could have been one of so many steps from the beginning.

    So it is if the steps that are done would have had the same learning rates. Cosine decay depends
    on the number of steps from the beginning.
    """
    longer = replace(training, steps=steps)
    return training.schedule != "cosine" and all(
        learning_rate(step, training) == learning_rate(step, longer) for step in range(done)
    )


# -- after a run that went wrong


def uniform_loss(settings: RunSettings) -> float:
    """Return the loss of a model that takes every token to be equally likely, in nats."""
    return math.log(settings.model.vocab_size)


def lower_rates(training: TrainingSettings) -> dict[str, float]:
    """Return the flags for a third of a run's learning rates."""
    rates = {"learning_rate": training.learning_rate / 3}
    if training.min_learning_rate is not None:  # or it could be above the peak
        rates["min_learning_rate"] = training.min_learning_rate / 3
    if training.optimizer == "muon":
        rates["muon_learning_rate"] = training.muon_learning_rate / 3
    return rates


def after_spike(folder: Path, done: int) -> str:
    """Return what to do after a run has stopped before a spike."""
    return (
        f"the run is saved after step {done:,}: go on without the step's update by "
        f"`{resume_command(folder)} --on-spike skip`, or without {LEFT_OUT} batches by "
        "--on-spike rollback"
    )


def after_divergence(
    folder: Path, settings: RunSettings, records: Sequence[Mapping[str, Any]]
) -> str:
    """Return what to do after a run has diverged, by its checkpoints and records."""
    rates = lower_rates(settings.training)
    for path in checkpoints(folder):
        loss = loss_of(int(path.name.removeprefix("step-")), records)
        if loss is not None and loss < uniform_loss(settings):
            command = train_command(folder, rates, start_from=path)
            return f"the last good checkpoint is {path}: start a run from it with `{command}`"
    command = train_command(folder, rates)
    return f"no checkpoint is known to be better than a uniform guess: start again with `{command}`"


def loss_of(step: int, records: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the loss of the model after a step: its validation loss, or the next step's loss."""
    by_step = {record["step"]: record for record in records}
    validation_loss = by_step.get(step, {}).get("validation_loss")
    return by_step.get(step + 1, {}).get("loss") if validation_loss is None else validation_loss
