"""The wheel, not the tree: what is in it, and that it works where there is nothing else of ours."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

import gptsmith
from tests.conftest import TOY

PACKAGE = Path(gptsmith.__file__).parent
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
Run = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the tree, in which nothing is left of earlier builds."""
    tree = tmp_path_factory.mktemp("tree")
    copytree(PACKAGE, tree / "gptsmith", ignore=ignore_patterns("__pycache__"))
    for name in BUILT_FROM:
        (tree / name).write_bytes((PACKAGE.parent / name).read_bytes())
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('dist'))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tree / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a program of an environment into which pip has put the wheel, in a folder outside the
    tree. Its other packages are those of the tests."""
    place = tmp_path_factory.mktemp("installed")
    venv.create(place / "env", with_pip=False, symlinks=os.name != "nt")
    python = place / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}

    def check(*words: str) -> str:
        command = [str(python.with_name(words[0])), *words[1:]]
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(check("python", "-c", code).strip())
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*pip, "--no-index", str(wheel)], check=True, env=environment)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = check("python", "-c", "import gptsmith; print(gptsmith.__file__)").strip()
    assert Path(where) == site / "gptsmith" / "__init__.py"
    return check


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package_and_no_other(wheel: Path) -> None:
    assert wheel.name == f"gptsmith-{gptsmith.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as opened:
        built = {name for name in opened.namelist() if ".dist-info/" not in name}
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    there = {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    assert built == {name for name in there if "__pycache__" not in name}


@pytest.mark.slow
def test_a_folder_is_trained_on_and_text_is_written(run: Run) -> None:
    assert run("gptsmith", "--version") == f"gptsmith {gptsmith.__version__}\n"
    text = "".join(f"Line {i}: the quick brown fox met {i * i} dogs.\n" for i in range(60))
    run("python", "-c", f"import os; os.mkdir('notes'); open('notes/a.txt', 'w').write({text!r})")
    run("gptsmith", "train", "shakespeare", "--data", "notes/", *TOY.split(), "--out", "play")
    flags = ["--threads", "1", "--max-tokens", "5", "--compile", "yes"]
    assert run("gptsmith", "sample", "play", "--prompt", "Line", *flags).startswith("Line")
