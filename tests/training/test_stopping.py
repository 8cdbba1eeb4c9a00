"""Ctrl-C once, twice and three times, wherever a run is; and a terminal that is closed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptsmith.cli.main import main
from gptsmith.training.stopping import stopping_signals
from tests.conftest import until
from tests.forking import Forked, Forking
from tests.training.test_run import TINY, here, records, same_weights, train

__all__ = ["here"]  # each test in a folder of its own, with a text

# `gptsmith train` that waits at a place, the first time it comes there after some steps, and counts
# there the signals that it was sent.
WAITING = """
import importlib, pathlib, signal, sys, time
from gptsmith.cli.main import main
module, owner, name, steps = sys.argv[1].split(":")
module = importlib.import_module(module)
owner = getattr(module, owner) if owner else module
from gptsmith.training import loop
original, done, step = getattr(owner, name), [0, False], loop.Trainer.step
def counting(self, number):
    done[0] = number
    return step(self, number)
def waiting(*arguments, **options):
    if done[0] == int(steps) - 1 and not done[1]:
        done[1] = True
        pathlib.Path("reached").touch()
        while not pathlib.Path("go-on").exists():
            time.sleep(0.01)
    return original(*arguments, **options)
loop.Trainer.step = counting
setattr(owner, name, waiting)
sys.exit(main(["train", *sys.argv[2:]]))
"""
SELDOM = ("--evaluate-every", "5", "--save-every", "100")


@contextmanager
def waiting_at(trainers: Forking, place: str, *words: str, steps: int = 20) -> Iterator[Forked]:
    """A run of 20 steps that has come to a place, "module:owner:name:step"."""
    line = ["text.txt", *TINY, *SELDOM, "--steps", str(steps), "--out", "stopped", *words]
    where: Any = {"folder": Path(), "environment": os.environ}
    with trainers.start(WAITING, place, *line, **where) as process:
        until(lambda: Path("reached").exists() or process.poll() is not None)
        assert process.poll() is None, process.done()
        yield process


def interrupt(process: Forked, times: int) -> None:
    """Press Ctrl-C, more slowly than signals are merged."""
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)


def left(process: Forked) -> str:
    done = process.done(120)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def goes_on_to_the_same_end(steps: int = 20) -> None:
    whole = train(*SELDOM, steps=steps, out="whole")
    assert main(["train", "--resume", "stopped"]) == 0
    run = Path("stopped")
    assert same_weights(whole, run, steps)
    for one, other in zip(records(whole), records(run), strict=True):
        assert one["loss"] == other["loss"]
        assert one.get("validation_loss") == other.get("validation_loss")
    assert (run / "samples.md").read_text() == (whole / "samples.md").read_text()
    assert (run / "best").read_text() == (whole / "best").read_text()


@pytest.mark.parametrize(
    ("place", "broken_off"),
    [
        ("gptsmith.evaluation.heldout::loss_sum:5", ["validation"]),
        ("gptsmith.generation.sampling::draw:5", ["sample"]),
        ("gptsmith.evaluation.heldout::loss_sum:20", ["validation"]),
    ],
)
@pytest.mark.slow
def test_a_validation_is_broken_off_and_made_up_for(
    place: str, broken_off: list[str], trainers: Forking
) -> None:
    with waiting_at(trainers, place) as process:
        interrupt(process, 1)
        Path("go-on").touch()
        said = left(process)
    step = int(place.rpartition(":")[2])
    assert f"Stopping: the {broken_off[0]} is broken off, and the run is saved." in said
    assert "validation_loss" not in records(Path("stopped"))[-1] or broken_off == ["sample"]
    state = Path(f"stopped/checkpoints/step-{step:08}/training/state.json")
    assert json.loads(state.read_text())["owed"][: len(broken_off)] == broken_off
    goes_on_to_the_same_end()


@pytest.mark.slow
def test_a_second_time_gives_up_the_step_and_loses_no_other(trainers: Forking) -> None:
    with waiting_at(trainers, "gptsmith.training.loop:Trainer:gradient:8") as process:
        interrupt(process, 2)
        said = left(process)
    assert "Stopping: step 8 is finished, and the run is saved. Ctrl-C again gives" in said
    assert "Leaving as soon as the run is saved" in said
    assert "Stopped and saved after 7 of 20 steps" in said
    assert (Path("stopped") / "last").read_text() == "step-00000007\n"
    goes_on_to_the_same_end()


@pytest.mark.slow
def test_a_second_time_lets_a_write_be_finished(trainers: Forking) -> None:
    place = "gptsmith.checkpoint.training_state::write_safetensors:10"
    with waiting_at(trainers, place, "--save-every", "10") as process:
        interrupt(process, 2)
        Path("go-on").touch()
        left(process)
    assert (Path("stopped") / "last").read_text() == "step-00000010\n"


@pytest.mark.slow
def test_a_third_time_ends_at_once_and_leaves_nothing_half_written(trainers: Forking) -> None:
    place = "gptsmith.checkpoint.training_state::write_safetensors:10"
    with waiting_at(trainers, place, "--save-every", "10") as process:
        interrupt(process, 3)
        left(process)  # although nobody told it to go on
    assert not list(Path("stopped").rglob("*.partial"))
    assert main(["train", "--resume", "stopped"]) == 0


def test_nohup_is_obeyed() -> None:
    assert signal.SIGHUP in stopping_signals()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in stopping_signals()
    finally:
        signal.signal(signal.SIGHUP, before)


INTERRUPTED = """
import importlib.abc, runpy, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Finder())
sys.argv = ["gptsmith", "describe", "gpt2"]
runpy.run_module("gptsmith", run_name="__main__")
"""


@pytest.mark.parametrize("name", ["gptsmith.cli.main", "gptsmith.cli.flags", "rich.console"])
def test_while_importing_there_is_no_traceback(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(name=name)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"


def test_the_installed_command_begins_there_too() -> None:
    """So that it is as early with the script that pip writes."""
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'gptsmith = "gptsmith.__main__:main"' in text
