"""Where a step's time goes: without gap or overlap, on the right row, and changing nothing."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import profile_training
import pytest
import torch
from profile_training import Clock, muon_flops, training_flops, watched
from torch.utils.flop_counter import FlopCounterMode

from gptsmith.cli.timing import fresh_trainer
from gptsmith.config import cost
from gptsmith.config.model import PRESETS, GPTConfig
from gptsmith.config.recipe import read_toml, recipes
from gptsmith.config.settings import MachineSettings
from gptsmith.model import gpt
from gptsmith.model.attention import by_kernel
from gptsmith.training.loop import Trainer
from gptsmith.training.muon import Muon

TINY = GPTConfig(vocab_size=23, context_length=6, n_layer=2, n_head=3, n_embd=12, dropout=0.1)
UNTIED = (
    "vocab_size = 23\ncontext_length = 6\nn_layer = 2\nn_head = 3\nn_embd = 12\n"
    "tie_weights = false\nqkv_bias = false\n"
)
ROWS, T = 4, TINY.context_length
NAP = 0.02  # seconds
OPTIMIZERS = {
    "adamw": ["optimizer AdamW"],
    "muon": ["optimizer AdamW", "optimizer Muon"],
}
INSIDE = "embeddings norms attn.c_attn attention attn.c_proj mlp.c_fc activation mlp.c_proj".split()
INSIDE += ["head and loss"]
BESIDE = ["gradient clipping", "batch loading", "everything else"]


def trainer_of(
    optimizer: Any = "muon", dtype: Any = "float32", attention: Any = "kernel"
) -> Trainer:
    machine = MachineSettings(
        device="cpu", dtype=dtype, attention=attention, compile="no", fused="no"
    )
    return fresh_trainer(TINY, machine, rows=ROWS, steps=9, optimizer=optimizer)


def timed_step(trainer: Trainer, done: int = 0) -> tuple[profile_training.Times, float, float]:
    """The times of a step's parts, and two others of it: from inside, and from outside."""
    clock = Clock(trainer.device)
    with watched(trainer, clock):
        before = time.perf_counter()
        clock.start()
        report = trainer.step(done)
        times = clock.stop()
        return times, report.seconds, time.perf_counter() - before


@pytest.mark.parametrize("name", PRESETS)
def test_the_arithmetic_is_that_of_cost(name: str) -> None:
    config = PRESETS[name]
    parts = training_flops(config, 7)
    assert sum(parts.values()) == 7 * cost.flops_per_token(config, training=True)
    assert parts["mlp.c_fc"] == 3 * 2 * 7 * config.n_layer * config.n_embd * config.mlp_size


def test_the_arithmetic_of_muon_is_what_pytorch_counts() -> None:
    trainer = trainer_of("muon")
    (muon,) = (each for each in trainer.optimizers if isinstance(each, Muon))
    trainer.gradient(*trainer.batch(0))
    with FlopCounterMode(display=False) as counter:
        muon.step()
    assert muon_flops(muon) == counter.get_total_flops() > 0


@pytest.mark.parametrize("micro_batch", [1, ROWS])
@pytest.mark.parametrize("attention", ["kernel", "blocks"])
def test_the_parts_are_the_step(attention: str, micro_batch: int) -> None:
    trainer = trainer_of(attention=attention)
    trainer.micro_batch = micro_batch
    times, inside, outside = timed_step(trainer)
    assert inside <= sum(times.values()) <= outside
    for part in INSIDE:
        assert times[part, "forward"] > 0
        assert times[part, "backward"] > 0
        assert (part, "neither") not in times
    assert {part for part, way in times if way == "neither"} == {*OPTIMIZERS["muon"], *BESIDE}


