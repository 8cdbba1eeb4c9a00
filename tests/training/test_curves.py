"""What `gptsmith plot` draws: the points of each line, read from the figure that it saves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from gptsmith.cli.main import main
from gptsmith.config.cost import flops_per_token
from gptsmith.config.recipe import read_toml

Lines = dict[str, tuple[np.ndarray, np.ndarray]]


@pytest.fixture
def drawn(toys: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Lines]]:
    """Plot runs of the records given by name; the axes, and the lines by their labels."""
    figures: list[Figure] = []

    def save(self: Figure, path: Path, **how: Any) -> None:
        figures.append(self)
        Path(path).write_bytes(b"a picture")

    monkeypatch.setattr(Figure, "savefig", save)

    def plot(words: str = "", **runs: list[dict[str, Any]]) -> tuple[Any, Lines]:
        for name, found in runs.items():
            if not found:
                continue
            Path(name).mkdir(parents=True, exist_ok=True)
            Path(name, "config.toml").write_text(Path("run/config.toml").read_text())
            lines = (json.dumps(record) + "\n" for record in found)
            Path(name, "metrics.jsonl").write_text("".join(lines))
        assert main(["plot", *runs, *words.split(), "--out", "out.png"]) == 0
        (axes,) = figures[-1].axes
        lines = {str(line.get_label()): np.array(line.get_xydata()).T for line in axes.get_lines()}
        return axes, {label: (x, y) for label, (x, y) in lines.items()}

    return plot


def records(steps: int = 40, scale: float = 1.0) -> list[dict[str, Any]]:
    """Of steps of 32 tokens and half a second, every tenth evaluated; one had no finite loss."""
    found = []
    for step in range(1, steps + 1):
        loss = None if step == 7 else scale * (2 + 10 / step)
        record = {"step": step, "loss": loss, "grad_norm": scale / step, "mfu": None}
        record |= {"tokens": 32 * step, "seconds": step / 2}
        if step % 10 == 0:
            record |= {"validation_loss": scale * (2.5 + step % 20 / 100), "bits_per_byte": 1.5}
        found.append(record)
    return found


def test_both_losses_by_step_without_flags(drawn: Any) -> None:
    axes, lines = drawn(one=records())
    assert axes.get_xlabel() == "step"
    x, y = lines["validation, best 2.5000 at step 20"]
    assert (x.tolist(), y.tolist()) == ([10, 20, 30, 40], [2.6, 2.5, 2.6, 2.5])
    x, y = lines["training (smoothed)"]
    assert x.tolist() == [step for step in range(1, 41) if step != 7]
    assert axes.get_ylim()[1] < 10  # the first steps are cut off


def test_what_a_step_cost(drawn: Any) -> None:
    """FLOPs: 6 N + 12 L C T for each token, N the parameters that multiply it."""
    per_token = flops_per_token(read_toml(Path("run/config.toml")).model, training=True)
    for words, each in {"tokens": 32, "seconds": 0.5, "flops": 32 * per_token}.items():
        axes, lines = drawn(f"--x {words}", one=records(), two=records(scale=1.1))
        assert axes.get_xlabel().lower().startswith(words)
        x, _ = lines["two: validation, best 2.7500 at step 20"]
        np.testing.assert_allclose(x, np.array([10, 20, 30, 40]) * each)


def test_an_older_run_has_its_tokens_from_its_batches(drawn: Any) -> None:
    old = [{"step": n, "loss": 2.0} for n in (1, 2, 3)]
    x, _ = drawn("--x tokens", old=old)[1]["training (smoothed)"]
    assert x.tolist() == [32, 64, 96]  # the toys' batches
    assert main(["plot", "old", "--x", "seconds", "--out", "no.png"]) == 2


def test_a_folder_of_runs(drawn: Any) -> None:
    _, lines = drawn("--metric loss", **{"sweep/01": records(), "sweep/02": records()})
    _, same = drawn("--metric loss", sweep=[])
    assert {*lines} == {*same} == {"01", "02"}


def test_another_metric_and_its_moving_average(drawn: Any) -> None:
    axes, lines = drawn("--metric grad_norm", one=records(), two=records(scale=3.0))
    assert axes.get_ylabel() == "grad norm"
    assert {*lines} == {"one", "two"}
    np.testing.assert_allclose(lines["two"][1], [3 / n for n in range(1, 41)])
    _, smooth = drawn("--metric grad_norm --smooth 8", one=records(), two=records(scale=3.0))
    values, expected = [3 / n for n in range(1, 41)], []
    for n in range(1, 41):  # weights (7/8)^age, which add up to 1
        weights = 0.875 ** np.arange(n)[::-1]
        expected.append(np.average(values[:n], weights=weights))
    np.testing.assert_allclose(smooth["two"][1], expected)


def test_smoothed_losses_of_several_runs(drawn: Any) -> None:
    _, lines = drawn("--smooth 5", one=records(), two=records())
    assert {"one: training (smoothed)", "two: training (smoothed)"} <= {*lines}
    _, lines = drawn("--smooth 1", one=records())
    losses = [record["loss"] for record in records() if record["loss"] is not None]
    np.testing.assert_allclose(lines["training"][1], losses)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "plot run --metric los",
            "'los', did you mean 'loss'? (these runs have loss, grad_norm, learning_rate, tokens",
        ),
        ("plot run --metric mfu", "no metric 'mfu'"),  # which no CPU has
        ("plot run --x epochs", "one of steps, tokens, seconds, flops is needed"),
        ("plot run --smooth 0", "--smooth is 0"),
    ],
)
def test_what_cannot_be_drawn(
    words: str, said: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words.split(), "--out", "out.png"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not Path("out.png").exists()
