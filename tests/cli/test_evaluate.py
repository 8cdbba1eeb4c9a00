"""`gptsmith evaluate`: models alone, beside and against another, and what is refused."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import gptsmith
from gptsmith import GPTConfig
from gptsmith.cli.main import main
from gptsmith.tokenizers import byte_tokenizer, learn_bpe

from ..conftest import TINY, scrambled

TEXTS = [f"Line {i}: the quick brown fox met {i * i} dogs.\n" * (1 + i % 3) for i in range(40)]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models of bytes, of which one is nearly the other, one of BPE, and texts."""
    monkeypatch.chdir(tmp_path)
    tokenizers = {"a": byte_tokenizer(), "b": byte_tokenizer(), "bpe": learn_bpe(TEXTS, 300)}
    for name, tokenizer in tokenizers.items():
        model = scrambled(GPTConfig(**TINY | {"vocab_size": tokenizer.vocab_size}))
        if name == "b":
            with torch.no_grad():
                model.ln_f.weight.mul_(0.5)
        gptsmith.save(model, tokenizer, Path(name))
    gptsmith.save(scrambled(GPTConfig(**TINY | {"vocab_size": 257})), None, Path("nameless"))
    Path("texts.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS))
    Path("short.txt").write_text("too short\n")


@pytest.fixture
def does(models: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str, status: int = 0) -> str:
        assert main(["evaluate", *words]) == status
        said = capsys.readouterr()
        return said.err if status else said.out

    return run


def test_against_gives_the_difference_by_document(does: Callable[..., str]) -> None:
    words = ("b", "--data", "texts.jsonl", "--against", "a")
    found = json.loads(does(*words, "--json", "--per-document", "rows.jsonl"))
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()]
    assert [row["document"] for row in rows] == [*range(1, 41)] * 2
    assert [row["bytes"] for row in rows][1:40] == [len(text) for text in TEXTS[1:]]
    assert rows[3]["begins"] == "Line 3: the quick brown fox met 9 dogs."
    a, b = (
        np.array([row["bits_per_byte"] for row in rows if row["model"] == name]) for name in "ab"
    )
    sizes = [row["bytes"] for row in rows[:40]]
    against = found["against"]
    assert against["model"] == "a"
    assert against["difference"] == pytest.approx(np.average(b - a, weights=sizes))
    assert against["difference"] == pytest.approx(found["bits_per_byte"] - against["bits_per_byte"])
    low, high = against["interval"]
    assert low < against["difference"] < high
    expected = stats.bootstrap(
        (b - a, np.array(sizes)),
        lambda bits, size, axis: (bits * size).sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = expected.high - expected.low
    assert abs(low - expected.low) < 0.1 * width
    assert abs(high - expected.high) < 0.1 * width
    assert against["verdict"] == ("better" if high < 0 else "worse" if low > 0 else "undecided")
    text = does(*words)
    assert f"b is {against['verdict']} than a by {abs(against['difference']):.4f} bits" in text
    assert "documents: 40\n" in text


def test_a_model_against_itself_is_undecided(does: Callable[..., str]) -> None:
    found = json.loads(does("a", "--data", "texts.jsonl", "--against", "a", "--json"))
    assert found["against"]["difference"] == 0
    assert found["against"]["interval"] == [0, 0]
    assert found["against"]["verdict"] == "undecided"
    assert found["against"]["documents_to_settle"] is None


def test_several_models_are_as_each_alone(does: Callable[..., str]) -> None:
    """Of one tokenizer to the bit; of several, nearly: they begin at the same byte."""
    words = ("--data", "texts.jsonl", "--json", "--context-length", "7", "--stride", "3")
    lines = does("a", "b", *words).splitlines()
    alone = [does(name, *words).strip() for name in "ab"]
    assert lines == alone
    lines = does("a", "bpe", *words).splitlines()
    for name, line in zip(("a", "bpe"), lines, strict=True):
        alone_here = json.loads(does(name, *words))
        together = json.loads(line)
        assert together["model"] == name
        assert together["bits_per_byte"] == pytest.approx(alone_here["bits_per_byte"], rel=0.01)
        assert together["documents"] == alone_here["documents"] == 40
    assert len({json.loads(line)["bytes"] for line in lines}) == 1


def test_a_model_without_a_tokenizer_reads_the_tokens_of_the_other(
    does: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", "texts.jsonl", "--tokenizer", "byte", "--out", "data"]) == 0
    capsys.readouterr()
    for names in (("a", "nameless"), ("nameless", "a")):
        lines = does(*names, "--data", "data", "--split", "train", "--json").splitlines()
        one, other = map(json.loads, lines)
        assert one["documents"] == other["documents"] == 36
        assert one["bytes"] == other["bytes"]
        assert (one["model"], other["model"]) == names
    alone = json.loads(does("nameless", "--data", "data", "--json"))
    assert alone["bits_per_byte"] is alone["interval"] is None


@pytest.mark.slow
def test_pictures_and_tables(does: Callable[..., str]) -> None:
    words = ("bpe", "b", "--data", "texts.jsonl", "--against", "a")
    text = does(*words, "--plot", "p.png", "--by-position", "q.png", "--per-document", "d.csv")
    assert [line.split()[0] for line in text.splitlines()[1:4]] == ["a", "bpe", "b"]
    for name in ("p.png", "q.png"):
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    with Path("d.csv").open(newline="") as file:
        assert len([*csv.DictReader(file)]) == 3 * 40
    does(*words, "--per-document", "d.parquet")
    from pyarrow import parquet

    read = parquet.read_table("d.parquet").to_pylist()
    bytewise = [row for row in read if row["model"] == "b"]
    # All but "Line", the first token of BPE, and a token after each document.
    assert sum(row["tokens"] for row in bytewise) == sum(map(len, TEXTS)) - 4 + 40
    assert read[0]["begins"].startswith("0: the quick")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a --data short.txt --against b", "short.txt is too short to compare models"),
        ("a --data texts.jsonl --stride 12", "--stride is 12: 1 to the 11 tokens of a window"),
        ("a --data texts.jsonl --stride 0", "--stride is 0: at least 1"),
        (
            "a --data texts.jsonl --context-length 5 --stride 6",
            "--stride is 6: 1 to the 5 tokens of a window is needed",
        ),
        (
            "a --data texts.jsonl --per-document rows.txt",
            "--per-document is rows.txt: a file that ends in .jsonl, .csv or .parquet is needed",
        ),
        (
            "a --data texts.jsonl --per-document no/rows.csv",
            "--per-document is no/rows.csv: create the folder no first",
        ),
        ("a --data texts.jsonl --by-position a", "--by-position is a, a folder: name a file"),
        ("a --data texts.jsonl --plot p.png", "--plot draws a comparison: add --against MODEL"),
        ("nameless --data texts.jsonl --against a", "nameless has no tokenizer.json, which bits"),
        (
            "a bpe nameless --data texts.jsonl",
            "a model without a tokenizer.json cannot be compared",
        ),
        ("a c --data texts.jsonl", "no model at c"),
        ("a --data texts.jsonl --against c", "no model at c"),
    ],
)
def test_what_is_refused(
    words: str, said: str, does: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before a model is loaded, and nothing is left behind."""

    def loading(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("gptsmith.cli.evaluate.open_model", loading)
    before = sorted(Path().iterdir())
    assert does(*words.split(), status=2).startswith(f"gptsmith: {said}")
    assert sorted(Path().iterdir()) == before
