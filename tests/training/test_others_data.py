"""Data and settings as people have them: from other projects, from runs, from other editors."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptsmith.checkpoint.finding import find_model
from gptsmith.cli.main import main
from gptsmith.tokenizers import load_tokenizer
from tests.training.test_run import TEXT, TINY

WORDS = [word for word in TINY if word not in ("--tokenizer", "char")]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*words: str) -> int:
    return main(["train", *words, *WORDS, "--steps", "4"])


def nanogpts_folder(folder: Path) -> dict[str, int]:
    """What its prepare.py for characters leaves."""
    letters = sorted(set(TEXT))
    stoi = {letter: id for id, letter in enumerate(letters)}
    ids = np.array([stoi[letter] for letter in TEXT], np.uint16)
    folder.mkdir()
    ids[:2000].tofile(folder / "train.bin")
    ids[2000:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(stoi), "stoi": stoi, "itos": dict(enumerate(letters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))
    return stoi


def test_nanogpts_data_of_characters_is_read_with_its_meta_pkl() -> None:
    stoi = nanogpts_folder(Path("shakespeare_char"))
    assert train("shakespeare_char", "--out", "run") == 0
    tokenizer = load_tokenizer(find_model("run"))
    assert tokenizer.encode("fox") == [stoi[letter] for letter in "fox"]
    Path("more.txt").write_text(TEXT)
    assert main(["prepare", "more.txt", "--tokenizer", "shakespeare_char", "--out", "more"]) == 0
    assert load_tokenizer(Path("more")).fingerprint == tokenizer.fingerprint


@pytest.mark.slow
def test_numpy_shards_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    """As build-nanogpt saves them."""
    Path("edu").mkdir()
    ids = np.arange(400) % 300
    for split in ("train_000001", "val_000000"):
        np.save(f"edu/edufineweb_{split}.npy", ids.astype(np.uint16))
    assert train("edu", "--tokenizer", "gpt2", "--out", "run") == 0
    last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_tokens"] == 399
    capsys.readouterr()
    assert train("edu", "--tokenizer", "byte", "--out", "other") == 2
    assert "has a token 299, but the vocabulary ends at 256" in capsys.readouterr().err


def test_a_run_names_its_tokenizer() -> None:
    Path("text.txt").write_text(TEXT)
    assert train("text.txt", "--tokenizer", "char", "--out", "run") == 0
    own = load_tokenizer(find_model("run")).fingerprint
    assert main(["prepare", "text.txt", "--tokenizer", "run", "--out", "data"]) == 0
    assert load_tokenizer(Path("data")).fingerprint == own
    assert train("text.txt", "--tokenizer", "run", "--out", "second") == 0
    assert load_tokenizer(find_model("second")).fingerprint == own


def test_a_recipe_from_an_editor_that_writes_a_mark() -> None:
    Path("text.txt").write_text(TEXT)
    Path("mine.toml").write_text('[data]\ndata = "text.txt"\ntokenizer = "char"\n', "utf-8-sig")
    assert train("mine.toml", "--out", "run") == 0


def test_a_second_run_in_a_folder_of_notes_learns_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("notes.txt").write_text(TEXT)
    for number in (1, 2):
        assert train(".", "--tokenizer", "char") == 0
        (run,) = Path("runs").glob(f"*-{number}")
        info = json.loads((run / "data" / "dataset.json").read_text())
        assert [Path(source["path"]).name for source in info["sources"]] == ["notes.txt"]
    assert (
        "skipped 2 of its folders, such as runs/text-1: datasets, runs" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_text_that_the_terminal_cannot_show_is_written_all_the_same() -> None:
    Path("text.txt").write_text(TEXT + "日本語 żółw 🙂 " * 300)
    assert train("text.txt", "--tokenizer", "char", "--out", "run") == 0
    for more in ([], ["--json"]):
        words = "sample run --prompt 日本 --temperature 2 --max-tokens 20 --seed 1".split()
        done = subprocess.run(
            [sys.executable, "-m", "gptsmith", *words, *more],
            env={**os.environ, "PYTHONIOENCODING": "cp1252"},
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert "日本" in (json.loads(done.stdout)[0]["prompt"] if more else done.stdout.decode())


def test_a_name_that_is_not_utf_8_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    Path(name).write_text(TEXT)
    assert train(name, "--tokenizer", "char", "--out", "new/run") == 2
    said = capsys.readouterr().err
    assert "settings cannot hold what is not UTF-8: data = " in said
    assert "caf" in said
    assert not Path("new").exists()
