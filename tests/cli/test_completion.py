"""completion, asked by a shell as it asks when somebody presses the tab key."""

import subprocess
import sys
from pathlib import Path

import pytest

from gptsmith.cli.completion import SHELLS
from gptsmith.cli.main import VERBS, main

ASK = """
source ./script
function=$(complete -p gptsmith | sed 's/.*-F \\([^ ]*\\).*/\\1/')
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
$function gptsmith "${!#}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script for bash, and a few files."""
    folder = tmp_path_factory.mktemp("completion")
    done = subprocess.run(
        [sys.executable, "-m", "gptsmith", "completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "script").write_text(done.stdout)
    (folder / "notes.txt").touch()
    (folder / "runs").mkdir()
    return folder


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], {"train"}),
        ([""], {*VERBS}),
        (["train", "--opti"], {"--optimizer"}),
        (["train", "--optimizer", ""], {"adamw", "muon"}),
        (["train", "no"], {"notes.txt"}),
        (["train", "notes.txt", "--out", "ru"], {"runs"}),
        (["completion", ""], {*SHELLS}),
        (["evaluate", "--no-such"], {""}),
    ],
)
def test_bash_completes(words: list[str], found: set[str], folder: Path) -> None:
    asked = ["bash", "-c", ASK, "bash", "gptsmith", *words]
    done = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert {*done.stdout.splitlines()} == found


@pytest.mark.parametrize("shell", SHELLS)
def test_every_script_has_every_verb(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(verb in script for verb in VERBS)


def test_another_shell_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(shell in error for shell in SHELLS)
