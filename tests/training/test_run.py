"""Whole runs: what they leave, how they go on, and what they agree with."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from filelock import FileLock
from safetensors.torch import load_file

from gptsmith.checkpoint.finding import checkpoints
from gptsmith.cli.main import main
from gptsmith.config.recipe import read_toml
from gptsmith.data.shards import Dataset
from gptsmith.training.loop import Trainer
from tests.conftest import Together, until
from tests.forking import Forking

TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(60))
TINY = (
    "--tokenizer char --n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --dropout 0.1 "
    "--batch-tokens 48 --warmup-steps 2 --evaluate-every 4 --sample-tokens 5 --threads 1 "
    "--dtype float32 --attention kernel --keep 2"
).split()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder of its own, with a text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def train(*words: str, steps: int = 8, out: str = "run") -> Path:
    assert main(["train", "text.txt", *TINY, "--steps", str(steps), "--out", out, *words]) == 0
    return Path(out)


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:08}" / "model.safetensors")


def same_weights(one: Path, other: Path, step: int = 8) -> bool:
    first, second = weights(one, step), weights(other, step)
    return all(torch.equal(first[name], second[name]) for name in first)


def started(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "gptsmith", "train", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_run_leaves_what_it_promises(capsys: pytest.CaptureFixture[str]) -> None:
    run = train()
    names = {path.name for path in run.iterdir()}
    assert names >= {"config.toml", "metrics.jsonl", "loss.png", "samples.md", "best", "last"}
    assert (run / "last").read_text() == "step-00000008\n"
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert re.findall(r"^## step (\d+)$", (run / "samples.md").read_text(), re.M) == ["4", "8"]
    found = records(run)
    assert [record["step"] for record in found] == list(range(1, 9))
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu"} <= found[0].keys()
    assert [r["step"] for r in found if "validation_loss" in r] == [4, 8]
    last = found[-1]
    assert last["perplexity"] == pytest.approx(math.exp(last["validation_loss"]))
    # One byte per character here, so bits per byte are nats per token over log 2.
    assert last["bits_per_byte"] == pytest.approx(last["validation_loss"] / math.log(2))
    assert last["tokens"] == 8 * 48
    shown = capsys.readouterr()
    assert shown.out == ""
    for word in (
        "parameters",
        "validation tokens",
        "memory",
        "time",
        "Finished 8 steps",
        "gptsmith sample",
    ):
        assert word in shown.err
    assert "\x1b" not in shown.err


def test_checkpoints_are_thinned_but_the_best_stays() -> None:
    run = train("--save-every", "1", "--learning-rate", "0.5", steps=12)
    best = (run / "best").read_text().strip()
    kept = [path.name for path in checkpoints(run)]
    assert set(kept) == {"step-00000012", "step-00000011", best}
    losses = {r["step"]: r["validation_loss"] for r in records(run) if "validation_loss" in r}
    assert best == f"step-{min(losses, key=losses.__getitem__):08}"


def test_the_reported_validation_loss_is_transformers_too() -> None:
    """The same split, read by nobody of ours but the shard reader, through GPT2LMHeadModel."""
    run = train(steps=20)
    stream = Dataset.open(run / "data").validation
    assert stream is not None
    tokens = stream.read(0, len(stream))
    for record in (r for r in records(run) if "validation_loss" in r):
        folder = run / "checkpoints" / f"step-{record['step']:08}"
        if not folder.exists():
            continue
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().double()
        total, count = 0.0, 0
        for start in range(0, len(tokens) - 1, 8):
            window = torch.from_numpy(tokens[start : start + 9])
            with torch.no_grad():
                scores = model(window[None, :-1]).logits[0].log_softmax(-1)
            total -= scores[range(len(window) - 1), window[1:]].sum().item()
            count += len(window) - 1
        assert count == record["validation_tokens"]
        assert record["validation_loss"] == pytest.approx(total / count, abs=1e-6)


def test_the_recorded_settings_repeat_the_run() -> None:
    run = train()
    assert main(["train", str(run / "config.toml"), "--out", "again"]) == 0
    assert same_weights(run, Path("again"))
    chosen = read_toml(run / "config.toml").machine
    assert (chosen.device, chosen.dtype, chosen.compile) == ("cpu", "float32", "no")
    assert chosen.micro_batch == 6


def test_what_is_shown_changes_nothing_that_is_learned() -> None:
    one = train()
    other = train("--evaluate-every", "3", "--sample-every", "1", "--keep", "9", out="other")
    assert same_weights(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["blocks", "kernel"])
def test_muon_in_bf16_goes_on_bit_for_bit(attention: str) -> None:
    how = ("--optimizer", "muon", "--dtype", "bf16", "--attention", attention)
    through = train(*how, out="through")
    half = train(*how, "--save-every", "3", out="half")
    for path in checkpoints(half)[:1]:  # as if killed after step 6
        shutil.rmtree(path)
    assert main(["train", "--resume", "half"]) == 0
    assert same_weights(through, half)
    assert [r["loss"] for r in records(half)] == [r["loss"] for r in records(through)]


def test_another_seed_is_another_run() -> None:
    assert not same_weights(train(), train("--seed", "7", out="other"))


def test_the_micro_batch_changes_only_rounding() -> None:
    one, other = train("--dropout", "0"), train("--dropout", "0", "--micro-batch", "4", out="b")
    for name, tensor in weights(one, 8).items():
        torch.testing.assert_close(tensor, weights(other, 8)[name], rtol=1e-4, atol=1e-5)


# `gptsmith train` whose seventh step lasts until the signal has been sent.
HELD_UP = """
import pathlib, sys, time
from gptsmith.cli.main import main
from gptsmith.training.loop import Trainer
step = Trainer.step
def held_up(self, done):
    if done == 6:
        pathlib.Path("reached").touch()
        while not pathlib.Path("signalled").exists():
            time.sleep(0.01)
    return step(self, done)
