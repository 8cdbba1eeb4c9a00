"""`gptsmith classify`: its lines, their order, its accuracy, and what is no classifier."""

import csv
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.cli.main import main
from gptsmith.config.classifier import ClassifierConfig
from gptsmith.config.model import GPTConfig
from gptsmith.model.classifier import Classifier
from gptsmith.tokenizers import byte_tokenizer

from ..conftest import TINY
from ..model.test_classifier import scrambled

LABELS = ("ham", "spam", "ägg")
TEXTS = ["one", "a text that is longer than the context", "", "zwei\nlines", "ü", "x" * 11, "one"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model; it pads with the first byte, which also may be text."""
    folder = tmp_path_factory.mktemp("model") / "classifier"
    tokenizer = byte_tokenizer()
    sizes = TINY | {"vocab_size": tokenizer.vocab_size, "context_length": 16}
    gptsmith.save(scrambled(ClassifierConfig.of(GPTConfig(**sizes), LABELS, 0)), tokenizer, folder)
    return folder


def wanted(folder: Path, texts: list[str]) -> list[dict[str, float]]:
    """Probabilities by transformers' rules, one text at a time."""
    model, tokenizer = gptsmith.load(folder)
    assert isinstance(model, Classifier)
    assert tokenizer is not None
    found = []
    for text in texts:
        ids = tokenizer.encode(text)[:16]
        tokens, mask = torch.tensor([ids or [0]]), torch.tensor([[1] * len(ids) or [0]])
        found.append(
            dict(zip(LABELS, model.scores(tokens, mask).softmax(1)[0].tolist(), strict=True))
        )
    return found


def check(lines: list[str], folder: Path, texts: list[str]) -> None:
    assert len(lines) == len(texts)
    for line, p in zip(lines, wanted(folder, texts), strict=True):
        found = json.loads(line)
        assert [*found] == ["label", "probabilities"]
        assert [*found["probabilities"]] == [*LABELS]
        assert found["probabilities"] == pytest.approx(p, abs=1e-5)
        assert found["label"] == max(p, key=lambda label: p[label])


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def as_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0]], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("suffix", "write"),
    [
        (".jsonl", as_jsonl),
        (".json", as_json),
        (".csv", as_csv),
        (".tsv", as_csv),
        (".parquet", as_parquet),
    ],
)
def test_rows_of_every_format_in_their_order(
    suffix: str,
    write: Callable[[Path, list[dict[str, Any]]], Path],
    classifier: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write(tmp_path / f"data{suffix}", [{"n": 1, "body": text} for text in TEXTS])
    assert (
        main(["classify", str(classifier), "--data", str(path), "--field", "body", "--json"]) == 0
    )
    out, err = capsys.readouterr()
    check(out.splitlines(), classifier, TEXTS)
    assert err == "1 text longer than the context of 16 tokens: read from the beginning\n"


def test_a_text_on_each_line_of_another_file(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.txt").write_bytes("one\n\ntwo\r\nü".encode())
    assert main(["classify", str(classifier), "--data", str(tmp_path / "data.txt"), "--json"]) == 0
    check(capsys.readouterr().out.splitlines(), classifier, ["one", "", "two", "ü"])


def test_texts_of_the_command_line(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["classify", str(classifier), "--text", "one", "--text", ""]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, p in zip(lines, wanted(classifier, ["one", ""]), strict=True):
        likeliest = sorted(p, key=lambda label: -p[label])
        assert line == "  ".join(f"{label} {p[label]:.4f}" for label in likeliest)


def test_batches_of_many_texts_change_nothing(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"{n * n}" * (n % 7) for n in range(1200)]
    path = as_jsonl(tmp_path / "data.jsonl", [{"text": text} for text in texts])
    assert main(["classify", str(classifier), "--data", str(path), "--json"]) == 0
    check(capsys.readouterr().out.splitlines(), classifier, texts)


def test_labels_in_the_data_give_an_accuracy(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [max(p, key=lambda label: p[label]) for p in wanted(classifier, TEXTS)]
    labels = [*right[:4], *(LABELS[LABELS.index(each) - 1] for each in right[4:6]), "eel"]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    path, picture = as_jsonl(tmp_path / "data.jsonl", rows), tmp_path / "confusion.png"
    words = ["classify", str(classifier), "--data", str(path), "--confusion", str(picture)]
    for _ in range(2):  # the second replaces the picture
        assert main(words) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 * len(TEXTS)
    assert "1 text not counted, with a label that the model does not have, such as 'eel'" in err
    assert "accuracy 0.6667 of 6 texts" in err
    assert "precision" in err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_columns_of_a_table_without_a_header(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data.tsv").write_text("ham\tone\nspam\ttwo\n")
    words = ["classify", str(classifier), "--data", str(tmp_path / "data.tsv"), "--json"]
    assert main([*words, "--columns", "label,text"]) == 0
    out, err = capsys.readouterr()
    check(out.splitlines(), classifier, ["one", "two"])
    assert "of 2 texts" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --data or --text"),
        (["--data", "x.jsonl", "--text", "a"], "give either --data or --text"),
        (["--data", "absent.jsonl"], "no file, folder or built-in text 'absent.jsonl'"),
        (["--data", "."], "is a folder: name a file of texts"),
        (["--data", "bad.jsonl"], "bad.jsonl, line 2 has no 'text' (there are: body)"),
        (["--text", "a", "--confusion", "a.png"], "--confusion needs --data with labels"),
        (["--data", "x.jsonl", "--confusion", "no/a.png"], "no folder no for --confusion"),
        (["--text", "a", "--dtype", "int8"], "a classifier cannot be quantized to 8 bits"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    as_jsonl(tmp_path / "bad.jsonl", [{"text": "a"}, {"body": "b"}])
    assert main(["classify", str(classifier), *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_bad_rows_can_be_skipped(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = as_jsonl(tmp_path / "data.jsonl", [{"text": "a"}, {"body": "b"}, {"text": "c"}])
    words = ["classify", str(classifier), "--data", str(path), "--bad-rows", "skip", "--json"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    check(out.splitlines(), classifier, ["a", "c"])
    assert "1 bad rows were skipped; the first: " in err


def test_a_model_that_writes_is_no_classifier(
    toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["classify", "run", "--text", "a"]) == 2
    err = capsys.readouterr().err
    assert "run is not a classifier: it writes text and has no labels; make one with" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        "sample {}",
        "sample run --draft {}",
        "evaluate {} --data text.txt",
        "export {} out --to gguf",
        "export {} out --to huggingface",
        "import {} out",
        "quantize {} out --bits 8",
        "bench generate {}",
        "bench train {}",
        "train text.txt --from {} --steps 1 --out out",
    ],
)
def test_what_writes_text_refuses_a_classifier(
    words: str, classifier: Path, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.format(classifier).split()) == 2
    *notes, last = capsys.readouterr().err.splitlines()
    assert "is a classifier, which labels texts and does not write: use" in last
    assert all(note.startswith(("note", "seed")) for note in notes)
    assert not (toys / "out").exists()


def test_describe_shows_a_classifier(classifier: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(classifier), "--trace", "2x4"]) == 0
    out = capsys.readouterr().out
    assert "K labels 3" in out
    assert "label's logits" in out


def test_generating_with_a_classifier_in_memory_is_refused(classifier: Path) -> None:
    model, tokenizer = gptsmith.load(classifier)
    assert tokenizer is not None
    with pytest.raises(ValueError, match="the model is a classifier"):
        gptsmith.generate_greedy(model, torch.tensor([[1]]), 1)
    with pytest.raises(ValueError, match="the model is a classifier"):
        gptsmith.complete(model, tokenizer, ["a"])
    with pytest.raises(ValueError, match="the model is a classifier"):
        gptsmith.evaluate(model, tokenizer, "shakespeare")
    with pytest.raises(ValueError, match="a classifier cannot be quantized to 8 bits"):
        gptsmith.load(classifier, bits=8)


MEASURED = """
import sys
import psutil
from gptsmith.cli.main import main
assert main(sys.argv[1:]) == 0
print(psutil.Process().memory_info().rss, file=sys.stderr)
"""


def many(path: Path, rows: int) -> Path:
    return as_jsonl(path, [{"text": f"text {number} " * 12} for number in range(rows)])


def started(classifier: Path, path: Path, *code: str) -> "subprocess.Popen[bytes]":
    words = [sys.executable, *(code or ("-m", "gptsmith")), "classify", str(classifier)]
    return subprocess.Popen(
        [*words, "--data", str(path), "--json", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(classifier: Path, tmp_path: Path) -> None:
    held = []
    for rows in (20_000, 80_000):  # 3 and 12 MB, which are read a megabyte at a time
        process = started(classifier, many(tmp_path / f"{rows}.jsonl", rows), "-c", MEASURED)
        out, said = process.communicate(timeout=300)
        assert len(out.splitlines()) == rows
        held.append(int(said.split()[-1]) / 1e6)  # MB
    assert held[1] - held[0] < 8, "60,000 more texts would take more"


@pytest.mark.slow
def test_a_broken_pipe_ends_it_quietly(classifier: Path, tmp_path: Path) -> None:
    with started(classifier, many(tmp_path / "data.jsonl", 100_000)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for _ in range(2000):
            json.loads(process.stdout.readline())
        process.stdout.close()
        assert process.wait(120) == 0
        assert process.stderr.read() == b""


@pytest.mark.slow
def test_ctrl_c_ends_it_after_a_whole_line(classifier: Path, tmp_path: Path) -> None:
    with started(classifier, many(tmp_path / "data.jsonl", 100_000)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(120) == 130
        assert process.stderr.read() == b"interrupted\n"
        for line in rest.splitlines():
            json.loads(line)
