"""The comparison with DDP runs, and shows every way of summing and of updating."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_way_is_measured_in_two_processes(tmp_path: Path) -> None:
    toy = "--layers 1 --channels 64 --context 8 --rows 4 --micro-batch 1 --rounds 1 --cores 1"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/processes.py", *toy.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "processes.jsonl").read_text().splitlines()]
    expected = ["alone", "after", "buckets", "ddp", "update alone", "update shared"]
    assert [row["way"] for row in rows] == expected
    assert all(row["seconds"] > 0 for row in rows)
    assert "waits for buckets" in done.stdout
