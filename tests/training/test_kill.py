"""Killed at any instant and resumed, a run ends with the bits of the one that went through."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attempts", "task"), [(25, []), (4, ["chat"]), (4, ["classify"]), (4, ["preference"])]
)
def test_killed_anywhere_and_resumed_is_the_same_run(
    tmp_path: Path, attempts: int, task: list[str]
) -> None:
    """`killing.py` chooses the instants: around each write, flush, rename and step."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killing.py"), str(attempts), "1", *task],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *killed = [json.loads(line) for line in done.stdout.splitlines()]
    assert whole["steps"] == list(range(1, 13))
    assert whole["checkpoint"] == "step-00000012"
    assert len(whole["checkpoints"]) <= 3
    assert whole.pop("moments") > 150
    assert len(killed) == attempts
    for attempt in killed:
        kills = attempt.pop("kills")
        assert attempt == whole, f"killed at {kills}"
