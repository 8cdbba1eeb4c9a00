"""The cache folder: where it is, whose it is, and that nobody needs one."""

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from gptsmith import GPTConfig
from gptsmith.generation.compiled import CompiledDecoder, open_decoder
from gptsmith.machine import environment, native
from gptsmith.machine.terminal import Display
from gptsmith.training.plan import Trial, compile_if_it_pays
from tests.conftest import TINY, scrambled
from tests.training.test_loop import make_trainer

pytestmark = pytest.mark.system("posix", "is about users of POSIX")

NOBODY = 65534


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder of temporary files, of this test."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def no_account(number: int) -> None:
    raise KeyError(f"getpwuid(): uid not found: {number}")


def belongs_to_another(folder: Path) -> None:
    """Give a folder to somebody else, or at least close it."""
    folder.mkdir(parents=True)
    if os.geteuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    else:
        folder.chmod(0o555)


def test_the_usual_folder(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert environment.cache_folder("native") == tmp_path / "cache" / "gptsmith" / "native"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environment.cache_folder("dtype") == tmp_path / ".cache" / "gptsmith" / "dtype"
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_without_a_home_the_step_is_compiled_among_temporary_files(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_account)
    monkeypatch.setitem(vars(native), "FLAGS", ["-O0", *native.FLAGS[1:]])
    assert isinstance(open_decoder(scrambled(GPTConfig(**TINY)), "auto"), CompiledDecoder)
    (made,) = temporary.iterdir()
    assert made.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in (made / "native").iterdir()] == [".so"]


# A user without an account, in a container that was started with some number.
NOBODYS = """
import pwd, sys
def no_account(user):
    raise KeyError(f"getpwuid(): uid not found: {user}")
pwd.getpwuid = no_account
from gptsmith.cli.main import main
from gptsmith.machine import native
native.FLAGS = ["-O0", *native.FLAGS[1:]]
sizes = "--n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --threads 1 --dtype float32"
steps = "--batch-tokens 48 --warmup-steps 1 --steps 2 --tokenizer byte --out run"
assert main(f"train text.txt {sizes} {steps}".split()) == 0
assert main("plot run".split()) == 0
assert main("sample run --max-tokens 5 --threads 1 --seed 1".split()) == 0
assert main("prepare ~/notes --out other".split()) == 2
"""


@pytest.mark.slow
def test_a_user_without_home_or_account_trains_and_samples(
    temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(temporary))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    done = subprocess.run(
        [sys.executable, "-c", NOBODYS], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Matplotlib" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("gptsmith: no file, folder or built-in text '~/")
    (made,) = temporary.iterdir()
    assert {path.name for path in made.iterdir()} >= {"matplotlib"}


@pytest.mark.parametrize("taken", ["gptsmith", "gptsmith/native"])
def test_a_cache_of_somebody_else_is_left_alone(
    taken: str, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is code loaded that somebody else has put among the temporary files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    belongs_to_another(tmp_path / "cache" / taken)
    ours = environment.cache_folder("native")
    assert ours.is_relative_to(temporary)
    if os.geteuid() == 0:
        os.chown(ours.parent, NOBODY, NOBODY)
        assert environment.cache_folder("native").parent != ours.parent


def test_a_closed_home(temporary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    monkeypatch.setattr(os, "supports_effective_ids", set())
    ours = environment.cache_folder("native")
    assert ours.is_relative_to(temporary)
    ours.parent.rmdir()
    ours.parent.write_text("a file of that name")
    assert environment.cache_folder("native").parent.parent == temporary


def test_a_library_that_cannot_be_loaded_is_only_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a disk that is mounted noexec."""

    def fails(source: Path) -> None:
        raise OSError(errno.EPERM, "failed to map segment from shared object")

    monkeypatch.setattr("gptsmith.generation.compiled.open_library", fails)
    model = scrambled(GPTConfig(**TINY))
    with pytest.warns(UserWarning, match="compiled step cannot be loaded.*failed to map"):
        assert open_decoder(model, "auto") is None
    with pytest.raises(OSError, match="failed to map"):
        open_decoder(model, "yes")


def test_torch_compile_keeps_its_code_in_our_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "theirs")
    environment.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "theirs"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    environment.keep_compiled_code()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "gptsmith" / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


def test_a_compiler_that_cannot_be_imported_is_only_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def fails(*arguments: object, **options: object) -> None:
        raise KeyError("getpwuid(): uid not found: 54321")

    monkeypatch.setattr(torch, "compile", fails)
    trainer, eager = make_trainer(), Trial(0.9, 0.1)
    assert compile_if_it_pays(trainer, Display(), 10_000, eager) == eager
    assert trainer.compiled == "no"
    assert "the run is not compiled" in capsys.readouterr().err
