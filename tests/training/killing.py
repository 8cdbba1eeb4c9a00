"""Trains a tiny run many times, killed each time at another instant, and tells what became of it.

Run by test_kill.py as a program, with the number of attempts, a seed and tasks, "text", those of
fine-tuning, or at last "rollback", which is of a text with spikes: it imports everything once and
forks a child for every attempt. A child dies by SIGKILL at the n-th of the moments that matter:
before, after and in the middle of whatever touches the disk, and between steps. Prints a JSON
object per attempt, and one before for each task.
"""

import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure  # imported once here, rather than by every child

import gptsmith
from gptsmith.checkpoint import adapter, training_state
from gptsmith.cli.main import main as run_command
from gptsmith.tokenizers import byte_tokenizer
from gptsmith.training import loop, rollback, spikes

STEPS = 12
OPTIONS = (
    "--tokenizer char --n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --dropout 0.2 "
    f"--batch-tokens 32 --steps {STEPS} "
)
COMMON = (
    "--warmup-steps 2 --evaluate-every 3 --save-every 2 --sample-tokens 5 --keep 2 --threads 1 "
    "--dtype float32 --attention kernel"
)
ROWS: dict[str, Callable[[int], dict[str, str]]] = {
    "chat": lambda n: {"prompt": f"{n}+1=", "completion": str(n + 1)},
    "classify": lambda n: {"text": f"number {n}", "label": ("even", "odd")[n % 2]},
    "preference": lambda n: {"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "no"},
}


# Imported once here, rather than by every child.
COMMANDS = "gptsmith.cli.finetune gptsmith.finetuning.finetune gptsmith.cli.train"


class Moments:
    """Counts the moments; at the one that is named, the process dies without a word."""

    def __init__(self, deadly: int | None) -> None:
        self.count, self.deadly = 0, deadly

    def pass_one(self) -> None:
        self.count += 1
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str, halfway: Callable | None = None) -> None:
        """Make a function pass a moment before and after, and leave half a result between."""
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.pass_one()
            result = original(*args, **kwargs)
            if halfway is not None and self.count + 1 == self.deadly:
                halfway(*args)
            self.pass_one()
            return result

        setattr(owner, name, wrapped)


def half_file(path: Path, *written: Any) -> None:
    """Leave what a write that was cut short leaves."""
    os.truncate(path, os.path.getsize(path) // 2)


def train(words: list[str], deadly: int | None) -> int:
    """Train in a child; how many moments it passed, or 0 where it was killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        # Neither changes what SIGKILL leaves, and both take longer than all the rest.
        Figure.savefig = lambda self, path, **how: Path(path).write_bytes(b"a picture")
        os.fsync = lambda file: None
        moments = Moments(deadly)
        moments.around(os, "fsync")
        moments.around(os, "rename")
        moments.around(os, "replace")
        moments.around(shutil, "rmtree")
        moments.around(training_state, "write_safetensors", half_file)
        moments.around(adapter, "write_safetensors", half_file)
        moments.around(Path, "write_text", half_file)
        moments.around(loop.Trainer, "step")
        status = run_command(words)
        os.write(writer, json.dumps([status, moments.count]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if not said:
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, status
        return 0
    code, count = json.loads(said)
    assert code == 0, Path("log.txt").read_text()
    return count


def plant_spikes() -> None:
    """Make the losses of two batches huge, and the rule short enough for a run of twelve steps."""
    original = loop.Trainer.gradient

    def gradient(self: loop.Trainer, *batch: Any) -> Any:
        number = rollback.batch_number(self.done, self.rollbacks)
        return original(self, *batch) + (9 if number in (6, 9) else 0)

    loop.Trainer.gradient = gradient
    spikes.LEAST, rollback.LEFT_OUT = 4, 2


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same whatever happened on the way."""
    last = run / "checkpoints" / (run / "last").read_text().strip()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    state = json.loads((last / "training" / "state.json").read_text())
    (weights,) = last.glob("*.safetensors")
    test = run / "test.json"
    return {
        "checkpoint": last.name,
        "weights": checkpoint_sum(last, weights.name),
        "optimizer": checkpoint_sum(last, "training/optimizer.safetensors"),
        "steps": [record["step"] for record in steps],
        "losses": [record["loss"] for record in steps],
        "validation": [r["validation_loss"] for r in steps if "validation_loss" in r],
        "best": (run / "best").read_text().strip(),
        "best_state": state["best"],
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "samples": (run / "samples.md").read_text(),
        "rollbacks": rollback.read_rollbacks(run) and (run / rollback.ROLLBACKS).read_text(),
        "left": sorted(p.name for p in run.rglob("*.partial")),
        "test": json.loads(test.read_text()) if test.exists() else None,
    }


def checkpoint_sum(folder: Path, name: str) -> str:
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest["files"][name]["sha256"]


def command_line(task: str) -> list[str]:
    """The line of a fresh run, whose model and data are written first."""
    if task in ("text", "rollback"):
        Path("text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
        more = [] if task == "text" else ["--on-spike", "rollback", "--rollback-rate", "0.5"]
        return ["train", "text.txt", *OPTIONS.split(), *COMMON.split(), *more]
    config = gptsmith.GPTConfig(
        vocab_size=257, context_length=24, n_layer=1, n_head=2, n_embd=8, dropout=0.2
    )
    gptsmith.save(gptsmith.GPT(config), byte_tokenizer(), "base")
    lines = [json.dumps(ROWS[task](n)) + "\n" for n in range(24)]
    Path("rows.jsonl").write_text("".join(lines))
    words = f"finetune base --data rows.jsonl --batch-rows 5 --steps {STEPS} --dropout 0.2"
    return [*words.split(), *COMMON.split(), *(["--lora", "2"] if task == "chat" else [])]


def main() -> None:
    attempts, seed = int(sys.argv[1]), int(sys.argv[2])
    for module in COMMANDS.split():
        importlib.import_module(module)
    gc.freeze()  # a child's collections would copy all that is shared
    for task in sys.argv[3:]:
        Path(task).mkdir()
        os.chdir(task)
        kill_and_resume(task, attempts, random.Random(seed))
        os.chdir("..")


def kill_and_resume(task: str, attempts: int, chosen: random.Random) -> None:
    if task == "rollback":
        plant_spikes()
    fresh = command_line(task)
    total = train([*fresh, "--out", "whole"], None)
    print(json.dumps({"moments": total, **outcome(Path("whole"))}))
    deadly = sorted(chosen.sample(range(1, total + 1), attempts))
    for number, moment in enumerate(deadly):
        run = Path(f"killed-{number}")
        finished = train([*fresh, "--out", str(run)], moment)
        assert not finished, f"moment {moment} of {total} did not kill"
        kills = [moment]
        if not (run / "config.toml").is_file():  # it had not begun: there is nothing to lose
            shutil.rmtree(run, ignore_errors=True)
            train([*fresh, "--out", str(run)], None)
        else:
            again = chosen.randrange(1, total)  # and perhaps once more, on the way back
            if not train([fresh[0], "--resume", str(run)], again):
                kills.append(again)
                train(["train", "--resume", str(run)], None)
        print(json.dumps({"kills": kills, **outcome(run)}))
        shutil.rmtree(run)


if __name__ == "__main__":
    main()
