"""Tiny sweeps that are killed, interrupted and resumed; prints what became of them, as JSON.

Run by test_sweep.py as a program: it imports PyTorch once, and every process of a sweep is a fork
of it. A file `at-RUN-STEP` in the current folder, with "run" or "sweep" and a signal's number in
it, makes the run send that signal to itself or to its sweep when it comes to that step.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # imported once here, rather than by every child

from gptsmith.cli.main import main as run_command
from gptsmith.training import loop, sweeping

TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(60))
OPTIONS = (
    "--tokenizer char --n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --batch-tokens 48 "
    "--warmup-steps 0 --evaluate-every 2 --sample-tokens 0 --threads 1 --dtype float32 "
    "--attention kernel --fused no --micro-batch 6 --keep 1"
).split()
GRID = ["--set", "learning_rate=1e-4,1e-2", "--seeds", "2", "--steps", "6"]


class Forked:
    """What `launch` starts in place of a new Python."""

    def __init__(self, words: Any, run: Path) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        redirect(run / "output.txt")
        step = loop.Trainer.step

        def reporting(self: Any, done: int) -> Any:
            report = step(self, done)
            order = Path(f"at-{run.name}-{report.step}")
            if order.exists():
                whom, number = order.read_text().split()
                order.unlink()
                who = os.getpid() if whom == "run" else int(Path("sweep-pid").read_text())
                os.kill(who, int(number))
                if who != os.getpid() and int(number) == signal.SIGKILL:
                    until_waited_for()  # the run goes on without its sweep
                time.sleep(0.3)
            return report

        loop.Trainer.step = reporting  # type: ignore[method-assign]
        os._exit(run_command(list(words)))

    def poll(self) -> int | None:
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def until_waited_for() -> None:
    """Wait for the next sweep to find a run that still trains."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (said := Path("said")).exists() and "by an earlier process" in said.read_text():
            return
        time.sleep(0.01)


def redirect(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


def sweep(*words: str) -> tuple[int, str]:
    return command("sweep", *words)


def command(*words: str) -> tuple[int, str]:
    """Run `gptsmith`; its status, negative where a signal killed it, and what it wrote."""
    said = Path("said")
    said.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        Path("sweep-pid").write_text(str(os.getpid()))
        redirect(said)
        os._exit(run_command(list(words)))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text()


def outcome(folder: str) -> dict[str, Any]:
    """What must be the same whatever happened on the way."""
    runs = {}
    for run in sorted(path.parent for path in Path(folder).glob("*/config.toml")):
        metrics = run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        records = [json.loads(line) for line in lines]
        events = run / "events.jsonl"
        last = run / "last"
        name = last.read_text().strip() if last.exists() else None
        manifest = run / f"checkpoints/{name}/manifest.json"
        files = json.loads(manifest.read_text())["files"] if name else {}
        runs[run.name] = {
            "steps": [record["step"] for record in records],
            "losses": [(record["loss"], record.get("validation_loss")) for record in records],
            "last": name,
            "weights": files.get("model.safetensors", {}).get("sha256"),
            "event": json.loads(events.read_text().splitlines()[-1]) if events.exists() else None,
        }
    plan = json.loads((Path(folder) / "sweep.json").read_text())
    return {"runs": runs, "kept": plan["kept"], "done": plan["done"]}


def show(name: str, *results: tuple[int, str]) -> None:
    """Print a scenario's outcome."""
    codes, said = zip(*results, strict=True)
    found = {"scenario": name, "codes": codes, "said": said, **outcome(name)}
    print(json.dumps(found), flush=True)


def order(run: str, step: int, whom: str, number: int) -> None:
    Path(f"at-{run}-{step}").write_text(f"{whom} {int(number)}")


def main() -> None:
    Path("text.txt").write_text(TEXT)
    Figure.savefig = lambda self, path, **how: Path(path).write_bytes(b"")  # type: ignore[assignment]
    os.fsync = lambda file: None
    sweeping.launch = Forked  # type: ignore[assignment]
    sweeping.PAUSE = 0.01
    grid = ["text.txt", *OPTIONS, *GRID]
    show("whole", sweep(*grid, "--out", "whole"))
    show("two", sweep(*grid, "--out", "two", "--processes", "2"))

    order("02", 3, "sweep", signal.SIGKILL)
    first = sweep(*grid, "--out", "killed")
    order("03", 5, "run", signal.SIGKILL)
    second = sweep(*grid, "--out", "killed")  # the same command again
    show("killed", first, second, sweep("--resume", "killed"))

    order("02", 3, "sweep", signal.SIGINT)
    first = sweep(*grid, "--out", "interrupted")
    show("interrupted", first, sweep("--resume", "interrupted"))

    rates = ["--set", "learning_rate=1e-2,1e-4,1e25", "--steps", "10"]
    failing = sweep("text.txt", *OPTIONS, *rates, "--min-learning-rate", "1e-3", "--out", "failing")
    show("failing", failing)

    halved = ["--set", "learning_rate=1e-7,1e-3,1e-2,1e-8", "--seeds", "2", "--steps", "8"]
    short = sweep("text.txt", *OPTIONS, *GRID, "--budget", "0.01s", "--out", "short")
    show("short", short, sweep("--resume", "short", "--budget", "1h"))

    sweeping.choose_halvings = lambda *plan: (2, 1.0)
    order("03", 4, "sweep", signal.SIGKILL)  # in the second rung
    line = ["text.txt", *OPTIONS, *halved, "--budget", "1h", "--out", "halved"]
    show("halved", sweep(*line), sweep("--resume", "halved"))
    words = ["train", "text.txt", *OPTIONS, "--learning-rate", "1e-2", "--steps", "8"]
    trained = command(*words, "--out", "plain/01")
    Path("plain/sweep.json").write_text('{"kept": [], "done": {}}')
    show("plain", trained)


if __name__ == "__main__":
    main()
