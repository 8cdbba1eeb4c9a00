"""Killed at any instant and resumed, a run ends with the bits of the one that went through."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.system("posix", "forks processes")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("attempts", "tasks"), [(25, ["text"]), (4, ["chat", "classify", "preference", "rollback"])]
)
def test_killed_anywhere_and_resumed_is_the_same_run(
    tmp_path: Path, attempts: int, tasks: list[str]
) -> None:
    """`killing.py` chooses the instants: around each write, flush, rename and step."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("killing.py"), str(attempts), "1", *tasks],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for task in tasks:
        (whole, *killed), found = found[: attempts + 1], found[attempts + 1 :]
        assert whole["steps"] == list(range(1, 13))
        assert whole["checkpoint"] == "step-00000012"
        assert len(whole["checkpoints"]) <= 3
        assert bool(whole["rollbacks"]) == (task == "rollback")
        assert whole.pop("moments") > 150
        assert len(killed) == attempts
        for attempt in killed:
            kills = attempt.pop("kills")
            assert attempt == whole, f"{task}: killed at {kills}"
    assert not found
