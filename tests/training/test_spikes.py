"""Spikes of the loss: what is one, and what each policy does about it, in runs that have some."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import median_abs_deviation

from gptsmith.cli.main import main
from gptsmith.data.batches import Batches
from gptsmith.training import records as run_records
from gptsmith.training.loop import DivergedError, SpikeError, Trainer, steps
from gptsmith.training.rollback import (
    Good,
    Rollback,
    batch_number,
    plan_rollback,
    rate_factor,
    with_good,
)
from gptsmith.training.spikes import LEAST, WINDOW, Recent
from tests.training.test_loop import make_trainer

# Short enough that each part of the text is learned from several times.
FLAGS = (
    "--tokenizer char --n-layer 1 --n-head 2 --n-embd 16 --context-length 32 --dropout 0.1 "
    "--batch-tokens 64 --warmup-steps 2 --evaluate-every 20 --sample-tokens 5 --threads 1 --keep 1 "
    "--dtype float32 --attention kernel --learning-rate 0.01 --steps 120 --fused no --compile no"
).split()


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text that is easy to predict, but for 128 letters of noise; and no plots."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_records, "draw_curves", lambda *given, **how: None)
    noise = "".join(random.Random(1).choices("abcdefgh", k=128))
    (tmp_path / "text.txt").write_text("abcdefgh" * 750 + noise + "abcdefgh" * 250)
    return tmp_path


def train(out: str, *words: str) -> int:
    return main(["train", "text.txt", *FLAGS, "--out", out, *words])


def records(run: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def events(run: str, kind: str) -> list[dict[str, Any]]:
    lines = Path(run, "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def losses(run: str) -> list[float]:
    return [record["loss"] for record in records(run)]


def assert_same_end(one: str, other: str) -> None:
    assert losses(one) == losses(other)
    last = Path("checkpoints/step-00000120/model.safetensors")
    first, second = load_file(one / last), load_file(other / last)
    assert all(torch.equal(first[name], second[name]) for name in first)


# -- what a spike is


def test_the_spread_is_what_scipy_says() -> None:
    recent, generator = Recent({}), np.random.default_rng(1)
    values = generator.gamma(9.0, 0.3, size=(WINDOW + 40, 2))
    for loss, norm in values:
        recent.add(loss, norm)
    kept = values[-WINDOW:]
    for name, column in (("loss", kept[:, 0]), ("grad_norm", np.log(kept[:, 1]))):
        spread = median_abs_deviation(column, scale="normal")
        value = np.median(column) + 12 * spread
        given = value if name == "loss" else math.exp(value)
        assert recent.spreads_above(name, given) == pytest.approx(12, rel=1e-3)


def test_only_what_is_far_above_is_a_spike_and_only_after_some_steps() -> None:
    recent = Recent({})
    for step in range(LEAST):
        assert recent.spike(1000.0, 1000.0) is None, step
        recent.add(3 + 0.1 * math.sin(step), 2.0)
    assert recent.spike(3.4, 2.0) is None  # four spreads
    assert recent.spike(0.0, 0.0) is None
    assert recent.spike(3.0, 14.0) is None  # seven times the norm
    assert "the loss 4.5 is" in str(recent.spike(4.5, 2.0))
    assert "the gradient norm 15 is" in str(recent.spike(3.0, 15.0))
    again = Recent(json.loads(json.dumps(recent.state())))
    assert again.spike(4.5, 2.0) == recent.spike(4.5, 2.0)


@pytest.mark.parametrize("scale", [0.05, 0.3])
def test_ordinary_noise_is_no_spike(scale: float) -> None:
    """A curve that falls, with normal noise of the loss and lognormal noise of the norm."""
    recent, generator = Recent({}), np.random.default_rng(2)
    for step in range(20_000):
        loss = 2 + 8 / (1 + step / 50) + scale * generator.standard_normal()
        norm = math.exp(2 * scale * generator.standard_normal())
        assert recent.spike(loss, norm) is None, step
        recent.add(loss, norm)


# -- where a run goes back to


def test_batches_that_are_left_out_change_nothing_else_of_the_order() -> None:
    first = Rollback(9, 4, [5, 6, 7], 0.5)
    second = Rollback(7, 4, [4, 8, 9], 0.1)
    assert [batch_number(step, [first]) for step in range(8)] == [0, 1, 2, 3, 4, 8, 9, 10]
    assert [batch_number(step, [first, second]) for step in range(6)] == [0, 1, 2, 3, 10, 11]
    assert [rate_factor(step, [first, second]) for step in (3, 4)] == [1.0, pytest.approx(0.05)]
    assert [batch_number(step, []) for step in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("every", [1, 3, 16, 50])
def test_the_checkpoints_that_are_kept_suffice_for_a_spike_at_any_step(every: int) -> None:
    """At most two; and none is further back than it must be, but for two times sixteen steps."""
    good: list[Good] = []
    for step in range(1, 400):
        rollback = plan_rollback(step, good, [], 1.0)
        assert rollback is not None
        assert rollback.batches == list(range(max(0, step - 16), step))
        assert rollback.to in {0, *(each.step for each in good)}
        assert rollback.to <= rollback.batches[0] <= rollback.to + max(every, 16) + 16
        if step % every == 0:
            good = with_good(good, Good(step, None))
        assert len(good) <= 2


def test_the_same_checkpoint_helps_three_times() -> None:
    before = [Rollback(70, 50, [60], 1.0)] * 3
    assert plan_rollback(80, [Good(50, None)], before[:2], 1.0) is not None
    assert plan_rollback(80, [Good(50, None)], before, 1.0) is None
    assert plan_rollback(60, [Good(50, None)], before, 1.0) == Rollback(
        60, 0, [*range(44, 60)], 1.0
    )


# -- whole runs


def test_by_default_a_spike_is_reported_and_changes_no_bit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("watched") == 0
    found = events("watched", "spike")
    assert found
    for event in found:
        loss = records("watched")[event["step"] - 1]["loss"]
        assert (event["loss"], event["skipped"]) == (loss, False)
        assert loss > 1
    assert "above" in capsys.readouterr().err
    monkeypatch.setattr(Recent, "spike", lambda *given: None)
    assert train("unwatched") == 0
    assert not events("unwatched", "spike")
    assert_same_end("watched", "unwatched")


def test_skip_leaves_out_the_update_and_resumes_to_the_same_bits() -> None:
    assert train("run", "--on-spike", "skip") == 0
    skipped = [record["step"] for record in records("run") if record.get("skipped")]
    assert skipped == [event["step"] for event in events("run", "spike")]
    assert skipped
    assert train("halted", "--on-spike", "skip", "--stop-after", str(skipped[0] - 3)) == 0
    assert main(["train", "--resume", "halted"]) == 0
    assert_same_end("run", "halted")


def test_several_spikes_in_a_row_are_no_spikes_of_the_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Trainer.gradient

    def gradient(self: Trainer, *batch: torch.Tensor) -> torch.Tensor:
        return original(self, *batch) + (9 if self.done >= 80 else 0)

    monkeypatch.setattr(Trainer, "gradient", gradient)
    assert train("run", "--on-spike", "skip") == 2
    said = capsys.readouterr().err
    assert "step 85: the loss or gradient was a spike for 5 steps in a row" in said
    assert "start a run from it with `gptsmith train" in said


def test_stop_saves_the_run_and_another_choice_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("whole", "--on-spike", "skip") == 0
    step = events("whole", "spike")[0]["step"]
    assert train("run", "--on-spike", "stop") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"gptsmith: step {step}: the loss " in said
    assert f"saved after step {step - 1}" in said
    assert "`gptsmith train --resume run --on-spike skip`" in said
    assert Path("run/last").read_text() == f"step-{step - 1:08}\n"
    assert len(records("run")) == step - 1
    assert main(["train", "--resume", "run"]) == 2  # as before
    assert main(["train", "--resume", "run", "--on-spike", "skip"]) == 0
    assert_same_end("whole", "run")
    changes = [event["changes"] for event in events("run", "resumed")]
    assert changes == [{}, {"on_spike": "skip"}]


def test_a_rollback_ends_with_the_run_that_never_saw_these_batches(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run", "--on-spike", "rollback") == 0
    found = events("run", "rollback")
    assert found
    assert f"back to step {found[0]['to']}, and on without 16 batches" in capsys.readouterr().err
    assert [record["step"] for record in records("run")] == list(range(1, 121))
    assert max(losses("run")[70:]) < 1
    recorded = json.loads(Path("run/rollbacks.json").read_text())
    left_out = {number for each in recorded for number in each["batches"]}
    assert left_out == {number for event in found for number in event["batches"]}
    assert len(left_out) == 16 * len(found)

    order = [number for number in range(400) if number not in left_out]
    original = Batches.at
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "at", lambda self, step: original(self, order[step]))
        assert train("never", "--on-spike", "stop") == 0
    assert_same_end("run", "never")

    for number, stop in enumerate((found[0]["step"] - 1, 100)):
        out = f"halted-{number}"
        assert train(out, "--on-spike", "rollback", "--stop-after", str(stop)) == 0
        assert main(["train", "--resume", out]) == 0
        assert_same_end("run", out)
        assert json.loads(Path(out, "rollbacks.json").read_text()) == recorded


def test_a_rollback_before_the_first_checkpoint_starts_again_with_a_lower_rate() -> None:
    words = ("--evaluate-every", "110", "--on-spike", "rollback", "--rollback-rate", "0.5")
    assert train("run", *words) == 0
    found = events("run", "rollback")
    assert {event["to"] for event in found} == {0}
    rates = {record["learning_rate"] for record in records("run")[2:4]}
    assert max(rates) == pytest.approx(0.01 * 0.5 ** len(found), rel=0.01)


def test_rollbacks_that_do_not_help_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From step 81 on, every batch has a huge gradient; without noise, nothing else is a spike."""
    Path("text.txt").write_text("abcdefgh" * 1000)
    original = Trainer.clip
    monkeypatch.setattr(
        Trainer, "clip", lambda self: original(self) * (1e9 if self.done >= 80 else 1)
    )
    assert train("run", "--on-spike", "rollback") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 81: the gradient norm " in said
    assert "3 rollbacks to the same step have not helped; the last good checkpoint is" in said
    assert len([event for event in events("run", "rollback") if event["to"] == 60]) == 3


