"""Preparing text and converting models, measured at tiny size: the commands run, and are timed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "benchmarks"


def run(name: str, *words: object, out: Path) -> tuple[str, list[dict[str, Any]]]:
    """What a program shows, and the lines of its file."""
    command = [sys.executable, FOLDER / name, *map(str, words), "--out", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, [json.loads(line) for line in out.read_text().splitlines()]


def test_a_model_to_a_format_and_back(tmp_path: Path) -> None:
    recipe = tmp_path / "toy.toml"
    sizes = {"vocab_size": 50257, "context_length": 8, "n_layer": 2, "n_head": 2, "n_embd": 4}
    recipe.write_text("[model]\n" + "".join(f"{name} = {size}\n" for name, size in sizes.items()))
    words = [tmp_path / "work", "--model", recipe, "--formats", "nanogpt", "gguf"]
    shown, lines = run("convert.py", *words, out=tmp_path / "convert.jsonl")
    ways = ["to nanogpt", "from nanogpt", "to gguf", "from gguf"]
    assert [line["conversion"] for line in lines] == ways
    for line in lines:
        assert line["seconds"] > 0
        assert line["memory_bytes"] > line["weight_bytes"] > 50257 * 4 * 4
        assert line["conversion"] in shown
    assert list((tmp_path / "work").iterdir()) == []


def test_text_to_tokens_beside_others(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"To be, or not to be, that is question {n}." for n in range(99)))
    words = [text, "--megabytes", 0.05, "--pairs", 1]
    shown, lines = run("prepare.py", *words, out=tmp_path / "prepare.jsonl")
    ways = ["lean_pool", "one_call"]
    assert [line["way"] for line in lines if line["way"] != "dataset_map"] == ways
    for line in lines:
        assert line["our_seconds"] > 0
        assert line["their_seconds"] > 0
        assert line["way"] in shown
