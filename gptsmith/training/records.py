"""The records of a run: metrics.jsonl, events.jsonl, samples.md, and other loggers.

Knows nothing of models.
"""

import json
import math
import os
import re
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config.settings import RunSettings
from ..machine.files import write_text
from .curves import Record, draw_curves

CONFIG_TOML = "config.toml"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SAMPLES = "samples.md"
LOSS_PLOT = "loss.png"
PLOT_INTERVAL = 50  # times the time that a plot took, at least, from one to the next


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl, one per step.

    A last line without its newline, as a killed process leaves, is dropped. ValueError for a line
    that is not a record.
    """
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not is_record(record):
            raise ValueError(f"{path}, line {number} is not the record of a step: remove it")
        records.append(record)
    return records


def is_record(value: Any) -> bool:
    """Whether a JSON value is the record of a step."""
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        return False
    losses = (value.get("loss"), value.get("validation_loss"))
    return all(loss is None or isinstance(loss, int | float) for loss in losses)


def write_event(folder: Path, event: str, **details: Any) -> None:
    """Append a line to events.jsonl, which has everything but the steps."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), **details})
    with (folder / EVENTS).open("a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")


def write_sample(folder: Path, step: int, text: str) -> None:
    """Append a sample of generated text."""
    quoted = "\n".join(f"> {line}" for line in text.splitlines())
    with (folder / SAMPLES).open("a", encoding="utf-8", newline="\n") as file:
        file.write(f"## step {step}\n\n{quoted}\n\n")


def cut_samples(folder: Path, done: int) -> None:
    """Drop the samples of steps after the one that the run resumes from."""
    path, kept = folder / SAMPLES, ""
    if path.is_file():
        for sample in re.split(r"(?m)^(?=## step \d+$)", path.read_text(encoding="utf-8")):
            head = re.match(r"## step (\d+)\n", sample)
            kept += sample if head is None or int(head[1]) <= done else ""
        write_text(path, kept)


def last_sample(folder: Path) -> str:
    """Return the lines of the newest sample, indented; empty if there is none."""
    path = folder / SAMPLES
    if not path.is_file():
        return ""
    newest = path.read_text(encoding="utf-8").rpartition("\n## step ")[2].partition("\n")[2]
    lines = [line.removeprefix(">").removeprefix(" ") for line in newest.strip().splitlines()]
    return "\n".join("  " + line for line in lines)


class Recorder:
    """Appends to metrics.jsonl, one record per step, draws loss.png, and tells the watchers."""

    def __init__(self, folder: Path, records: list[dict[str, Any]], watchers: "Watchers") -> None:
        self.folder, self.records, self.watchers = folder, records, watchers
        self.file = (folder / METRICS).open("a", encoding="utf-8", newline="\n")
        self.draw_after = 0.0  # by time.monotonic

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; JSON has no infinity or NaN, so these become null."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self.records.append(clean)
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()
        self.watchers.add(record)

    def complete_last(self, fields: Record) -> None:
        """Add fields to the last record."""
        self.records[-1] |= fields
        self.file.close()
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        write_text(self.folder / METRICS, text)
        self.file = (self.folder / METRICS).open("a", encoding="utf-8", newline="\n")

    def draw(self, *, always: bool) -> None:
        """Draw the loss curves, unless that would take a large share of the run's time."""
        started = time.monotonic()
        drawable = any(record["loss"] is not None for record in self.records)
        if drawable and (always or started >= self.draw_after):
            with suppress(PermissionError):  # on Windows, of a viewer that shows the last one
                draw_curves({self.folder.name: self.records}, self.folder / LOSS_PLOT)
            self.draw_after = started + PLOT_INTERVAL * (time.monotonic() - started)

    def flush(self) -> None:
        """Make sure that every record is on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush and close the file, and the watchers."""
        self.flush()
        self.file.close()
        self.watchers.close()


class Watchers:
    """Logs to TensorBoard and Weights & Biases, where the settings ask for them.

    ImportError where one of them is not installed.
    """

    def __init__(self, folder: Path, settings: RunSettings) -> None:
        self.writer: Any = None
        self.wandb_run: Any = None
        if settings.report.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "--tensorboard needs an extra: pip install 'gptsmith[tensorboard]'"
                ) from error
            self.writer = SummaryWriter(str(folder / "tensorboard"))
        if settings.report.wandb:
            try:
                import wandb
            except ImportError as error:
                raise ImportError(
                    "--wandb needs an extra: pip install 'gptsmith[wandb]'"
                ) from error
            self.wandb_run = wandb.init(
                project=settings.report.wandb,
                name=folder.name,
                dir=str(folder),
                config=asdict(settings),
            )

    def add(self, record: Record) -> None:
        """Log the numbers of a step."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, record["step"])
        if self.wandb_run is not None:
            self.wandb_run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Close the logs."""
        if self.writer is not None:
            self.writer.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
