"""`train --stop-after N`: the run is left at a step, and goes on to the same end."""

from pathlib import Path

import pytest

from gptsmith.cli.main import main
from tests.training.test_run import events, here, records, same_weights, train

__all__ = ["here"]  # each test in a folder of its own, with a text


def test_left_at_a_step_it_goes_on_to_the_same_end(capsys: pytest.CaptureFixture[str]) -> None:
    whole = train()
    run = train("--stop-after", "3", out="left")
    assert "Stopped and saved after 3 of 8 steps" in capsys.readouterr().err
    assert [record["step"] for record in records(run)] == [1, 2, 3]
    assert (run / "last").read_text() == "step-00000003\n"
    assert main(["train", "--resume", "left", "--stop-after", "3"]) == 0  # nothing is left to do
    assert (run / "last").read_text() == "step-00000003\n"
    assert main(["train", "--resume", "left", "--stop-after", "4"]) == 0
    assert records(run)[-1]["validation_loss"] == records(whole)[3]["validation_loss"]
    assert main(["train", "--resume", "left"]) == 0
    assert same_weights(whole, run)
    assert [r["loss"] for r in records(run)] == [r["loss"] for r in records(whole)]


def test_what_the_rest_will_take_is_recorded() -> None:
    run = train("--stop-after", "4", out="left")
    assert main(["train", "--resume", "left"]) == 0
    first, second = (event["seconds_left"] for event in events(run))
    assert first > 0
    assert second > 0


def test_before_the_first_step_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "text.txt", "--stop-after", "0"]) == 2
    assert "--stop-after is 0: at least 1 is needed" in capsys.readouterr().err
    assert not Path("runs").exists()
