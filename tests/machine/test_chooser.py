"""The one chooser: by a fake clock, the fastest of any order of speeds, with noise."""

import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.machine import chooser, environment
from gptsmith.machine.chooser import Choice, choose, once, preferred, recall, remember, timed


class Machine:
    """Does each candidate's work in its own time, by a clock of its own, never twice the same."""

    def __init__(self, speeds: dict[str, float], noise: float = 0.0, warm_up: float = 0.0) -> None:
        self.seconds, self.noise, self.warm_up = speeds, noise, warm_up
        self.now, self.done, self.random = 0.0, list[str](), random.Random(7)

    def work(self, name: str) -> None:
        first = name not in self.done
        self.done.append(name)
        self.now += self.seconds[name] * (1 + self.noise * self.random.random())
        self.now += self.warm_up if first else 0.0

    def chosen(self, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Choice:
        with monkeypatch.context() as patch:
            patch.setattr(time, "perf_counter", lambda: self.now)
            names = list(self.seconds)
            return choose(names, lambda name: timed(lambda: self.work(name)), **how)


@given(
    st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=6),
    st.floats(0.0, 0.1),
    st.floats(0.0, 1.0),
)
def test_any_order_of_speeds_gets_its_fastest(
    speeds: list[float], noise: float, budget: float
) -> None:
    """Within the share that counts as close, and the noise."""
    machine = Machine({str(number): each for number, each in enumerate(speeds)}, noise)
    with pytest.MonkeyPatch.context() as patch:
        choice = machine.chosen(patch, budget=budget)
    assert machine.seconds[choice.name] <= min(speeds) * (1 + noise) / (1 - chooser.CLOSE)
    assert list(choice.seconds) == list(machine.seconds)
    assert set(machine.done) == set(machine.seconds)


@given(st.permutations([1.0, 1.1, 1.2, 1.5, 2.0, 9.0]))
def test_speeds_that_differ_by_more_than_noise_are_told_apart(order: list[float]) -> None:
    machine = Machine({str(each): each for each in order}, noise=0.05, warm_up=0.5)
    with pytest.MonkeyPatch.context() as patch:
        assert machine.chosen(patch, budget=100.0).name == "1.0"
    assert machine.done.count("9.0") == machine.done.count("2.0") == 2  # dropped after a round
    assert machine.done.count("1.0") == 1 + chooser.ROUNDS


@pytest.mark.parametrize("when", range(9))
@pytest.mark.parametrize("budget", [0.0, 5.0, 20.0])
def test_an_interruption_changes_nothing(when: int, budget: float) -> None:
    """Of any pass but the only one of a candidate."""
    if budget == 0.0 and when < 3:
        return
    passes, speeds = [0], {"a": 1.2, "b": 1.0, "c": 1.1}

    def measure(name: str) -> float:
        passes[0] += 1
        return speeds[name] + (100.0 if passes[0] == when + 1 else 0.0)

    assert choose(list(speeds), measure, budget=budget).name == "b"


def test_one_is_not_measured() -> None:
    machine = Machine({"only": 1.0})
    assert choose(["only"], lambda name: machine.work(name) or 1.0, budget=1.0) == Choice("only")
    assert machine.done == []


def test_what_cannot_be_done_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"broken": math.inf, "slow": 2.0, "fast": 1.0}
    assert choose(list(times), times.__getitem__, budget=9.0).name == "fast"


@pytest.mark.parametrize(("bf16", "name"), [(0.9, "bf16"), (0.98, "float32"), (1.5, "float32")])
def test_a_close_call_is_for_the_preferred(
    bf16: float, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Machine({"float32": 1.0, "bf16": bf16}).chosen(monkeypatch, budget=20.0).name == name
    assert preferred({"float32": 1.0, "bf16": bf16}) == name


def test_the_budget_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine({"a": 1.0, "b": 1.0, "c": 1.1})
    machine.chosen(monkeypatch, budget=1.5)
    assert machine.done == ["a", "b", "c", "a", "b"]
    machine.now = 0.0
    machine.done.clear()
    machine.chosen(monkeypatch, budget=0.0)
    assert machine.done == ["a", "b", "c"]


# -- on disk


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gptsmith" / chooser.FOLDER


def asked(speeds: dict[str, float], about: Any = "this model") -> tuple[Choice, bool]:
    """The choice, and whether it was measured."""
    calls = []

    def measured() -> Choice:
        calls.append(1)
        return choose(list(speeds), speeds.__getitem__, budget=0.0)

    return once("which", about, list(speeds), measured), bool(calls)


def test_what_was_measured_is_remembered() -> None:
    choice, measured = asked({"a": 2.0, "b": 1.0})
    assert (choice.name, measured, choice.remembered) == ("b", True, False)
    choice, measured = asked({"a": 0.1, "b": 1.0})  # faster now, but not asked
    assert (choice.name, measured, choice.remembered) == ("b", False, True)
    assert choice.seconds == {"a": 2.0, "b": 1.0}
    assert asked({"a": 2.0, "b": 1.0}, about="another model")[1]
    assert asked({"a": 2.0, "c": 1.0})[1]


def test_another_machine_measures_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked({"a": 2.0, "b": 1.0})[1]
    monkeypatch.setattr(environment, "processor", lambda: "another one")
    assert asked({"a": 1.0, "b": 2.0}) == (Choice("a", {"a": 1.0, "b": 2.0}), True)


@pytest.mark.parametrize(
    "content", ["", "{", "[1, 2]", '{"a": 1}', '{"a": 1, "b": "x"}', '{"a": 1, "b": NaN}', "\0\xff"]
)
def test_a_damaged_file_is_measured_again(content: str, cache: Path) -> None:
    asked({"a": 2.0, "b": 1.0})
    (path,) = cache.iterdir()
    path.write_text(content, encoding="latin-1")
    assert asked({"a": 2.0, "b": 1.0}) == (Choice("b", {"a": 2.0, "b": 1.0}), True)
    assert json.loads(path.read_text()) == {"a": 2.0, "b": 1.0}


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="choice of b could not be cached: .*Not a directory"):
        assert asked({"a": 2.0, "b": 1.0})[0].name == "b"
    assert recall("which", "anything") == {}


def test_figures_may_be_infinite() -> None:
    remember("which", "this", {"a": math.inf, "b": 1.0})
    assert recall("which", "this") == {"a": math.inf, "b": 1.0}