Trainer.step = held_up
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.system("posix", "sends signals")
@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_to_stop_it_saves_and_goes_on_to_the_same_end(
    signal_number: int, trainers: Forking
) -> None:
    seldom = ("--evaluate-every", "9", "--save-every", "5")
    whole = train(*seldom, steps=20)
    words = ["train", "text.txt", *TINY, *seldom, "--steps", "20", "--out", "stopped"]
    where: Any = {"folder": Path(), "environment": os.environ}
    run = Path("stopped")
    with trainers.start(HELD_UP, *words, **where) as process:
        until(Path("reached").exists)
        process.send_signal(signal_number)
        Path("signalled").touch()
        said = process.done().stderr
    assert process.returncode == 128 + signal_number, said
    if signal_number != signal.SIGHUP:  # nobody reads it then
        assert "Stopping: step 7 is finished, and the run is saved." in said
        assert "Stopped and saved after" in said
        assert "gptsmith train --resume stopped" in said
    assert records(run)[-1]["step"] == 7
    assert (run / "last").read_text() == "step-00000007\n"
    assert main(["train", "--resume", "stopped"]) == 0
    assert same_weights(whole, run, 20)
    assert [event["event"] for event in events(run)] == ["started", "resumed"]


def test_resuming_what_is_finished_says_so_and_changes_nothing() -> None:
    run = train()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix == ".safetensors"}
    assert main(["train", "--resume", str(run)]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert [record["step"] for record in records(run)] == list(range(1, 9))


def test_a_damaged_checkpoint_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    run = train()
    expected = {name: tensor.clone() for name, tensor in weights(run, 8).items()}
    newest = run / "checkpoints" / "step-00000008" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-30])
    capsys.readouterr()
    assert main(["sample", str(run), "--seed", "1", "--max-tokens", "3"]) == 0
    assert "using" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    said = capsys.readouterr().err
    assert "model.safetensors has" in said
    assert "step-00000004 instead" in said
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(run, 8).items())
    assert [record["step"] for record in records(run)] == list(range(1, 9))


