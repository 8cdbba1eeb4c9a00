"""Fine-tuning in several processes, and interrupted where training itself is not."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptsmith.cli.main import main
from gptsmith.data.encoded import Examples
from gptsmith.data.example_batches import ExampleBatches
from gptsmith.finetuning import report
from gptsmith.finetuning.preference import PreferenceTask
from tests.conftest import Together, until
from tests.finetuning.test_finetune import TOY, TOY_TEXT, here, same_weights, tuned
from tests.forking import Forking
from tests.training.test_run import events, records, torchrun

__all__ = ["here"]  # each test in a folder with a small model and data for each task


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "processes", "by_torchrun", "shard"),
    [
        *((task, 2, task == "chat", "no") for task in ("chat", "classify", "preference", "text")),
        *((task, 4, False, "no") for task in ("chat", "classify", "preference", "text")),
        *((task, 3, False, "yes") for task in ("classify", "preference")),
    ],
)
def test_processes_learn_what_one_does(
    task: str, processes: int, by_torchrun: bool, shard: str, in_processes: Together
) -> None:
    """Six rows, which four processes cannot share evenly, with dropout; also what is judged."""
    words = ["--dropout", "0.2", "--micro-batch", "1", "--learning-rate", "0.001"]
    one = tuned(task, "one", *words, *(["--batch-tokens", "1200"] if task == "text" else []))
    data = ["--data", "text.txt" if task == "text" else f"{task}.jsonl"]
    toy = [*TOY_TEXT, "--batch-tokens", "1200"] if task == "text" else TOY
    start = torchrun if by_torchrun else in_processes
    words += ["--shard", shard]
    start(processes, "finetune", "base", *data, "--out", "many", *toy, *words)
    assert events(Path("many"))[0]["sharded"] is (shard == "yes")
    for mine, theirs in zip(records(one), records(Path("many")), strict=True):
        for name in ("loss", "validation_loss", "validation_accuracy", "reward_margin", "tokens"):
            assert theirs.get(name) == pytest.approx(mine.get(name), abs=1e-6), name
    if task != "text":
        tests = [json.loads((run / "test.json").read_text()) for run in (one, Path("many"))]
        assert tests[0]["loss"] == pytest.approx(tests[1]["loss"], abs=1e-5)


def test_a_process_fills_its_rows_up_as_one_process_does() -> None:
    """Dropout numbers the attention weights of a row by its length."""
    run = tuned("chat", "run", "--steps", "1")
    rows = Examples.open(run / "data").split("train")
    whole = ExampleBatches(rows, 6, seed=1)
    parts = [ExampleBatches(rows, 6, seed=1, rank=rank, world_size=4) for rank in range(4)]
    for step in range(7):
        for part in parts:
            for array, share in zip(whole.at(step), part.at(step), strict=True):
                assert np.array_equal(array[part.mine], share)


# -- interrupted before the first step, and after the last


def interrupting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, before which somebody presses Ctrl-C, the first time."""
    pressed = list[bool]()

    def pressing(*arguments: Any, **options: Any) -> Any:
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)
        return function(*arguments, **options)

    return pressing


@pytest.mark.parametrize("place", ["encoding", "reference"])
def test_interrupted_before_the_first_step_nothing_is_left(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner: Any = PreferenceTask
    name = "logprobs"
    if place == "encoding":
        from gptsmith.data.encoded import Encoder as owner

        name = "rows"
    monkeypatch.setattr(owner, name, interrupting(getattr(owner, name)))
    words = ["finetune", "base", "--data", "preference.jsonl", "--out", "runs/run", *TOY]
    assert main(words) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    assert not Path("runs").exists()
    assert main([*words, "--steps", "1"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("task", ["chat", "classify", "preference"])
def test_interrupted_in_the_test_the_run_can_be_tested_again(
    task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(report, "draw_confusion", interrupting(report.draw_confusion))
        patch.setattr(report, "answered", interrupting(report.answered))
        patch.setattr(report, "loss_of", interrupting(report.loss_of))
        words = ["finetune", "base", "--data", f"{task}.jsonl", "--out", "run", *TOY]
        assert main([*words, "--steps", "1"]) == 130
    said = capsys.readouterr().err
    assert "gptsmith train --resume run" in said
    assert said.endswith("interrupted\n")
    assert not Path("run/test.json").exists()
    assert main(["train", "--resume", "run"]) == 0
    assert json.loads(Path("run/test.json").read_text())["examples"] > 0


TERMINATED = """
import pathlib, sys, time
from gptsmith.cli.main import main
from gptsmith.finetuning.preference import PreferenceTask
def waiting(*arguments):
    pathlib.Path("reached").touch()
    time.sleep(300)
PreferenceTask.logprobs = waiting
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["train", "finetune"])
def test_terminated_in_the_reference_the_run_goes_on_to_the_same_end(
    verb: str, trainers: Forking
) -> None:
    words = ["finetune", "base", "--data", "preference.jsonl", "--out", "run", *TOY]
    where: Any = {"folder": Path(), "environment": os.environ}
    with trainers.start(TERMINATED, *words, **where) as process:
        until(lambda: Path("reached").exists() or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    assert main([verb, "--resume", "run"]) == 0
    assert same_weights(tuned("preference", "whole"), Path("run"))
