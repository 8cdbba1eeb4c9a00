"""Sweeps: what they plan, what they train, and what becomes of them when something is killed."""

import itertools
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptsmith.cli.main import main
from gptsmith.config.fields import time_span
from gptsmith.config.recipe import read_toml
from gptsmith.config.settings import ReportSettings, RunSettings, TrainingSettings
from gptsmith.training import halving, sweeping
from gptsmith.training.halving import Speed
from gptsmith.training.sweep import plan_sweep
from tests.training.sweeping_scenarios import OPTIONS, TEXT

Found = dict[str, Any]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)


# -- whole sweeps, in forked processes


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What became of the sweeps of `sweeping_scenarios.py`, by name."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sweeping_scenarios.py")],
        cwd=tmp_path_factory.mktemp("sweeps"),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {each["scenario"]: each for each in found}


def results(found: Found) -> Found:
    """What does not depend on the way to the end: everything but the events."""
    return {
        name: {key: value for key, value in run.items() if key != "event"}
        for name, run in found["runs"].items()
    }


def table(said: str) -> list[list[str]]:
    """The rows of the first table of a sweep's output, without what was timed."""
    lines = said.partition("\nrun  ")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [re.split(r" {2,}", line) for line in lines]
    return [[*row[:-3], row[-1]] for row in rows]


@pytest.mark.slow
def test_a_run_for_each_combination(scenarios: dict[str, Found]) -> None:
    whole = scenarios["whole"]
    assert whole["codes"] == [0]
    said = whole["said"][0]
    assert "runs    4: 2 of learning_rate x 2 seeds" in said
    assert "4 runs will take about" in said
    tried = re.findall(r"^run (\d+) of 4: seed (\d+)  learning_rate (\S+)$", said, re.M)
    seeds, rates = ("1337", "1338"), ("0.0001", "0.01")
    assert tried == [
        (f"{number:02}", seed, rate)
        for number, (seed, rate) in enumerate(itertools.product(seeds, rates), 1)
    ]
    assert all(run["steps"] == [1, 2, 3, 4, 5, 6] for run in whole["runs"].values())
    assert [row[1] for row in table(said)] == ["0.01", "0.01", "0.0001", "0.0001"]
    assert "Means over seeds" in said


