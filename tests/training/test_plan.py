"""What is said before the first step: within 30% of the truth, and without a trace."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptsmith.config import cost
from gptsmith.config.settings import MachineSettings, RunSettings
from gptsmith.machine.terminal import Display, size
from gptsmith.training import memory, plan
from gptsmith.training.plan import Trial, compile_if_it_pays, try_out
from tests.training.test_loop import make_trainer

QUIET = Display(quiet=True)


class Clock:
    """A time that passes only where work is said to take some."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def slow(self, work: Any, seconds: float) -> Any:
        """Work that takes so long."""

        def slowly(*arguments: Any) -> Any:
            self.now += seconds
            return work(*arguments)

        return slowly


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_predicted_step_is_that_of_the_first_ten(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six rows in micro-batches of two, 20 ms each, and 30 ms for the update: 90 ms a step."""
    clock, trainer = Clock(monkeypatch), make_trainer(2, steps=10, optimizer=optimizer)
    trainer.loss = clock.slow(trainer.loss, 0.02)
    first = trainer.optimizers[0]
    first.step = clock.slow(first.step, 0.03)  # type: ignore[method-assign]
    predicted = try_out(trainer, QUIET)
    took = sum(trainer.step(done).seconds for done in range(10)) / 10
    assert took == pytest.approx(0.09)
    assert predicted.step == pytest.approx(took)
    assert predicted.update == pytest.approx(0.03)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_trying_leaves_no_trace(optimizer: str) -> None:
    tried, other = make_trainer(optimizer=optimizer), make_trainer(optimizer=optimizer)
    before = [parameter.data_ptr() for parameter in tried.model.parameters()]
    try_out(tried, QUIET)
    assert [parameter.data_ptr() for parameter in tried.model.parameters()] == before
    assert all(parameter.grad is None for parameter in tried.model.parameters())
    for one, another in zip(tried.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, another)
    for done in range(3):
        assert tried.step(done).loss == other.step(done).loss


def decided(monkeypatch: pytest.MonkeyPatch, left: int, compiled: float) -> tuple[str, Trial]:
    """What is chosen where an eager step takes a second and a compiled one that long."""
    monkeypatch.setattr(plan, "try_out", lambda trainer, display: Trial(compiled, 0.0))
    monkeypatch.setattr(torch, "compile", lambda work, mode=None: work)
    trainer = make_trainer()
    chosen = compile_if_it_pays(trainer, QUIET, left, Trial(0.9, 0.1))
    return trainer.compiled, chosen


def test_a_short_run_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided(monkeypatch, 599, 0.1) == ("no", Trial(0.9, 0.1))


def test_a_long_run_is_compiled_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided(monkeypatch, 600, 0.8) == ("yes", Trial(0.8, 0.0))
    assert decided(monkeypatch, 600, 0.97) == ("no", Trial(0.9, 0.1))


@pytest.mark.slow
def test_where_compiling_fails_the_run_goes_on_without(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer()
    trainer.compile("yes")

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no compiler here\nand a long explanation")

    trainer.loss = failing
    try_out(trainer, Display())
    assert trainer.compiled == "no"
    assert "not compiled: no compiler here\n" in capsys.readouterr().err


@pytest.mark.parametrize("fused", ["no", "yes"])
@pytest.mark.parametrize("processes", [1, 4])
def test_the_memory_is_shown_by_part_and_in_other_ways(
    processes: int, fused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded, nothing is fused."""
    monkeypatch.setattr(plan, "world_size", lambda: processes)
    monkeypatch.setattr(memory, "world_size", lambda: processes)
    machine = MachineSettings(dtype="float32", micro_batch=2, recompute="no", fused=fused)
    trainer = make_trainer()
    run: Any = SimpleNamespace(settings=RunSettings(machine=machine), trainer=trainer)

    def needed(**chosen: Any) -> str:
        return size(memory.needed_memory(replace(machine, **chosen), trainer.model.config, 2))

    rows = plan.memory_rows(run)
    assert rows["memory"].startswith(f"about {needed()} {'in' if processes > 1 else 'on'} ")
    weights = cost.weight_bytes(trainer.model.config)
    assert rows["of that"].startswith(f"weights {size(weights)}, gradients {size(weights)}, ")
    others = [f"{needed(recompute='yes')} with --recompute yes"]
    if processes > 1:
        others.append(f"{needed(shard='yes', fused='no')} with --shard yes")
        both = needed(shard="yes", recompute="yes", fused="no")
        others.append(f"{both} with --shard yes --recompute yes")
        assert rows["sent"] == f"{size(2 * 3 * weights // 4)} by each process in a step"
    assert rows["otherwise"] == ", ".join(others)
    next(trainer.model.parameters()).requires_grad_(False)  # what cannot be sharded
    assert "shard" not in plan.memory_rows(run)["otherwise"]
    assert rows.keys() - plan.memory_rows(run).keys() == ({"sent"} if processes > 1 else set())
