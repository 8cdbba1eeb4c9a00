"""A run that is resumed is the same run, with the same data, or says what differs."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from gptsmith.checkpoint.finding import checkpoints
from gptsmith.checkpoint.training_state import load_training
from gptsmith.cli.main import main
from gptsmith.machine import environment
from tests.training.test_run import TEXT, TINY, events, here, records, same_weights, train

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
@pytest.mark.slow
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


@pytest.mark.slow
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


def flip_a_byte(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-9] ^= 1  # still an id of the vocabulary
    shard.write_bytes(content)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.slow
def test_a_flipped_byte_in_the_data_is_refused_as_other_data(
    split: str, refusal: Callable[..., str]
) -> None:
    """The size is the same, and dataset.json is as it was."""
    prepared("data", TEXT)
    shutil.copytree("data", "copy")
    whole, run = trained_on("data", "whole"), trained_on("data")
    forget_after(run, 4)
    flip_a_byte(Path(f"data/{split}_000000.bin"))
    said = refusal("train", "--resume", "run")
    assert "data is not the data that run was trained on" in said
    assert f"{split}_000000.bin was changed since it was written" in said
    assert "name the place of that data with --data" in said
    assert main(["train", "--resume", "run", "--data", "copy"]) == 0
    assert same_weights(whole, run)


@pytest.mark.slow
def test_a_runs_own_copy_of_its_text_is_made_again(refusal: Callable[..., str]) -> None:
    whole, run = train("--save-every", "4", out="whole"), train("--save-every", "4")
    forget_after(run, 4)
    flip_a_byte(run / "data" / "train_000000.bin")
    said = refusal("train", "--resume", "run")
    assert "remove that folder, and the text is prepared again" in said
    shutil.rmtree(said.split()[1])
    assert main(["train", "--resume", "run"]) == 0
    assert same_weights(whole, run)


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


def test_a_finished_run_whose_records_are_gone_is_still_finished() -> None:
    run = train()
    (run / "metrics.jsonl").unlink()
    assert main(["train", "--resume", str(run)]) == 0


def test_a_given_micro_batch_is_used() -> None:
    run = train("--save-every", "4")
    forget_after(run, 4)
    assert main(["train", "--resume", "run", "--micro-batch", "2"]) == 0
    state = json.loads((checkpoints(run)[0] / "training" / "state.json").read_text())
    assert state["micro_batch"] == 2


def advised(said: str) -> list[str]:
    """The words of the command between backticks, after `gptsmith`."""
    command = re.search("`gptsmith (.*?)`", said)
    assert command, said
    return shlex.split(command[1])


def closing_advice(run: Path, said: str, name: str) -> list[str]:
    line = next(line for line in said.splitlines() if line.startswith(f"  {name} "))
    assert str(run) in line
    return shlex.split(line.partition("gptsmith ")[2])


@pytest.mark.slow
def test_a_constant_run_becomes_the_longer_one(
    capsys: pytest.CaptureFixture[str], refusal: Callable[..., str]
) -> None:
    whole = train("--schedule", "constant", steps=16, out="whole")
    capsys.readouterr()
    run = train("--schedule", "constant")
    words = closing_advice(run, capsys.readouterr().err, "longer")
    assert words == ["train", "--resume", "run", "--steps", "16"]
    assert main(words) == 0
    assert same_weights(whole, run, 16)
    assert events(run)[-1]["changes"] == {"steps": "16"}
    forget_after(run, 12)  # config.toml is of 16 steps, and the checkpoint records them too
    assert main(["train", "--resume", "run"]) == 0
    assert "done 16 already: give at least 16" in refusal(
        "train", "--resume", "run", "--steps", "4"
    )
    assert main(["train", "--resume", "run", "--steps", "16"]) == 0


@pytest.mark.slow
def test_a_wsd_run_becomes_longer_until_it_decays(refusal: Callable[..., str]) -> None:
    how = ("--schedule", "wsd", "--decay-fraction", "0.5", "--keep", "9")
    whole, run = train(*how, steps=24, out="whole"), train(*how, steps=16)
    assert "has 16 and begun to decay" in refusal("train", "--resume", "run", "--steps", "24")
    forget_after(run, 8)
    assert main(["train", "--resume", "run", "--steps", "24"]) == 0
    assert same_weights(whole, run, 24)


@pytest.mark.slow
def test_a_cosine_run_is_advised_to_start_from_its_weights(
    capsys: pytest.CaptureFixture[str], refusal: Callable[..., str]
) -> None:
    """Whatever its folder is called."""
    run = train(out="my $HOME run")
    assert main(closing_advice(run, capsys.readouterr().err, "longer")) == 0
    said = refusal("train", "--resume", str(run), "--steps", "9")
    assert "--steps 9 contradicts the run, which has 8 and a cosine schedule" in said
    assert main(advised(said)) == 0
    first, second = Path("runs/config-1"), Path("runs/config-2")
    assert records(first)[-1]["step"] == 8
    assert records(second)[-1]["step"] == 1
    best = min(r["validation_loss"] for r in records(run) if "validation_loss" in r)
    assert records(first)[0]["loss"] < records(run)[0]["loss"]
    assert records(second)[0]["validation_loss"] == pytest.approx(best, abs=0.02)


@pytest.mark.slow
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


def test_dropout_of_an_older_version_goes_on_by_row_and_is_recorded() -> None:
    run = train("--save-every", "4")
    forget_after(run, 4)
    (checkpoints(run)[0] / "manifest.json").unlink()
    path = checkpoints(run)[0] / "training" / "state.json"
    state = json.loads(path.read_text())
    assert state["rng"].pop("dropout") == "rows"
    path.write_text(json.dumps(state))
    assert main(["train", "--resume", "run"]) == 0
    assert events(run)[-1]["changes"] == {"dropout_drawn_by": "rows"}
    forget_after(run, 8)
    assert main(["train", "--resume", "run"]) == 0
    assert events(run)[-1]["changes"] == {}


# Saves a model of 11M parameters with AdamW's state; prints what the peak of memory grew by, and
# the sizes of all tensors and of the largest, in bytes.
SAVING = """
import pathlib, sys, torch
from gptsmith import GPT, GPTConfig
from gptsmith.checkpoint import saving
from gptsmith.config.settings import TrainingSettings
from gptsmith.machine.environment import peak_memory
from gptsmith.training.optimizers import make_optimizers, state_tensors
torch.set_num_threads(1)
config = GPTConfig(n_layer=8, n_head=2, n_embd=256, vocab_size=20_000, context_length=8)
model = GPT(config)
optimizers = make_optimizers(model, TrainingSettings())
for p in model.parameters():
    optimizers[0].state[p] = {"step": torch.ones(()), **{
        name: torch.ones_like(p) for name in ("exp_avg", "exp_avg_sq")}}
