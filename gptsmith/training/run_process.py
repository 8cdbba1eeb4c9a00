"""Train a run in a process of its own.

The process is `gptsmith train --resume` in the run's folder, so that its crash ends nothing else,
and a run whose process was killed is resumed like any run. Knows nothing of sweeps.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .records import METRICS, write_event
from .stopping import stopping_signals
from .summary import is_training, last_event

OUTPUT = "output.txt"  # in the run's folder: what the process says


@dataclass
class RunProcess:
    """A run that is being trained."""

    name: str
    run: Path
    fraction: float  # of its steps, to which it is trained
    started: float  # by time.time
    process: subprocess.Popen[bytes] | None  # None where it is not ours

    def has_ended(self) -> bool:
        """Return whether the process has ended."""
        if self.process is None:
            return not is_training(self.run)
        return self.process.poll() is not None

    def send_signal(self, number: int) -> None:
        """Send a signal to the process if it is ours; on Windows, Ctrl-Break in place of any."""
        if self.process is not None:
            self.process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", number))

    def record_failure(self, code: int) -> None:
        """Make the failure the run's last event, unless the process has done so itself."""
        if last_event(self.run, "failed").get("time", 0.0) < self.started:
            write_event(self.run, "failed", error=reason(self.run / OUTPUT, code))


def launch(words: Sequence[str], run: Path) -> subprocess.Popen[bytes]:
    """Start `gptsmith` with these words, and let it write to output.txt in the run's folder."""
    with (run / OUTPUT).open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "gptsmith", *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that Ctrl-C reaches it only from us; on Windows a group
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )


def reason(output: Path, code: int) -> str:
    """Return why a process ended: the signal that killed it, or the last line that it wrote."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), f"exit status {code}")
    return last.removeprefix("gptsmith: ")


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect the numbers of the signals that ask to stop."""
    received: list[int] = []

    def receive(number: int, frame: object) -> None:
        received.append(number)

    before = {number: signal.signal(number, receive) for number in stopping_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def recorded_steps(run: Path) -> int:
    """Return the number of steps in a run's metrics.jsonl."""
    path = run / METRICS
    return path.read_bytes().count(b"\n") if path.is_file() else 0
