"""Output on the terminal: lines, tables, and a live progress bar.

Decides nothing. Besides `cli/`, the only place that writes to the terminal.
"""

import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def tell(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Format seconds: "8 s", "3 min", "2 h 10 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def count(number: int, noun: str) -> str:
    """Format a number of things: "1 step", "2,000 steps"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(number: float) -> str:
    """Format a number of bytes: "1.5 GB"."""
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


class Display:
    """The output of one run: a progress bar on a terminal, elsewhere a line now and then."""

    def __init__(self, *, quiet: bool = False) -> None:
        # `soft_wrap` leaves wrapping to the terminal; `highlight` would color every number.
        self.console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.log_every, self.last_line = 10, time.monotonic()

    def say(self, text: str, style: str | None = None) -> None:
        """Write a line above the bar, without interpreting markup."""
        self.console.print(Text(text, style=style or ""))

    def say_now(self, text: str) -> None:
        """Write a line from a signal handler, which may have interrupted another write."""
        if self.console.quiet:
            return
        start = "" if self.bar is None else "\r\x1b[2K"  # in place of the bar, which comes again
        with suppress(OSError, ValueError):  # standard error may be closed, or no file
            os.write(self.console.file.fileno(), f"{start}{text}\n".encode())

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """Write a title, and two aligned columns under it."""
        self.say(title, "bold")
        width = max(map(len, rows))
        for name, value in rows.items():
            self.console.print(Text(f"  {name:<{width}}  ", style="dim") + Text(value))

    def open_bar(self, what: str, total: int | None, done: int = 0) -> None:
        """Open a bar of `total` units, if known, after closing any other; only on a terminal."""
        self.close_bar()
        if self.console.quiet or not self.console.is_terminal:
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
        """Move the bar to `done` units."""
        if self.bar is not None:
            self.bar.update(self.bar.tasks[0].id, completed=done, detail=detail)

    def close_bar(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def step(self, record: Mapping[str, Any], steps: int) -> None:
        """Show a step: in the bar, or as a line every `log_every` steps."""
        loss = record["loss"]
        detail = (
            f"step {record['step']:,}/{steps:,}  "
            f"loss {'not finite' if loss is None else format(loss, '.4f')}  "
            f"{record['tokens_per_second']:,.0f} tokens/s"
        )
        self.move_bar(record["step"], detail)
        if "validation_loss" in record:
            bits, right = record.get("bits_per_byte"), record.get("validation_accuracy")
            more = "" if bits is None else f"  ({bits:.4f} bits per byte)"
            more += "" if right is None else f"  ({right:.1%} right)"
            of_tasks = {
                key.removesuffix("_accuracy"): value
                for key, value in record.items()
                if key.endswith("_accuracy") and key != "validation_accuracy"
            }
            more += "".join(f"  {name} {value:.1%} right" for name, value in of_tasks.items())
            self.say(f"{detail}  validation loss {record['validation_loss']:.4f}{more}")
        elif self.bar is None and record["step"] % self.log_every == 0:
            self.say(detail)

    def batch_row(self, number: int, row: Mapping[str, Any]) -> None:
        """Write a row of a batch to standard output, its pieces in colours by their kind."""
        styles = {"prompt": "cyan", "answer": "bold green", "padding": "dim"}
        about = " ".join(str(row[key]) for key in ("label", "answer") if key in row)
        text = Text(f"{number}{' ' + about if about else ''}: ", style="dim")
        for piece in row["pieces"]:
            words = piece["text"] or f"[{count(piece['tokens'], 'padding token')}]"
            text += Text(words, style=styles[piece["kind"]])
        Console(highlight=False, soft_wrap=True).print(text)

    def preparing(self, done: int, total: int, tokens: int) -> None:
        """Show the progress of data preparation: in the bar, or as a line every 10 seconds."""
        if self.bar is None and self.console.is_terminal:
            self.open_bar("preparing", max(1, total))
        self.move_bar(done, f"{tokens:,} tokens")
        if self.bar is None and time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            self.say(f"preparing: {size(done)} of {size(total)}, {tokens:,} tokens")