def test_a_run_that_diverges_is_taken_back_too() -> None:
    trainer = make_trainer(steps=50, on_spike="rollback")
    trainer.model.ln_f.weight.data[0] = float("nan")
    with pytest.raises(SpikeError, match=r"step 5: .* not finite for 5 steps in a row"):
        list(steps(trainer, 0))
    trainer = make_trainer(steps=50, on_spike="skip")
    trainer.model.ln_f.weight.data[0] = float("nan")
    with pytest.raises(DivergedError):
        list(steps(trainer, 0))


def test_labels_have_no_spikes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.dumps({"text": f"{n}", "label": "ab"[n % 2]}) + "\n" for n in range(40)]
    Path("rows.jsonl").write_text("".join(rows))
    words = ["finetune", "fresh", "--data", "rows.jsonl", "--task", "classify"]
    assert main([*words, "--on-spike", "skip"]) == 2
    said = capsys.readouterr().err
    assert "--on-spike has no effect on the task classify, only on text, chat and pref" in said
    assert main(["train", "text.txt", "--on-spike", "skip", "--rollback-rate", "0"]) == 2
    assert "--rollback-rate is 0.0: above 0 is needed" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_come_to_the_same_decisions() -> None:
    assert train("one", "--on-spike", "rollback", "--steps", "80") == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = ["--nproc-per-node", "2", "-m", "gptsmith", "train", "text.txt", *FLAGS]
    more = ["--out", "two", "--on-spike", "rollback", "--steps", "80"]
    subprocess.run([*torchrun, *words, *more], check=True)
    assert events("one", "rollback")
    assert losses("two") == pytest.approx(losses("one"), abs=1e-6)
    one, two = (json.loads(Path(run, "rollbacks.json").read_text()) for run in ("one", "two"))
    assert one == two
