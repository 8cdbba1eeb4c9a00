"""What is automatic in a run is measured, recorded, and never measured again."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith.cli.main import main
from gptsmith.config import cost
from gptsmith.config.fitting import MEMORY_SHARE
from gptsmith.config.model import MODERN, GPTConfig
from gptsmith.config.recipe import read_toml, recipes
from gptsmith.config.settings import MachineSettings
from gptsmith.machine import chooser, devices
from gptsmith.model.fused import FusedBlock
from gptsmith.training import choices
from gptsmith.training.choices import choose_ways, sizes, ways
from gptsmith.training.loop import Trainer
from gptsmith.training.memory import choose_recompute, micro_batch_rows
from gptsmith.training.trainer import use
from tests.conftest import TINY as TOY
from tests.conftest import Together
from tests.training.test_loop import make_trainer
from tests.training.test_run import TEXT, TINY, events, here, records, same_weights

__all__ = ["here"]  # each test in a folder of its own, with a text

AUTO = [word for word in TINY if word not in ("--dtype", "float32", "--attention", "kernel")]
AUTO += ["--fused", "no"]  # which needs a compiler; test_the_fused_pieces_are_a_candidate has it
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is measured is remembered by one test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gptsmith" / "speed"


@pytest.fixture(autouse=True)
def both_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that can multiply bf16, whatever the machine of the tests can."""
    monkeypatch.setattr(devices, "precisions", lambda device: ["float32", "bf16"])


class Slowed:
    """A machine whose passes take, by its own clock, what its precision and attention say.

    A pass takes so long for each row, and each micro-batch a little more.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float]) -> None:
        self.speeds, self.now, self.passes = speeds, 0.0, list[str]()
        original = Trainer.gradient

        def gradient(trainer: Trainer, tokens: Tensor, targets: Tensor) -> Tensor:
            attention = trainer.model.get_submodule("h.0.attn").attend
            name = f"{trainer.dtype}, {attention.__name__.removeprefix('by_')}"  # type: ignore[operator, union-attr]
            self.passes.append(name)
            micro_batches = -(-len(tokens) // trainer.micro_batch)
            self.now += self.speeds[name] * (len(tokens) + 0.5 * micro_batches)
            return original(trainer, tokens, targets)

        monkeypatch.setattr(Trainer, "gradient", gradient)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


SPEEDS = {"float32, kernel": 2.0, "float32, blocks": 2.2, "bf16, kernel": 3.0, "bf16, blocks": 4.0}
FAST_BF16 = {**SPEEDS, "bf16, blocks": 1.0}


def chosen(monkeypatch: pytest.MonkeyPatch, speeds: dict[str, float], **asked: Any) -> str:
    Slowed(monkeypatch, speeds)
    machine = devices.choose_to_learn(MachineSettings(device="cpu", threads=1, fused="no", **asked))
    way, measured = choose_ways(trainer := make_trainer(), machine, steps=10_000)
    assert trainer.dtype == way.dtype
    assert all(each.choice.seconds for each in measured)
    return f"{way.dtype}, {way.attention}"


def test_where_bf16_is_slow_it_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, SPEEDS) == "float32, kernel"


def test_where_bf16_is_fast_it_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, FAST_BF16) == "bf16, blocks"


def test_what_is_asked_for_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, FAST_BF16, dtype="float32") == "float32, kernel"
    assert chosen(monkeypatch, FAST_BF16, attention="kernel") == "float32, kernel"
    assert chosen(monkeypatch, SPEEDS, dtype="bf16", attention="blocks") == "bf16, blocks"


def test_what_can_run_is_not_more_than_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    config, machine = make_trainer().model.config, MachineSettings(threads=1, fused="no")
    names = [f"{dtype}, {path}" for dtype in ("float32", "bf16") for path in ("kernel", "blocks")]
    assert list(ways(machine, config, 6, CPU)) == names
    monkeypatch.setattr(devices, "precisions", lambda device: ["float32"])
    assert list(ways(machine, config, 6, CPU)) == ["kernel", "blocks"]
    monkeypatch.setattr(devices, "available_memory", lambda device: 1 << 40)
    (way,) = ways(machine, config, 6, torch.device("cuda")).values()
    assert (way.dtype, way.attention) == ("float32", "kernel")


def test_what_learns_decides_how_many_rows_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing learns, there is room for more rows than gradients and AdamW's state take."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, context_length=8, vocab_size=5000)
    free = (cost.training_memory(config, 4) + 1) / MEMORY_SHARE
    monkeypatch.setattr(devices, "available_memory", lambda device: free)
    assert micro_batch_rows(MachineSettings(dtype="float32"), config, 8, CPU) == 4
    assert micro_batch_rows(MachineSettings(dtype="float32"), config, 8, CPU, learned=0) == 8


@pytest.mark.parametrize(
    ("free", "asked", "rows", "expected"),
    [
        (1.1, "auto", 1, "no"),
        (0.9, "auto", 1, "yes"),
        (0.9, "no", 1, "no"),
        (1.1, "auto", 2, "no"),
    ],
)
def test_activations_are_recomputed_where_else_they_would_not_fit(
    free: float, asked: Any, rows: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`free`: times what one row takes without. Where they are recomputed, more rows fit."""
    config = GPTConfig(n_layer=9, n_head=2, n_embd=64, context_length=1024, vocab_size=65)
    room = free * cost.training_memory(config, 1) / MEMORY_SHARE
    monkeypatch.setattr(devices, "available_memory", lambda device: room)
    machine = MachineSettings(dtype="float32", recompute=asked, micro_batch=rows)
    chosen = choose_recompute(machine, config, CPU)
    assert chosen.recompute == expected
    fit = micro_batch_rows(replace(chosen, micro_batch=None), config, 8, CPU)
    assert fit == (1 if expected == "no" else 4)