saving.save(model, None, pathlib.Path("small"), optimizer={"x": torch.ones(2)}, state={})
before = peak_memory()
tensors = state_tensors(model, optimizers)
saving.save(model, None, pathlib.Path("saved"), optimizer=tensors, state={})
sizes = [tensor.nbytes for tensor in tensors.values()]
print(peak_memory() - before, sum(sizes), max(sizes))
"""


@pytest.mark.slow
def test_a_save_writes_tensors_from_where_they_lie() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SAVING], capture_output=True, text=True, check=True
    )
    grown, whole, largest = map(int, done.stdout.split())
    assert grown < largest < whole / 4
    model, kept = Path("saved/model.safetensors"), load_training(Path("saved"))[0]
    assert kept["exp_avg_sq.wte.weight"].shape == load_file(model)["transformer.wte.weight"].shape
    assert all(bool((tensor == 1).all()) for tensor in kept.values())


# -- the C++ pieces of a step


def fused_in(run: Path) -> str:
    found = re.search(r'^fused = "(\w+)"$', (run / "config.toml").read_text(), re.MULTILINE)
    assert found
    return found[1]


@pytest.mark.slow
def test_a_run_goes_on_with_the_pieces_that_it_was_trained_with() -> None:
    pieces = ("--dropout", "0", "--fused", "yes")
    first = train(*pieces, out="fused")
    plain = train("--dropout", "0", "--fused", "no", out="plain")
    assert (fused_in(first), fused_in(plain)) == ("yes", "no")
    for run in (first, plain):
        forget_after(run, 4)
        assert main(["train", "--resume", str(run)]) == 0
    assert (fused_in(first), fused_in(plain)) == ("yes", "no")
    assert same_weights(first, train(*pieces, out="through"))


def test_a_run_from_before_there_were_pieces_goes_on_without() -> None:
    run = train("--fused", "no")
    config = run / "config.toml"
    config.write_text(re.sub("fused = .*\n", "", config.read_text()))
    for checkpoint in checkpoints(run):
        state = checkpoint / "training" / "state.json"
        assert '"fused"' in state.read_text()
    forget_after(run, 4)
    assert main(["train", "--resume", str(run)]) == 0
    assert fused_in(run) == "no"


def test_a_run_with_pieces_says_how_to_go_on_without_a_compiler(
    refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = train("--fused", "yes")
    forget_after(run, 4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr(environment, "compiler", lambda: None)
    assert "go on with --fused no" in refusal("train", "--resume", str(run))
    assert main(["train", "--resume", str(run), "--fused", "no"]) == 0
    assert "fused" in events(run)[-1]["changes"]
