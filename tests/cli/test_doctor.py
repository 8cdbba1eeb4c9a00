"""doctor, which must report what is wrong rather than fail of it."""

import json
import os
import re
import sys
import tomllib
from pathlib import Path

import pytest

import gptsmith
from gptsmith.cli import doctor
from gptsmith.cli.main import main
from gptsmith.machine import environment, facts, rates

TITLES = ["gptsmith", "machine", "PyTorch", "compiled code", "extras"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One measurement of each rate, of small matrices."""
    monkeypatch.setattr(rates, "SECONDS", 0)
    monkeypatch.setattr(rates, "SIZE", {"cpu": 64})
    monkeypatch.setattr(rates, "COPIED", {"cpu": 1000})


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, str]]:
    """What `gptsmith doctor --json` writes."""
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_report_can_be_shown_to_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    page, errors = capsys.readouterr()
    assert errors == ""
    assert [line.lower() for line in page.splitlines() if line and line[0] != " "] == [
        title.lower() for title in TITLES
    ]
    assert max(map(len, page.splitlines())) <= 100
    for secret in (str(Path.home()), os.getcwd(), os.uname().nodename, sys.prefix):
        assert secret not in page


def test_what_it_says_is_so(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)
    assert list(found) == TITLES
    assert found["gptsmith"]["gptsmith"] == gptsmith.__version__
    assert found["machine"]["cores"].startswith(f"{environment.cores()} of")
    assert re.search(r"float32 [\d.]+ [kMGT]?FLOP/s", found["PyTorch"]["matrix products"])
    package = Path(doctor.__file__).parents[1]
    for source in package.glob("*/*.cpp"):
        assert found["compiled code"][source.name].startswith("ready")


def test_every_extra_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {*doctor.ADDED} == project["optional-dependencies"].keys() - {"test"}
    assert list(report(capsys)["extras"]) == list(doctor.ADDED)


def test_requirements_are_read_from_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2", "no-such-package[x]>=1", 'onnx>=1; extra == "onnx"', 'a; extra == "onnx"']
    monkeypatch.setattr(facts.metadata, "requires", lambda name: lines)
    assert facts.required().keys() == {"torch", "no-such-package"}
    assert facts.required()["no-such-package"] is None
    assert facts.required()["torch"] == facts.version("torch")
    assert facts.required("onnx").keys() == {"onnx", "a"}


def test_a_broken_machine_is_reported_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No compiler and nothing compiled before, no PyTorch, and a package that is not installed."""
    monkeypatch.setattr(environment, "compiler", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", None)

    def requires(name: str) -> list[str]:
        raise facts.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(facts.metadata, "requires", requires)
    monkeypatch.setattr(facts.metadata, "metadata", requires)
    found = report(capsys)
    assert "cannot be imported" in found["PyTorch"]["version"]
    assert found["compiled code"]["compiler"].startswith("none:")
    assert "there is no g++" in found["compiled code"]["step.cpp"]
    assert found["gptsmith"]["packages"].startswith("unknown")
    assert "unknown" in found["extras"]["serve"]


def test_what_fails_is_told_without_the_names_of_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A compiler that cannot be run, and a GPU whose memory others have."""
    compiler = tmp_path / "c++"
    compiler.write_text("#!/no/such/program\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(environment, "compiler", lambda: str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def full(device: object) -> None:
        raise RuntimeError(f"CUDA error: out of memory\nin {tmp_path}/driver.so")

    monkeypatch.setattr(rates, "product_rates", full)
    found = report(capsys)
    assert found["compiled code"]["compiler"].startswith("cannot be run: ")
    assert "could not be compiled" in found["compiled code"]["step.cpp"]
    assert found["PyTorch"]["problem"] == "CUDA error: out of memory in driver.so"
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/alice/x/c++ could not compile step.cpp", "c++ could not compile step.cpp"),
        (r"C:\Users\alice\torch.dll: missing", "torch.dll: missing"),
        ("[Errno 2] no '/home/alice/bin/c++'", "[Errno 2] no 'c++'"),
        ("bf16 2 GFLOP/s, and/or", "bf16 2 GFLOP/s, and/or"),
    ],
)
def test_paths_are_shown_as_names_of_files(text: str, shown: str) -> None:
    assert facts.without_folders(text) == shown