@pytest.mark.slow
def test_the_fused_pieces_are_a_candidate(
    monkeypatch: pytest.MonkeyPatch, compiled_folder: Path
) -> None:
    """Where they can be built; a slow machine or another block does without."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_folder))
    config, machine = make_trainer().model.config, MachineSettings(threads=1)
    assert choices.possible(machine, config, CPU) == machine
    names = ["kernel", "blocks", "fused"]
    float32 = MachineSettings(threads=1, dtype="float32")
    assert list(ways(float32, config, 6, CPU)) == names
    assert choices.question(ways(float32, config, 6, CPU)) == "attention"
    assert list(ways(MachineSettings(threads=1, fused="yes"), config, 6, CPU)) == [
        "float32",
        "bf16",
    ]
    named = MachineSettings(threads=1, attention="kernel")
    assert choices.possible(named, config, CPU).fused == "no"
    modern = GPTConfig(**TOY | MODERN)
    assert choices.possible(machine, modern, CPU).fused == "no"
    for fast in names:
        monkeypatch.setattr(chooser, "FOLDER", str(compiled_folder / fast))
        trainer = make_trainer()

        def seconds(timing: Any, way: MachineSettings, tokens: int, *, fast: str = fast) -> float:
            use(timing.trainer, way)
            timing.trainer.gradient(*timing.trainer.load(0))
            return 1.0 if fast == ("fused" if way.fused == "yes" else way.attention) else 1.5

        monkeypatch.setattr(choices.Timing, "seconds", seconds)
        asked = devices.choose_to_learn(replace(float32, device="cpu"))
        way, _ = choose_ways(trainer, asked, steps=10_000)
        assert ("fused" if way.fused == "yes" else way.attention) == fast
        assert isinstance(trainer.model.h[0], FusedBlock) == (fast == "fused")


def test_micro_batches_are_halved_down_to_a_few_thousand_tokens() -> None:
    way = MachineSettings(micro_batch=100)
    assert list(sizes(way, 128)) == ["100 rows", "50 rows", "25 rows"]
    assert list(sizes(way, 64)) == ["100 rows", "50 rows"]
    assert list(sizes(way, 8)) == ["100 rows"]
    assert list(sizes(MachineSettings(micro_batch=1), 4096)) == ["1 rows"]


def test_the_largest_micro_batch_is_taken_where_it_is_as_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choices, "LEAST_MICRO_BATCH", 11)
    monkeypatch.setattr(choices, "SECONDS", 1e3)
    Slowed(monkeypatch, SPEEDS)
    machine = devices.choose_to_learn(MachineSettings(device="cpu", threads=1, fused="no"))
    way, measured = choose_ways(make_trainer(), machine, steps=10_000)
    assert way.micro_batch == 6
    assert [each.what for each in measured] == ["precision and attention", "micro-batch"]
    speeds = measured[1].speeds
    assert list(speeds) == ["6 rows", "3 rows", "2 rows"]
    assert speeds["6 rows"] == pytest.approx(66 / (2.0 * 6.5), abs=0.1)


def test_a_short_run_measures_less_and_remembers_nothing(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """The share of its tokens, but for passes of LEAST_TOKENS."""
    machine = devices.choose_to_learn(MachineSettings(device="cpu", threads=1, fused="no"))
    for steps, most in ((8, 9), (2000, 2000 * choices.SHARE)):
        slowed = Slowed(monkeypatch, SPEEDS)
        choose_ways(make_trainer(), machine, steps=steps)
        assert 5 <= len(slowed.passes) <= most
        assert cache.exists() == (steps == 2000)
        monkeypatch.undo()
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parents[1]))


# -- whole runs


def train(*words: str, out: str = "run", steps: int = 8) -> Path:
    assert main(["train", *words, "--steps", str(steps), "--out", out]) == 0
    return Path(out)


def measured_by(run: Path) -> dict[str, Any]:
    return dict(events(run)[0]["measured"])


def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> float:
        raise AssertionError("measured")

    monkeypatch.setattr(choices.Timing, "seconds", never)


@pytest.mark.slow
def test_measuring_changes_nothing_and_is_recorded_shown_and_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train("text.txt", *AUTO)
    (figures,) = measured_by(run).values()
    machine = read_toml(run / "config.toml").machine
    assert figures["choice"] == f"{machine.dtype}, {machine.attention}"
    assert list(figures["tokens_per_second"]) == list(SPEEDS)
    shown = capsys.readouterr().err
    speed = figures["tokens_per_second"][figures["choice"]]
    assert f"precision and attention: {figures['choice']}, {speed:,.0f} tokens/s (" in shown

    no_measuring(monkeypatch)
    named = ["--dtype", machine.dtype, "--attention", machine.attention]
    assert same_weights(run, train("text.txt", *AUTO, *named, out="named"))
    again = train(str(run / "config.toml"), out="again")
    assert same_weights(run, again)
    assert measured_by(again) == {}


@pytest.mark.slow
def test_resuming_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    through = train("text.txt", *AUTO, "--schedule", "constant", out="through")
    machine = read_toml(through / "config.toml").machine
    named = ["--dtype", machine.dtype, "--attention", machine.attention]
    half = train("text.txt", *AUTO, *named, "--schedule", "constant", steps=4, out="half")
    no_measuring(monkeypatch)
    assert main(["train", "--resume", "half", "--steps", "8"]) == 0
    assert same_weights(through, half)
    assert [r["loss"] for r in records(half)] == [r["loss"] for r in records(through)]
    assert events(half)[-1]["measured"] == {}


@pytest.mark.slow
def test_what_is_remembered_is_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    monkeypatch.setattr(choices, "SHARE", 1e3)
    first = measured_by(train("text.txt", *AUTO))
    no_measuring(monkeypatch)
    second = measured_by(train("text.txt", *AUTO, out="second"))
    (before,), (after,) = first.values(), second.values()
    assert (before["remembered"], after["remembered"]) == (False, True)
    assert before | {"remembered": True} == after
    (path,) = cache.iterdir()  # the figures decide, so others are another choice
    figures = json.loads(path.read_text())
    path.write_text(json.dumps(figures | {"bf16, kernel": min(figures.values()) / 2}))
    third = train("text.txt", *AUTO, out="third")
    machine = read_toml(third / "config.toml").machine
    assert (machine.dtype, machine.attention) == ("bf16", "kernel")


@pytest.mark.slow
def test_two_processes_agree(in_processes: Together) -> None:
    """Each has its own text of the event, and rank 0's is on disk; the losses are the same."""
    words = [*AUTO, "--steps", "8", "--dropout", "0"]
    in_processes(2, "train", "text.txt", *words, "--out", "two")
    machine = read_toml(Path("two/config.toml")).machine
    named = ["--dtype", machine.dtype, "--attention", machine.attention]
    one = train("text.txt", *AUTO, "--dropout", "0", *named)
    for first, second in zip(records(one), records(Path("two")), strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)


