"""Whether what is automatic is the fastest: every way and auto, at toy size."""

import json
import sys
from pathlib import Path

import auto
import pytest

from gptsmith import GPTConfig
from gptsmith.machine import devices

TOY = GPTConfig(vocab_size=37, context_length=8, n_layer=2, n_head=3, n_embd=12)


@pytest.fixture(autouse=True)
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(auto, "MODELS", {"toy": (TOY, 6), "other": (TOY, 4)})
    monkeypatch.setattr(devices, "precisions", lambda device: ["float32", "bf16"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_every_way_and_auto_take_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    words = ["--rounds", "2", "--threads", "1", "--device", "cpu", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["auto.py", *words])
    auto.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["model"] for row in rows if "chosen" in row] == ["toy", "other"]
    ways = [row["way"] for row in rows if row["model"] == "toy" and "way" in row]
    paths = ("kernel", "blocks", "fused")
    names = [f"{dtype}, {path}" for dtype in ("float32", "bf16") for path in paths]
    assert ways == [*(f"{name}, 6 rows" for name in names), "auto"] * 2
    shown = capsys.readouterr().out
    assert "of the best" in shown
    assert "within 7% of the fastest in every model" in shown


def test_the_table_compares_medians() -> None:
    head = {"model": "toy", "chosen": "float32, kernel, 6 rows", "choosing_seconds": 0.5}
    steps = {"a": [1.0, 2.0, 9.0], "b": [4.0, 4.0, 4.0], "auto": [2.1, 2.1, 5.0]}
    rows = [head]
    for way, each in steps.items():
        rows += [{"model": "toy", "way": way, "step_seconds": seconds} for seconds in each]
    (line,) = auto.table_of(rows)
    assert line["fastest"] == "a"
    assert line["of_the_best"] == pytest.approx(2.0 / 2.1)
    assert line["tokens_per_second"] == pytest.approx(48 / 2.1)
    assert "auto is within 7%" in auto.render([line])
    assert "auto is not within 7%" in auto.render([line | {"of_the_best": 0.92}])
    assert auto.table_of(rows[:1]) == []  # interrupted
