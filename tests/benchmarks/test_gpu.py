"""The benchmark of a GPU at toy size on a CPU: every kind of row, with sensible numbers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run_toy(folder: Path, *, seconds: int) -> tuple[list[dict[str, Any]], str]:
    """The rows that the benchmark wrote with so much time, and what it showed."""
    out = folder / "gpu.jsonl"
    done = subprocess.run(
        [sys.executable, FOLDER / "gpu.py", "--toy", "--seconds", str(seconds), "--out", out],
        capture_output=True,
        text=True,
        timeout=60 + seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in out.read_text().splitlines()], done.stdout


@pytest.mark.slow
def test_gpu_benchmark_at_toy_size(tmp_path: Path) -> None:
    rows, shown = run_toy(tmp_path, seconds=60)
    assert [row for row in rows if "error" in row] == []
    for row in rows:
        assert row["name"] in shown
    sections = {name: [r for r in rows if r["section"] == name] for name in {"matrix", "check"}}
    assert min(sections["matrix"][0]["teraflops"].values()) > 0
    steps = [row for row in rows if row["section"] == "step"]
    assert {"plain", "gptsmith"} == {row["who"] for row in steps}
    assert {"adamw", "muon"} == {row["optimizer"] for row in steps}
    assert all(row["share"] > 0 and 0 < row["loss"] < 10 for row in steps)
    assert sum("ratio" in row for row in steps) == sum(row["who"] != "plain" for row in steps) > 2
    errors = sections["check"][0]["relative_error"]
    assert max(errors["float32 loss"], errors["float32 gradient"]) < 1e-4
    assert max(errors["bf16 loss"], errors["bf16 gradient"]) < 0.1
    [shakespeare] = [row for row in rows if row["section"] == "shakespeare"]
    assert [each["step"] for each in shakespeare["evaluations"]] == [3, 6]
    assert 0 < shakespeare["best"]["wall_seconds"] <= shakespeare["whole_seconds"]
    assert "goal 1.5" in shown


def test_gpu_benchmark_without_time_begins_nothing(tmp_path: Path) -> None:
    rows, _ = run_toy(tmp_path, seconds=0)
    assert {row["error"] for row in rows} == {"skipped: the time is spent"}
