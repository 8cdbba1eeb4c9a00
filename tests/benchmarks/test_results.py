"""What the benchmarks share: results on the disk as they come, and how a program ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from results import Results, over, ratios

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "results.py"})


def test_each_result_is_a_line_as_soon_as_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.jsonl"
    first = Results(path)
    first.add({"a": 1.5})
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1.5]
    second = Results(path)
    second.run = "later"
    second.add({"a": None, "b": [2]})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"run": first.run, "a": 1.5}, {"run": "later", "a": None, "b": [2]}]
    assert (first.rows, second.rows) == ([{"a": 1.5}], [{"a": None, "b": [2]}])


def test_a_ratio_is_of_what_was_measured_side_by_side() -> None:
    """The ratio of the medians would be 20 / 10; the fourth round was interrupted."""
    found = ratios({1: 20.0, 2: 90.0, 3: 10.0, 4: 7.0}, {1: 40.0, 2: 10.0, 3: 10.0})
    assert found == [0.5, 9.0, 1.0]
    assert over(found) == "1.00 (0.500 to 9.00)"
    assert over([3.0, 1.0, 2.5]) == "2.50 (1.00 to 3.00)"
    assert (over([2.0]), over([])) == ("2.00", "-")


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise ValueError('it is wrong')", 2, "it is wrong"),
        ("raise ImportError('pip install it')", 2, "pip install it"),
        ("raise KeyboardInterrupt", 130, "interrupted: what was measured so far is kept"),
        (f"os.kill(os.getpid(), {int(signal.SIGTERM)}); time.sleep(9)", 143, ""),
        ("return", 0, ""),
    ],
)
def test_how_a_program_ends(code: str, status: int, said: str) -> None:
    program = f"import os, time, results\ndef main():\n    {code}\nresults.carry_out(main)"
    environment = {**os.environ, "PYTHONPATH": str(FOLDER)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == status
    assert done.stderr.count("\n") == bool(said)
    assert said in done.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_help_says_how_a_program_is_called(program: Path, tmp_path: Path) -> None:
    """From anywhere, without the package installed: the checkout is enough."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, program, "--help"], cwd=tmp_path, capture_output=True, text=True, env=bare
    )
    assert done.returncode == 0, done.stderr
    assert f"python benchmarks/{program.name} " in done.stdout
    assert f"(default: {program.stem}.jsonl)" in " ".join(done.stdout.split())
    assert list(tmp_path.iterdir()) == []


def test_the_readme_has_a_command_for_each_program() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    for program in PROGRAMS:
        assert f"python benchmarks/{program.name} " in text
