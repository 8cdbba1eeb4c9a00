"""What a run shows and records: a live bar or plain lines, and one JSON record per step.

Decides nothing; with `cli.py` the only place that writes to the terminal.
"""

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def duration(seconds: float) -> str:
    """Seconds as a person says them: "8 s", "3 min", "2 h 10 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def size(number: float) -> str:
    """Bytes as a person says them: "1.5 GB"."""
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


class Display:
    """The terminal of one run: a live bar where there is a terminal, else lines now and then."""

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        # `soft_wrap` leaves long lines to the terminal; `highlight` would colour every number.
        self.console = Console(
            file=stream or sys.stderr, quiet=quiet, highlight=False, soft_wrap=True
        )
        self.bar: Progress | None = None
        self.log_every, self.last_line = 10, time.monotonic()

    def say(self, text: str, style: str | None = None) -> None:
        """A line of its own, above the bar; the text is shown as it is."""
        self.console.print(Text(text, style=style or ""))

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """A title, and two aligned columns under it."""
        self.say(title, "bold")
        width = max(map(len, rows))
        for name, value in rows.items():
            self.console.print(Text(f"  {name:<{width}}  ", style="dim") + Text(value))

    def open_bar(self, what: str, total: int, done: int = 0) -> None:
        """Begin a bar of `total` parts; closes the one before."""
        self.close_bar()
        if not self.console.is_terminal:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.bar = Progress(*columns, console=self.console, transient=True, refresh_per_second=4)
        self.bar.add_task(what, total=total, completed=done, detail="")
        self.bar.start()

    def move_bar(self, done: int, detail: str) -> None:
        """Show how far the work is."""
        if self.bar is not None:
            self.bar.update(self.bar.tasks[0].id, completed=done, detail=detail)

    def close_bar(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def step(self, record: Mapping[str, Any], steps: int) -> None:
        """Show a step: in the bar, or as a line every `log_every` steps."""
        evaluated = "validation_loss" in record
        loss = record["loss"]
        detail = (
            f"step {record['step']:,}/{steps:,}  "
            f"loss {'not finite' if loss is None else format(loss, '.4f')}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        self.move_bar(record["step"], detail)
        if evaluated:
            bits = record.get("bits_per_byte")
            in_bits = "" if bits is None else f"  ({bits:.4f} bits per byte)"
            self.say(f"{detail}  validation loss {record['validation_loss']:.4f}{in_bits}")
        elif self.bar is None and record["step"] % self.log_every == 0:
            self.say(detail)

    def preparing(self, done: int, total: int, tokens: int) -> None:
        """Show how far the preparation of text is: a bar, or a line every 10 seconds."""
        if self.bar is None and self.console.is_terminal:
            self.open_bar("preparing", max(1, total))
        self.move_bar(done, f"{tokens:,} tokens")
        if self.bar is None and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            self.say(f"preparing: {size(done)} of {size(total)}, {tokens:,} tokens")


class Recorder:
    """metrics.jsonl: one record per step, each step once, whatever was killed in between."""

    def __init__(self, path: Path, records: list[dict[str, Any]]) -> None:
        self.path, self.records = path, records
        self.file = path.open("a", encoding="utf-8")

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; numbers that are not finite, which JSON lacks, become null."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self.records.append(clean)
        self.file.write(json.dumps(clean) + "\n")
        self.file.flush()

    def flush(self) -> None:
        """Put every record on the disk itself."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Flush and let go of the file."""
        self.flush()
        self.file.close()


class Watchers:
    """TensorBoard and Weights & Biases, each only where it was asked for."""

    def __init__(
        self, folder: Path, *, tensorboard: bool, wandb: str | None, settings: Mapping[str, Any]
    ) -> None:
        self.writer: Any = None
        self.wandb_run: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError(
                    "--tensorboard needs an extra: pip install 'gptsmith[tensorboard]'"
                ) from error
            self.writer = SummaryWriter(str(folder / "tensorboard"))
        if wandb:
            try:
                import wandb as weights_and_biases
            except ImportError as error:
                raise ImportError(
                    "--wandb needs an extra: pip install 'gptsmith[wandb]'"
                ) from error
            self.wandb_run = weights_and_biases.init(
                project=wandb, name=folder.name, dir=str(folder), config=dict(settings)
            )

    def add(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of a step."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, record["step"])
        if self.wandb_run is not None:
            self.wandb_run.log(numbers, step=record["step"])

    def close(self) -> None:
        """Finish what was begun."""
        if self.writer is not None:
            self.writer.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()
