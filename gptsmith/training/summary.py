"""What became of a run, read from its folder: its settings, its state and its figures.

Needs no PyTorch, and writes nothing.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..checkpoint.config_json import from_hugging_face, to_hugging_face
from ..config.recipe import read_toml, sections
from ..config.settings import RunSettings
from .records import CONFIG_TOML, EVENTS, METRICS, read_metrics

LOCK = ".lock"  # in a run's folder, held by the process that trains it
LAST_SHARE = 0.1  # of the steps, over which the training loss is averaged


@dataclass(frozen=True)
class RunSummary:
    """One run, whatever became of it; a figure that it does not have is None."""

    folder: Path
    settings: RunSettings
    state: str  # finished, running, stopped, failed or waiting (no step is recorded)
    error: str | None  # of a run that failed
    step: int  # the last that is recorded
    best_loss: float | None  # the lowest validation loss; the unit is that of the run's task
    best_step: int | None
    last_loss: float | None  # the last validation loss; NaN where it was not finite
    bits_per_byte: float | None  # at the best step
    accuracy: float | None  # at the best step, of runs that learn labels or preferences
    training_loss: float | None  # mean over the last tenth of the steps
    tokens: int
    seconds: float | None  # of training steps, without evaluation

    @property
    def tokens_per_second(self) -> float | None:
        """The mean speed of the steps."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def outcome(self) -> str:
        """The state in words: "finished", "stopped at step 40 of 120"."""
        if self.state == "finished":
            return "finished"
        at = f" at step {self.step:,} of {self.settings.training.steps:,}" if self.step else ""
        return f"{self.state}{at}" + (f": {self.error}" if self.error else "")


def summarize(folder: Path) -> RunSummary:
    """Summarize a run. FileNotFoundError if the folder is none, ValueError if it is damaged."""
    if not (folder / CONFIG_TOML).is_file():
        missing = "has no config.toml" if folder.is_dir() else "is not there"
        raise FileNotFoundError(f"{folder} {missing}: the folder of a run is needed")
    settings = read_toml(folder / CONFIG_TOML)
    records = read_metrics(folder / METRICS) if (folder / METRICS).is_file() else []
    step = records[-1]["step"] if records else 0
    state, error = state_of(folder, finished=step >= settings.training.steps)
    evaluated = [record for record in records if "validation_loss" in record]
    finite = [record for record in evaluated if record["validation_loss"] is not None]
    best = min(finite, key=lambda record: record["validation_loss"], default={})
    last = evaluated[-1]["validation_loss"] if evaluated else None
    ends = records[-1] if records else {}
    return RunSummary(
        folder=folder,
        settings=settings,
        state="waiting" if state == "stopped" and not step else state,
        error=error,
        step=step,
        best_loss=best.get("validation_loss"),
        best_step=best.get("step"),
        last_loss=math.nan if evaluated and last is None else last,
        bits_per_byte=best.get("bits_per_byte"),
        accuracy=best.get("validation_accuracy"),
        training_loss=mean_loss(records),
        tokens=ends.get("tokens", step * settings.training.batch_tokens),
        seconds=ends.get("seconds"),
    )


def mean_loss(records: Sequence[dict[str, Any]]) -> float | None:
    """Return the mean training loss of the last steps; None where none is finite."""
    last = records[-max(1, round(LAST_SHARE * len(records))) :]
    losses = [record["loss"] for record in last if record.get("loss") is not None]
    return sum(losses) / len(losses) if losses else None


def state_of(folder: Path, *, finished: bool) -> tuple[str, str | None]:
    """Return finished, running, failed (and the error) or stopped."""
    if is_training(folder):
        return "running", None
    if finished:
        return "finished", None
    last = last_event(folder)
    if last.get("event") == "failed":
        return "failed", str(last.get("error"))
    return "stopped", None


def is_training(folder: Path) -> bool:
    """Whether a process trains the run: it holds the lock in the folder."""
    lock = folder / LOCK
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # it may only be read by us
        return False


def last_event(folder: Path, *kinds: str) -> dict[str, Any]:
    """Return a run's newest event, of some kinds or of any; {} if there is none.

    A line that is cut short, as a killed process leaves, is none.
    """
    path = folder / EVENTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in reversed(lines):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and (not kinds or event.get("event") in kinds):
            return event
    return {}


def runs_in(folder: Path) -> list[Path]:
    """Return the folder if it is a run, or the runs in it, by name.

    FileNotFoundError if there are none.
    """
    if (folder / CONFIG_TOML).is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob(f"*/{CONFIG_TOML}"))
    if not inside:
        missing = "has no config.toml, nor has a folder in it" if folder.is_dir() else "is missing"
        raise FileNotFoundError(f"{folder} {missing}: a run, or a folder of runs, is needed")
    return inside


def flat(settings: RunSettings) -> Iterator[tuple[str, str, Any]]:
    """Yield each setting: its section, its name and its value.

    The model's are as a checkpoint has them, which has one way to say a thing.
    """
    model = from_hugging_face(to_hugging_face(settings.model))
    settings = replace(settings, model=replace(model, init=settings.model.init))
    for section in sections():
        for name, value in asdict(getattr(settings, section)).items():
            yield section, name, value