def test_a_change_of_machine_in_mid_run_is_recorded() -> None:
    run = train()
    assert main(["train", "--resume", str(run), "--micro-batch", "2", "--keep", "5"]) == 0
    assert events(run)[-1]["changes"] == {"micro_batch": "2", "keep": "5"}


@pytest.mark.slow
def test_two_processes_cannot_train_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    run = train()
    with FileLock(run / ".lock"):
        process = started("--resume", str(run))
        _, said = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "is being trained by another process: wait, or stop it" in said
    assert main(["train", "--resume", str(run)]) == 0


@pytest.mark.slow
def test_a_diverging_run_stops_with_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the sixth step on there is no gradient, so that nobody knows what the fifth has left."""

    def gradient(self: Trainer, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = original(self, tokens, targets)
        done = len(records(Path("my run"))) if Path("my run/metrics.jsonl").exists() else 0
        return loss * math.nan if done >= 5 else loss

    original = Trainer.gradient
    words = ["text.txt", *TINY, "--steps", "50", "--out", "my run", "--save-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "gradient", gradient)
        assert main(["train", *words]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "not finite for 5 steps in a row" in said
    assert "the last good checkpoint is my run/checkpoints/step-00000004" in said
    assert "--from 'my run/checkpoints/step-00000004'" in said
    assert "--learning-rate 0.00067" in said
    assert any(event["event"] == "skipped" for event in events(Path("my run")))
    follow_advice(said)
    assert len(records(Path("runs/config-1"))) == 50
    with monkeypatch.context() as patch:  # from the first step on
        patch.setattr(Trainer, "gradient", lambda *given: original(*given) * math.nan)
        assert main(["train", *words[:-4], "--out", "none"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "start again with `gptsmith train" in said
    follow_advice(said)
    assert len(records(Path("runs/config-2"))) == 50


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_never_learned_has_no_good_checkpoint(
    optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["text.txt", *TINY, "--steps", "50", "--out", "run", "--save-every", "1"]
    words += ["--optimizer", optimizer, "--muon-learning-rate", "1e30"]
    assert main(["train", *words, "--learning-rate", "1e30", "--grad-clip", "none"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no checkpoint is known to be better than a uniform guess" in said
    assert "--from" not in said
    assert "--learning-rate 3.3e+29" in said
    assert ("--muon-learning-rate 3.3e+29" in said) == (optimizer == "muon")


def follow_advice(said: str) -> None:
    """Do what an error advises between backticks."""
    command = re.search("`gptsmith (.*)`", said)
    assert command, said
    assert main(shlex.split(command[1])) == 0


@pytest.mark.slow
def test_a_run_that_ends_worse_than_a_guess_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    train("--learning-rate", "30", "--min-learning-rate", "15", "--warmup-steps", "0")
    said = capsys.readouterr().err
    assert "predicts worse than a uniform guess, whose loss is 3." in said
    (advised,) = re.findall(r"^  gptsmith (train .*)", said, re.M)
    assert main(shlex.split(advised)) == 0
    assert read_toml(Path("runs/config-1/config.toml")).training.learning_rate == 10
    capsys.readouterr()
    train(out="good")
    assert "uniform guess" not in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tuning_starts_from_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    run = train(steps=30)
    best = min(r["validation_loss"] for r in records(run) if "validation_loss" in r)
    words = ["finetune-gpt2", "--from", str(run), "--data", "text.txt", "--out", "tuned"]
    words += ["--steps", "2", "--batch-tokens", "48", "--evaluate-every", "1"]
    words += ["--dtype", "float32", "--threads", "1"]
    assert main(["train", *words]) == 0
    assert records(Path("tuned"))[0]["validation_loss"] == pytest.approx(best, abs=0.02)
    config = json.loads((Path("tuned/checkpoints/step-00000002") / "config.json").read_text())
    assert (config["n_layer"], config["n_embd"]) == (1, 8)
    assert main(["train", *words[:-2], "--out", "b", "--n-layer", "2"]) == 2
    assert "--n-layer cannot go with --from" in capsys.readouterr().err


def test_data_of_another_tokenizer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run = train()
    assert main(["prepare", "text.txt", "--tokenizer", "byte", "--out", "bytes"]) == 0
    words = ["finetune-gpt2", "--from", str(run), "--data", "bytes", "--out", "tuned"]
    assert main(["train", *words]) == 2
    assert "was made with another tokenizer" in capsys.readouterr().err
    assert not Path("tuned").exists()
    assert main(["evaluate", str(run), "--data", "bytes"]) == 2
    assert "was made with another tokenizer" in capsys.readouterr().err


@pytest.mark.slow
def test_published_shards_need_a_tokenizer_and_are_checked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The header as others write it, written here by hand."""
    folder = Path("shards")
    folder.mkdir()
    for name, count in (("fineweb_train_000001.bin", 400), ("fineweb_val_000000.bin", 90)):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, 1, count
        ids = np.arange(count) % 300
        (folder / name).write_bytes(header.tobytes() + ids.astype(np.uint16).tobytes())
    words = [w for w in TINY if w not in ("--tokenizer", "char")]
    words = ["shards", *words, "--steps", "4", "--out", "run"]
    assert main(["train", *words, "--tokenizer", "byte"]) == 2
    assert "has a token 299, but the vocabulary ends at 256" in capsys.readouterr().err
    assert main(["train", *words, "--tokenizer", "gpt2"]) == 0
    assert records(Path("run"))[-1]["validation_tokens"] == 89


