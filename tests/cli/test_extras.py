"""What is said where an extra is not installed: one line, and nothing is left behind."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from gptsmith.cli.main import main
from gptsmith.machine import devices
from tests.conftest import TOY

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
    "project"
]
EXTRAS = PROJECT["optional-dependencies"]
TRAIN = f"train text.txt {TOY} --out new"
# Command lines that need each extra, and what they say before the command to type.
NEEDED = {
    "parquet": {
        "prepare rows.parquet --tokenizer byte --out new": "reading .parquet is an extra",
        "evaluate run --data text.txt --per-document new.parquet": "writing .parquet is an extra",
    },
    "tensorboard": {f"{TRAIN} --tensorboard": "--tensorboard needs an extra"},
    "wandb": {f"{TRAIN} --wandb new": "--wandb needs an extra"},
    "fp8": {f"{TRAIN} --dtype fp8": "dtype fp8 needs an extra"},
    "gguf": {"export run new.gguf --to gguf --approximate": "GGUF needs llama.cpp's own package"},
    "hub": {"import gpt2 new": "downloading gpt2 needs huggingface_hub"},
    "onnx": {"export run new --to onnx": "ONNX needs an extra"},
    "ray": {"prepare text.txt --tokenizer byte --out new --ray auto": "--ray needs an extra"},
    "serve": {"serve run": "serving needs fastapi, an extra"},
}


def modules(extra: str) -> list[str]:
    """What the packages of an extra are imported as."""
    return [re.split(r"[<>=\[]", line)[0].replace("-", "_") for line in EXTRAS[extra]]


def test_every_extra_has_a_command_here() -> None:
    assert {*NEEDED} == {*EXTRAS} - {"test"}


@pytest.mark.parametrize(
    ("extra", "words", "said"),
    [(extra, *line) for extra, lines in NEEDED.items() for line in lines.items()],
)
def test_a_missing_extra_is_named_in_a_line(
    toys: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    extra: str,
    words: str,
    said: str,
) -> None:
    monkeypatch.setattr(devices, "find_dtype", lambda name, device: name)  # as on a GPU with float8
    (toys / "rows.parquet").write_bytes(b"PAR1")
    before = sorted(toys.rglob("*"))
    for name in modules(extra):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)  # imported when it still could be
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith(f"gptsmith: {said}: pip install 'gptsmith[{extra}]'"), err
    assert "Traceback" not in err
    assert not out
    assert sorted(toys.rglob("*")) == before