@pytest.mark.parametrize("name", list(recipes()))
def test_no_recipe_fixes_what_is_measured(name: str) -> None:
    machine = read_toml(recipes()[name]).machine
    assert (machine.dtype, machine.attention, machine.micro_batch) == ("auto", "auto", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dtype fp16 --device cpu", "--dtype is fp16, which needs CUDA: on cpu take bf16"),
        ("--dtype fp8 --device cpu", "--dtype is fp8, which needs a Hopper GPU"),
        ("--dtype bf61", "did you mean 'bf16'?"),
        ("--attention block", "did you mean 'blocks'?"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.txt").write_text(TEXT)
    assert main(["train", "text.txt", *AUTO, *words.split(), "--out", "run"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not Path("run").exists()


def test_a_run_that_recomputes_is_the_same_run(capsys: pytest.CaptureFixture[str]) -> None:
    """To the bit, with dropout; the plan says what it saves, and the run goes on either way."""
    words = [*TINY, "--dropout", "0.2", "--micro-batch", "2", "--steps", "8"]
    for name in ("no", "yes"):
        assert main(["train", "text.txt", *words, "--recompute", name, "--out", name]) == 0
        told = capsys.readouterr().err
        assert ("activations recomputed" in told) == (name == "yes")
        assert f"with --recompute {'no' if name == 'yes' else 'yes'}" in told
    assert same_weights(Path("no"), Path("yes"))
