"""A run that is resumed is the same run, with the same data, or says what differs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptsmith.checkpoint.folder import checkpoints
from gptsmith.cli.main import main
from tests.training.test_run import TEXT, TINY, events, here, same_weights, train

__all__ = ["here"]  # each test in a folder of its own, with a text


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command line that must be refused; its only line."""

    def check(*words: str) -> str:
        capsys.readouterr()
        assert main([*words]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        return said

    return check


def prepared(place: str, text: str, *, tokenizer: str = "byte") -> None:
    Path("source.txt").write_text(text)
    assert main(["prepare", "source.txt", "--tokenizer", tokenizer, "--out", place]) == 0


def forget_after(run: Path, step: int) -> None:
    """As if the run had been killed after that step."""
    for path in checkpoints(run):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


NO_CHAR = [word for word in TINY if word not in ("--tokenizer", "char")]


def trained_on(place: str, out: str = "run", *words: str) -> Path:
    line = ["train", place, *NO_CHAR, "--steps", "8", "--save-every", "4", "--out", out, *words]
    assert main(line) == 0
    return Path(out)


@pytest.mark.parametrize(
    ("text", "tokenizer", "differs"),
    [(TEXT.replace("fox", "cat"), "byte", "another train and validation"),
     (TEXT, "char", "another tokenizer and train and validation")],
)  # fmt: skip
def test_other_data_in_the_same_place_is_refused(
    text: str, tokenizer: str, differs: str, refusal: Callable[..., str]
) -> None:
    prepared("data", TEXT)
    run = trained_on("data")
    forget_after(run, 4)
    shutil.rmtree("data")
    prepared("data", text, tokenizer=tokenizer)
    said = refusal("train", "--resume", "run")
    assert "data is not the data that run was trained on" in said
    assert differs in said
    assert len(events(run)) == 1


def test_data_that_moved_is_named_and_the_run_goes_on(refusal: Callable[..., str]) -> None:
    prepared("data", TEXT)
    whole, run = trained_on("data", "whole"), trained_on("data")
    forget_after(run, 4)
    shutil.move("data", "elsewhere")
    assert "--data" in refusal("train", "--resume", "run")
    assert main(["train", "--resume", "run", "--data", "elsewhere"]) == 0
    assert same_weights(whole, run)
    assert events(run)[-1]["changes"] == {"data": str(Path("elsewhere").resolve())}
    forget_after(run, 4)
    assert main(["train", "--resume", "run"]) == 0  # the new place is the run's


def test_published_shards_are_known_by_their_beginning(refusal: Callable[..., str]) -> None:
    """The header as others write it; the tokenizer's folder is not needed any more."""

    def publish(first: int) -> None:
        for name, count in (("web_train_000001.bin", 400), ("web_val_000000.bin", 90)):
            header = np.zeros(256, np.int32)
            header[:3] = 20240520, 1, count
            ids = (np.arange(count) + first) % 250
            path = Path("shards", name)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(header.tobytes() + ids.astype(np.uint16).tobytes())

    publish(0)
    prepared("bytes", TEXT)
    run = trained_on("shards", "run", "--tokenizer", "bytes")
    forget_after(run, 4)
    shutil.rmtree("bytes")
    publish(1)
    assert "is not the data" in refusal("train", "--resume", "run")
    publish(0)
    shutil.move("shards", "moved")
    assert main(["train", "--resume", "run", "--data", "moved"]) == 0


def test_an_edited_config_is_refused_and_other_sections_are_recorded(
    refusal: Callable[..., str],
) -> None:
    run = train()
    path = run / "config.toml"
    kept = path.read_text()
    path.write_text(kept.replace("learning_rate = 0.002", "learning_rate = 0.5"))
    said = refusal("train", "--resume", "run")
    assert "run/config.toml has learning_rate 0.5, but the run has learned with 0.002" in said
    path.write_text(kept.replace("keep = 2", "keep = 3"))
    assert main(["train", "--resume", "run"]) == 0
    assert events(run)[-1]["changes"] == {"keep": "3"}


def test_a_given_micro_batch_is_used() -> None:
    run = train("--save-every", "4")
    forget_after(run, 4)
    assert main(["train", "--resume", "run", "--micro-batch", "2"]) == 0
    state = json.loads((checkpoints(run)[0] / "training" / "state.json").read_text())
    assert state["micro_batch"] == 2


def test_a_run_of_an_older_version_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    """Its checkpoints have neither the data nor the newer settings."""
    prepared("data", TEXT)
    whole, run = trained_on("data", "whole"), trained_on("data")
    forget_after(run, 4)
    (checkpoints(run)[0] / "manifest.json").unlink()
    path = checkpoints(run)[0] / "training" / "state.json"
    state = json.loads(path.read_text())
    del state["data"], state["settings"]["prepare"]
    path.write_text(json.dumps(state))
    shutil.move("data", "elsewhere")
    assert main(["train", "--resume", "run", "--data", "elsewhere"]) == 0
    assert "is not compared" in capsys.readouterr().err
    assert same_weights(whole, run)
