"""The examples of docs/adding.md: applied to a copy of the package, and run as they are shown."""

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gptsmith
from gptsmith.tokenizers import byte_tokenizer

PACKAGE = Path(gptsmith.__file__).parent
TEXT = (PACKAGE.parent / "docs" / "adding.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```(python|diff|console)\n(.*?)```", re.DOTALL)
NAMED = re.compile(r"`(gptsmith/[\w/]+\.py)`")


def examples() -> list[tuple[str, str, str]]:
    """The blocks in their order: what a block is, the file that was named before it, its text."""
    return [
        (match[1], NAMED.findall(TEXT[: match.start()])[-1], match[2])
        for match in BLOCK.finditer(TEXT)
    ]


def changed(before: str, diff: str) -> str:
    """A file with a change made, whose lines stand in it in exactly one place."""
    lines = [(line[:1], line[1:]) for line in diff.splitlines()]
    old, new = (
        "".join(f"{text}\n" for mark, text in lines if mark in ("", " ", side)) for side in "-+"
    )
    assert before.count(old) == 1, old
    return before.replace(old, new)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package in which every example is, a text and a model."""
    here = tmp_path_factory.mktemp("extended")
    shutil.copytree(PACKAGE, here / "gptsmith", ignore=shutil.ignore_patterns("__pycache__"))
    for kind, name, text in examples():
        path = here / name
        if kind == "python":
            assert not path.exists(), name
            path.write_text(text, encoding="utf-8")
        elif kind == "diff":
            path.write_text(changed(path.read_text(encoding="utf-8"), text), encoding="utf-8")
    (here / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    rows = ({"prompt": f"{n} jumps", "chosen": "fox", "rejected": "dog"} for n in range(20))
    (here / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = ({"passage": "A fox.", "question": "is it", "label": n % 2} for n in range(4))
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    config = gptsmith.GPTConfig(
        vocab_size=257, context_length=16, n_layer=1, n_head=2, n_embd=16, tie_weights=False
    )
    gptsmith.save(gptsmith.GPT(config), byte_tokenizer(), here / "model")
    return here


def test_the_examples_are_formatted_as_the_package_is(extended: Path) -> None:
    shutil.copy(PACKAGE.parent / "pyproject.toml", extended)
    for words in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "gptsmith"]
        done = subprocess.run(command, cwd=extended, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_the_commands_work_as_shown(extended: Path) -> None:
    shown = "".join(text for kind, _, text in examples() if kind == "console")
    commands = [shlex.split(line.removeprefix("$ gptsmith ")) for line in shown.splitlines()]
    assert len(commands) == 8
    code = (
        "import json, sys; from gptsmith.cli.main import main\n"
        "for words in json.loads(sys.argv[1]): assert main(words) == 0, words"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=extended,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str((extended / "text.txt").stat().st_size)
    assert 'optimizer = "sgd"' in (extended / "runs/sgd/config.toml").read_text()
    assert 'attention = "float32"' in (extended / "runs/float32/config.toml").read_text()
    assert 'task = "simpo"' in (extended / "runs/simpo/config.toml").read_text()
    (first, _) = map(json.loads, (extended / "runs/simpo/metrics.jsonl").read_text().splitlines())
    assert first["loss"] == pytest.approx(math.log(2), abs=0.05)  # random weights prefer neither
    before, after = (gptsmith.load(extended / name)[0].state_dict() for name in ("model", "again"))
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