def torchrun(processes: int, *words: str) -> None:
    """`gptsmith` in several processes, as it is used."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, str(processes), "-m", "gptsmith", *words],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "dropout", "by_torchrun"),
    [(2, "0", False), (2, "0.1", True), (4, "0", False), (4, "0.1", False)],
)
def test_processes_learn_what_one_does(
    processes: int, dropout: str, by_torchrun: bool, in_processes: Together
) -> None:
    """Rows that do not divide evenly, and a micro-batch that does not divide them either."""
    words = ["--batch-tokens", "40", "--micro-batch", "2", "--dropout", dropout]
    one = train(*words)
    start = torchrun if by_torchrun else in_processes
    start(processes, "train", "text.txt", *TINY, "--steps", "8", "--out", "many", *words)
    assert_same_learning(one, Path("many"))
    assert events(Path("many"))[0]["processes"] == processes


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (2, 4)])
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_a_run_goes_on_in_another_number_of_processes(
    first: int, then: int, dropout: str, in_processes: Together
) -> None:
    words = ["--batch-tokens", "40", "--dropout", dropout, "--save-every", "3", "--keep", "9"]
    one = train(*words)
    in_processes(first, "train", "text.txt", *TINY, "--steps", "8", "--out", "many", *words)
    for path in checkpoints(Path("many")):  # as if killed after step 3
        if path.name > "step-00000003":
            shutil.rmtree(path)
    in_processes(then, "train", "--resume", "many")
    assert_same_learning(one, Path("many"))
    resumed = events(Path("many"))[-1]
    assert (resumed["event"], resumed["step"], resumed["processes"]) == ("resumed", 3, then)


def assert_same_learning(one: Path, other: Path, steps: int = 8, *, rounding: float = 1e-5) -> None:
    """The same losses, and weights but for rounding."""
    for name, tensor in weights(one, steps).items():
        torch.testing.assert_close(tensor, weights(other, steps)[name], rtol=1e-3, atol=rounding)
    assert_same_losses(one, other)


def assert_same_losses(one: Path, other: Path) -> None:
    for first, second in zip(records(one), records(other), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], abs=1e-6)
        found = second.get("validation_loss", 0)
        assert first.get("validation_loss", 0) == pytest.approx(found, abs=1e-6)
