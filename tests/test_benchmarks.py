"""The GPU benchmark, at toy size on a CPU: every kind of row is there, with sensible numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_gpu_benchmark_at_toy_size(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--toy", "--seconds", "60", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert [row for row in rows if "error" in row] == []
    for row in rows:
        assert row["name"] in done.stdout
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
    assert "goal 1.5" in done.stdout


def test_gpu_benchmark_without_time_begins_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--toy", "--seconds", "0", "--out", tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["error"] for row in rows} == {"skipped: the time is spent"}