class Nap(torch.autograd.Function):
    """The tensor itself, late in both passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(NAP)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        time.sleep(2 * NAP)
        return grad


def slow(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values, **named: Nap.apply(function(*values, **named))


def late(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*values: Any, **named: Any) -> Any:
        time.sleep(NAP)
        return function(*values, **named)

    return call


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("wte", "embeddings"),
        ("wpe", "embeddings"),
        ("h.1.ln_1", "norms"),
        ("h.0.attn.c_attn", "attn.c_attn"),
        ("h.1.attn.c_proj", "attn.c_proj"),
        ("h.0.attn.drop", "everything else"),
        ("h.0.ln_2", "norms"),
        ("h.1.mlp.c_fc", "mlp.c_fc"),
        ("h.0.mlp.activation", "activation"),
        ("h.1.mlp.c_proj", "mlp.c_proj"),
        ("h.1.mlp.drop", "everything else"),
        ("ln_f", "norms"),
        ("head_loss", "head and loss"),
    ],
)
def test_what_is_slow_is_on_its_row(
    module: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of("adamw")
    if module == "head_loss":
        monkeypatch.setattr(gpt, "head_loss", slow(gpt.head_loss))
    else:
        owner = trainer.model.get_submodule(module)
        owner.forward = slow(owner.forward)
    times, _, _ = timed_step(trainer)
    assert times[part, "forward"] >= NAP
    assert times[part, "backward"] >= 2 * NAP


def test_slow_attention_is_on_its_row() -> None:
    trainer = trainer_of("adamw", "bf16")
    trainer.model.attend_by(slow(by_kernel))
    times, _, _ = timed_step(trainer)
    assert times["attention", "forward"] >= TINY.n_layer * NAP
    assert times["attention", "backward"] >= TINY.n_layer * 2 * NAP


def test_what_is_slow_beside_the_passes_is_on_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of("muon")
    adamw, muon = trainer.optimizers
    clip = torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch:
        for owner, name in [(adamw, "step"), (muon, "step"), (trainer, "load")]:
            patch.setattr(owner, name, late(getattr(owner, name)))
        patch.setattr(torch.nn.utils, "clip_grad_norm_", late(clip))
        times, _, _ = timed_step(trainer)
    for part in (*OPTIMIZERS["muon"], "gradient clipping", "batch loading"):
        assert times[part, "neither"] >= NAP
    assert times["batch loading", "neither"] >= 2 * NAP  # the first batch, and the second


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_watching_changes_nothing(dtype: str) -> None:
    plain, seen = (trainer_of(dtype=dtype, attention="blocks") for _ in range(2))
    before = {name: set(vars(module)) for name, module in seen.model.named_modules()}
    for done in range(3):
        report = plain.step(done)
        clock = Clock(seen.device)
        with watched(seen, clock):
            assert seen.step(done).loss == report.loss
    for ours, theirs in zip(seen.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert before == {name: set(vars(module)) for name, module in seen.model.named_modules()}
    marks = len(clock.marks)
    seen.step(3)
    assert len(clock.marks) == marks


Call = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Call:
    """`profile_training.py` with these words: the last line of its file, and what it shows."""
    monkeypatch.setattr(profile_training, "LONG_ENOUGH", 1e-9)  # one small product gives the rate
    out = tmp_path / "results.jsonl"

    def call(*words: object) -> tuple[dict[str, Any], str]:
        given = map(str, [*words, "--device", "cpu", "--out", out])
        monkeypatch.setattr(sys, "argv", ["profile_training.py", *given])
        profile_training.main()
        return json.loads(out.read_text().splitlines()[-1]), capsys.readouterr().out

    return call


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[bool], Path]:
    """A tiny model, its head tied or not."""
    path = tmp_path / "tiny.toml"

    def write(tied: bool) -> Path:
        path.write_text(f"[model]\n{UNTIED.replace('false', 'true') if tied else UNTIED}")
        return path

    return write


@pytest.mark.parametrize(
    ("optimizer", "dtype", "tied"), [("adamw", "float32", True), ("muon", "bf16", False)]
)
def test_the_file_and_the_table_have_the_profile(
    optimizer: str, dtype: str, tied: bool, bench: Call, recipe: Callable[[bool], Path]
) -> None:
    words = ["--steps", 3, "--optimizer", optimizer, "--dtype", dtype]
    found, shown = bench(recipe(tied), *words)
    measured = found["profile"]
    parts = {part.pop("part"): part for part in measured["parts"]}
    assert list(parts) == [*INSIDE, *OPTIMIZERS[optimizer], *BESIDE]
    for column in ("forward_milliseconds", "backward_milliseconds", "milliseconds", "gigaflops"):
        whole = sum(part[column] for part in parts.values())
        assert measured["sum"][column] == pytest.approx(whole)
    assert sum(part["share"] for part in parts.values()) == pytest.approx(1)
    config = GPTConfig(**{**vars(TINY), "dropout": 0.0, "tie_weights": tied, "qkv_bias": tied})
    flops = cost.flops_per_token(config, training=True) * found["batch_tokens"]
    assert sum(parts[name]["gigaflops"] for name in INSIDE) == pytest.approx(flops / 1e9)
    rate = measured["matrix_gigaflops_per_second"]
    for part in parts.values():
        if part["gigaflops"]:
            speed = 1000 * part["gigaflops"] / part["milliseconds"]
            assert part["gigaflops_per_second"] == pytest.approx(speed)
            assert part["of_matrix_rate"] == pytest.approx(speed / rate)
    overhead = measured["sum"]["milliseconds"] / found["step_milliseconds"] - 1
    assert measured["overhead"] == pytest.approx(overhead)
    assert found["parameters"] == cost.parameter_count(config)
    table = shown[shown.index("forward ms") :].splitlines()
    for line, name in zip(table[1:], [*parts, "sum"], strict=False):
        assert line.startswith(name)
    assert "100.0%" in table[len(parts) + 1]


def test_muon_has_no_share_of_a_rate_in_another_precision(
    bench: Call, recipe: Callable[[bool], Path]
) -> None:
    words = ["--steps", 3, "--optimizer", "muon", "--dtype", "float32"]
    measured = bench(recipe(False), *words)[0]["profile"]
    shares = {part["part"]: part["of_matrix_rate"] for part in measured["parts"]}
    assert shares["optimizer Muon"] is None
    assert measured["sum"]["of_matrix_rate"] is None
    assert shares["mlp.c_fc"] > 0


def test_the_modern_block_has_the_same_parts(bench: Call) -> None:
    words = "shakespeare-modern --rows 2 --steps 2 --optimizer muon".split()
    found, _ = bench(*words)
    parts = {part["part"]: part for part in found["profile"]["parts"]}
    config = read_toml(recipes()["shakespeare-modern"]).model
    flops = cost.flops_per_token(config, training=True) * 2 * config.context_length
    inside = [part for name, part in parts.items() if not name.startswith("optimizer")]
    assert sum(part["gigaflops"] for part in inside) == pytest.approx(flops / 1e9)
    assert parts["norms"]["milliseconds"] > 0
    assert parts["activation"]["backward_milliseconds"] > 0


def test_an_interrupted_profile_is_that_of_the_steps_so_far(
    bench: Call, recipe: Callable[[bool], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, done = Trainer.step, []

    def interrupted(trainer: Trainer, number: int) -> Any:
        done.append(number)
        if number == profile_training.WARM_UP + 2 * 3:  # the third pair that counts
            raise KeyboardInterrupt
        return step(trainer, number)

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(recipe(True), "--steps", 90)
    *steps, whole = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert len(steps) == whole["profile"]["steps"] == 2
    assert all(line["seconds"] > 0 and line["profiled_seconds"]["norms forward"] for line in steps)


def test_the_matrix_rate_is_of_a_product() -> None:
    rate, side = profile_training.matrix_rate(torch.device("cpu"), torch.float32)
    assert rate > 1e9
    assert side in (512, 1024, 2048, 4096, 8192)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--steps 0", "4 rows, 0 steps: at least 1 is needed"),
        ("--dtype int4", "--dtype is 'int4': one of auto, float32, bf16, fp16, fp8 is needed"),
    ],
)
def test_what_is_refused(
    words: str, said: str, bench: Call, recipe: Callable[[bool], Path]
) -> None:
    with pytest.raises(ValueError, match=said):
        bench(recipe(True), *words.split())