@pytest.mark.slow
def test_several_at_a_time_train_the_same_runs(scenarios: dict[str, Found]) -> None:
    assert results(scenarios["two"]) == results(scenarios["whole"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["killed", "interrupted"])
def test_resumed_it_ends_as_if_nothing_had_happened(name: str, scenarios: dict[str, Found]) -> None:
    """The sweep was killed and a run too, or Ctrl-C was pressed; each step is there once."""
    found, whole = scenarios[name], scenarios["whole"]
    assert results(found) == results(whole)
    assert table(found["said"][-1]) == table(whole["said"][0])
    if name == "killed":
        assert found["codes"] == [-9, 0, 0]
        assert "run 02 is being trained by an earlier process" in found["said"][1]
        assert "run 03 failed at step 4 of 6: killed by SIGKILL" in found["said"][1]
        assert "run 04 finished" in found["said"][1]
        assert "1 run failed. To try again:  gptsmith sweep --resume killed" in found["said"][1]
    else:
        assert found["codes"] == [130, 0]
        assert "run 02 stopped at step 3 of 6" in found["said"][0]
        assert "To go on:  gptsmith sweep --resume interrupted" in found["said"][0]


@pytest.mark.slow
def test_runs_that_fail_are_shown_and_the_others_finish(scenarios: dict[str, Found]) -> None:
    found = scenarios["failing"]
    assert found["codes"] == [0]
    states = {row[0]: row[-1] for row in table(found["said"][0])}
    assert states["01"] == "finished"
    assert states["02"].startswith("failed: min_learning_rate is 0.001, above the peak")
    assert states["03"].startswith("failed at step 6 of 10: step 6: the loss or gradient was not")
    assert "2 runs failed" in found["said"][0]
    assert found["done"] == {"01": 1.0}


@pytest.mark.slow
def test_successive_halving_finds_the_planted_best(scenarios: dict[str, Found]) -> None:
    """Of four learning rates, two are too low to learn anything, and 0.01 is the best."""
    found = scenarios["halved"]
    assert found["codes"] == [-9, 0]  # and killed in its second rung
    everything = [f"{number:02}" for number in range(1, 9)]
    assert found["kept"] == [everything, ["02", "03", "06", "07"], ["03", "07"]]
    lengths = {name: len(run["steps"]) for name, run in found["runs"].items()}
    last = {"03": 8, "07": 8, "02": 4, "06": 4}
    assert lengths == {name: last.get(name, 2) for name in everything}
    rows = table(found["said"][-1])
    assert [row[-1] for row in rows] == [
        *["finished"] * 2, *["stopped at step 4 of 8"] * 2, *["stopped at step 2 of 8"] * 4
    ]  # fmt: skip
    # What went on is the run that was never halted, to the bit.
    assert results(found)["03"] == results(scenarios["plain"])["01"]


@pytest.mark.slow
def test_a_budget_that_nothing_fits(scenarios: dict[str, Found]) -> None:
    """What the refusal advises works: with more time, every run is trained to its end."""
    found = scenarios["short"]
    assert found["codes"] == [2, 0]
    *_, last = found["said"][0].splitlines()
    assert re.match(r"gptsmith: --budget is 0 s, but these runs need at least \d+ s", last)
    assert re.search(r"`gptsmith sweep --resume short --budget \d+s`$", last)
    assert "Configurations: 2 to step 6; about" in found["said"][1]
    assert results(found) == results(scenarios["whole"])


@pytest.mark.slow
def test_with_processes_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """As it is used: `gptsmith train` in a new Python, whose output is in the run's folder."""
    words = ["sweep", "text.txt", *OPTIONS, "--steps", "2", "--set", "beta1=0.8", "--out", "s"]
    assert main(words) == 0
    out, _ = capsys.readouterr()
    assert table("\n" + out)[0][-1] == "finished"
    assert "Finished 2 steps" in Path("s/01/output.txt").read_text()
    assert read_toml(Path("s/01/config.toml")).data.data == str(Path("s/data").resolve())
    assert main(["sweep", "--resume", "s"]) == 0  # there is nothing left to do
    again = capsys.readouterr()
    assert "run 01 of" not in again.err
    assert again.out == out


# -- the plan


def test_the_plan_is_the_product(capsys: pytest.CaptureFixture[str]) -> None:
    sets = {"n_layer": [2, 4], "learning_rate": [0.1, 0.2, 0.3]}
    sweep, base, settings, name = plan_sweep("shakespeare", {"seed": 5}, sets, 2, None)
    assert name == "shakespeare"
    tried = [
        (r.training.seed, r.model.n_layer, r.training.learning_rate) for r in settings.values()
    ]
    assert tried == list(itertools.product((5, 6), (2, 4), (0.1, 0.2, 0.3)))
    assert list(settings) == [f"{number:02}" for number in range(1, 13)]
    assert len(sweep.configurations([*sweep.runs])) == 6
    rest = {replace(run, training=base.training, model=base.model) for run in settings.values()}
    assert rest == {base}


def refusal(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(Path().rglob("*"))
    assert main(["sweep", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert sorted(Path().rglob("*")) == before, "something was left behind"
    return err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("text.txt", "Add --set NAME=VALUE,VALUE or --seeds N"),
        ("text.txt --set learning_rate", "--set is 'learning_rate': NAME=VALUE,VALUE is needed"),
        ("text.txt --set learning_rate=", "NAME=VALUE,VALUE is needed"),
        ("text.txt --set learning_rate=1,,2", "NAME=VALUE,VALUE is needed"),
        ("text.txt --set lerning_rate=1,2", "'lerning_rate', did you mean 'learning_rate'?"),
        ("text.txt --set learning_rate=1e-3,fast", "learning_rate is 'fast': a number is needed"),
        ("text.txt --set n_head=2,3 --n-embd 8", "--n-embd 8 is not a multiple of n_head 3"),
        ("text.txt --set seed=1,2 --set seed=3", "--set names seed twice"),
        ("text.txt --set learning_rate=1e-3,0.001", "--set has learning_rate 0.001 twice"),
        ("text.txt --set steps=1,2 --steps 3", "--set names steps, which has a flag too"),
        ("text.txt --set seed=1,2 --seeds 2", "--seeds cannot go with --set seed"),
        ("text.txt --seeds 0", "--seeds is 0"),
        (
            "text.txt --seeds 2 --budget soon",
            "--budget is 'soon': a time such as 90s, 20m or 1h30m",
        ),
        ("text.txt --seeds 2 --budget 0s", "--budget is '0s'"),
        (
            "fresh-classify --seeds 2 --budget 9s",
            "--budget needs runs of as many steps, not epochs",
        ),
        ("nothing.txt --seeds 2", "'nothing.txt' is no recipe, file or folder"),
        ("--resume nowhere", "nowhere is missing"),
        ("--resume other", "other has no sweep.json, so it is not the folder of a sweep"),
        ("--resume other --seeds 2", "--resume names the sweep"),
        ("text.txt --seeds 2 --out other", "other already exists: give --out another name"),
        ("text.txt --seeds 2 --tokenizer gpt3", "gpt2, char, byte or a folder"),
    ],
)
def test_bad_input(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("other").mkdir()
    Path("other/notes.txt").touch()
    assert said in refusal(words, capsys)


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Sweeps are planned, but not carried out."""
    monkeypatch.setattr(sweeping, "carry_out", lambda *given: 2)
    return lambda: None


@pytest.mark.usefixtures("untrained")
def test_the_sweep_of_another_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sweep", "text.txt", "--set", "learning_rate=1e-3,1e-2", "--out", "s"]
    assert main(line) == main(line) == 130  # the same again goes on
    capsys.readouterr()
    said = refusal("text.txt --set learning_rate=1e-3,1e-1 --out s", capsys)
    assert "s has the sweep of another command" in said
    assert "`gptsmith sweep --resume s`" in said
    assert "another command" in refusal(" ".join([*line[1:], "--n-layer", "3"]), capsys)


# -- successive halving


def run_of(steps: int = 100, every: int = 5, batch: int = 64) -> RunSettings:
    training = TrainingSettings(steps=steps, batch_tokens=batch)
    return RunSettings(training=training, report=ReportSettings(evaluate_every=every))


def test_rungs_end_with_evaluations() -> None:
    assert halving.fractions(3) == [0.125, 0.25, 0.5, 1.0]
    assert halving.counts(9, 3) == [9, 5, 3, 2]
    run = run_of(steps=103, every=10)
    assert [halving.last_step(run, part) for part in halving.fractions(2)] == [30, 60, 103]
    assert halving.most_halvings([run], 9) == 4  # 10, 20, 30, 60, 103
    assert halving.most_halvings([run], 2) == 1
    assert halving.most_halvings([run], 1) == 0
    assert halving.most_halvings([run_of(steps=8, every=8)], 9) == 0
    assert halving.most_halvings([run_of(steps=8, every=4)], 9) == 1


@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_the_time_of_a_plan_is_that_of_its_processes(halvings: int) -> None:
    """Counted step by step for runs that are equally fast."""
    run, speed, number = run_of(steps=80, every=5), Speed(3.0, 40.0), 8
    seconds, at = 0.0, 0
    for part, runs in zip(
        halving.fractions(halvings), halving.counts(number, halvings), strict=True
    ):
        steps = int(80 * part) - at
        seconds += runs * (3.0 + 0.5 * steps)
        at += steps
    shares = [count / number for count in halving.counts(number, halvings)]
    found = halving.seconds_of([run] * number, [speed] * number, shares)
    assert found == pytest.approx(seconds)


def test_the_fewest_halvings_that_fit_are_chosen() -> None:
    runs, speeds = [run_of(steps=80, every=5)] * 8, [Speed(0.0, 40.0)] * 8
    plans = {}
    for halvings in range(4):
        shares = [count / 8 for count in halving.counts(8, halvings)]
        plans[halvings] = halving.seconds_of(runs, speeds, shares)
    assert plans == {0: 320.0, 1: 240.0, 2: 160.0, 3: 100.0}
    for budget, expected in ((320, 0), (319, 1), (200, 2), (100, 3)):
        found = halving.choose_halvings(runs, speeds, 8, budget)
        assert found == (expected, plans[expected])
    assert halving.choose_halvings(runs, speeds, 8, 99) == (None, 100.0)
    assert halving.choose_halvings(runs, speeds, 8, 160, processes=2) == (0, 160.0)


def test_fewer_go_on_where_time_has_become_short() -> None:
    runs, speeds = [run_of(steps=80, every=5)] * 8, [Speed(0.0, 40.0)] * 8
    # After the first of three rungs (20 steps of 80), 4 are planned to go on: 4 x 10 s, 2 x 20 s.
    for seconds, expected in ((80, 4), (79, 3), (1, 1), (-5, 1)):
        assert halving.affordable(runs, speeds, 8, 2, 1, seconds) == expected


def test_a_configuration_without_a_loss_never_goes_on() -> None:
    losses = {"a": 2.0, "b": math.inf, "c": 1.0}
    assert halving.best_configurations(losses, 1) == ["c"]
    assert halving.best_configurations(losses, 3) == ["c", "a"]


def test_larger_models_are_estimated_to_take_longer() -> None:
    small = run_of()
    large = replace(small, training=replace(small.training, steps=200))
    assert Speed(1.0, 10.0).scaled(small, large) == Speed(1.0, 20.0)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1.5h", 5400), ("1H5S", 3605)],
)
def test_times(text: str, seconds: float) -> None:
    assert time_span(text) == seconds
    for wrong in ("", "20", "m", "20 min", "-5m", "5m1h"):
        with pytest.raises(ValueError, match="a time such as"):
            time_span(wrong)
