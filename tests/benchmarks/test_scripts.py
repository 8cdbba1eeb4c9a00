"""The benchmarks at toy size on a CPU: every kind of row is there, with sensible numbers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run_toy(out: Path, *, seconds: int) -> tuple[list[dict[str, Any]], str]:
    """The rows that the benchmark wrote with so much time, and what it showed."""
    done = subprocess.run(
        [sys.executable, FOLDER / "gpu.py", "--toy", "--seconds", str(seconds), "--out", out],
        capture_output=True,
        text=True,
        timeout=60 + seconds,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "results.json").read_text()), done.stdout


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


# -- generation


def generate_toy(out: Path, *words: str) -> tuple[dict[str, Any], list[list[str]], str]:
    """What the benchmark wrote: the measurements, the table's cells, and all of the text."""
    command = [sys.executable, FOLDER / "generate.py", "--preset", "toy", "--summed", "100000"]
    asked = ["--rows", "2", "--rounds", "1", "--threads", "1", "--out", out]
    done = subprocess.run([*command, *asked, *words], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    text = out.read_text()
    assert text in done.stdout
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return json.loads(out.with_suffix(".json").read_text()), cells[2:], text


def test_generation_beside_llama_cpp(tmp_path: Path) -> None:
    who = ["--only", "gptsmith, plain", "llama.cpp", "CTranslate2"]
    whole, table, text = generate_toy(tmp_path / "t.md", *who, "--dtypes", "float32")
    assert [row[:2] for row in table] == [
        ["float32", name]
        for name in ("gptsmith, plain", "CTranslate2", "llama.cpp")
        if name not in whole["missing"]
    ]
    for name, why in whole["missing"].items():
        assert f"{name}: {why}" in text
    ours, *others = [m["tokens"] for m in whole["measurements"] if m["rows"] == 2]
    assert all(tokens == ours for tokens in others)
    assert len(ours) == 2
    assert all(len(row) == 48 for row in ours)
    rates = whole["machine"][0]
    assert min(rates.values()) > 0
    bound = max(each["gigabytes_per_second"] for each in whole["machine"]) * 1e9
    alone = next(m["decode_tokens_per_second"] for m in whole["measurements"]) / 2
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 257 * 64
    assert table[0][3] == f"{alone / (bound / 4 / weights):.0%}"


@pytest.mark.slow
def test_generation_in_few_bits(tmp_path: Path) -> None:
    ours = ["gptsmith, compiled", *(f"gptsmith, compiled, {dtype}" for dtype in ("int8", "int4"))]
    peers = ["transformers, compiled", "transformers, dynamic int8", "CTranslate2", "llama.cpp"]
    dtypes = ["bf16", "int8", "int4"]
    whole, table, _ = generate_toy(tmp_path / "t.md", "--only", *ours, *peers, "--dtypes", *dtypes)
    assert not [row for row in table if "failed" in row[2]]
    rows = {(row[0], row[1]): row for row in table}
    for dtype in dtypes:
        assert (dtype, "llama.cpp") in rows
        assert ((dtype, ours[0]) in rows) != (f"{ours[0]}, {dtype}" in whole["missing"])
    assert float(rows["bf16", "transformers, compiled"][-2]) > 0
    assert ("int8", "transformers, dynamic int8") in rows
    assert (("int8", "CTranslate2") in rows) != ("CTranslate2" in whole["missing"])
