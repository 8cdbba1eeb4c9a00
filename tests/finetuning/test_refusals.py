"""Fine-tuning as somebody types it who errs: one line, nothing left, and an advice that works."""

import contextlib
import errno
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gptsmith
from gptsmith import GPT, GPTConfig
from gptsmith.checkpoint.finding import checkpoints
from gptsmith.cli.main import main
from gptsmith.data.example_writer import RowWriter
from gptsmith.tokenizers import byte_tokenizer
from tests.advice import cured, followed, refusal

SIZES: dict[str, Any] = {"vocab_size": 257, "n_layer": 1, "n_head": 2, "n_embd": 8}
MACHINE = "--threads 1 --dtype float32 --fused no --attention kernel --warmup-steps 0"
ROWS = f"{MACHINE} --steps 1 --batch-rows 1 --sample-tokens 0"  # of examples
TOY = f"{ROWS} --test-fraction 0 --validation-fraction 0"
CHAT = [{"instruction": f"Say {n}", "output": str(n)} for n in range(5)]
LABELS = [{"text": f"number {n}", "label": n % 2} for n in range(8)]
PAIRS = [{"prompt": f"Say {n}", "chosen": str(n), "rejected": "no"} for n in range(5)]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FILES: dict[str, str | bytes] = {
    "text.txt": "the quick brown fox\n" * 80,
    "chat.jsonl": lines(*CHAT),
    "chat.json": json.dumps(CHAT),
    "chat-16.json": json.dumps(CHAT).encode("utf-16"),
    "latin.json": json.dumps([{"prompt": "é", "completion": "e"}], ensure_ascii=False).encode(
        "latin-1"
    ),
    "labels.jsonl": lines(*LABELS),
    "pairs.jsonl": lines(*PAIRS),
    "mixed.jsonl": lines(*CHAT, *LABELS),
    "mixed-pairs.jsonl": lines(*CHAT, *PAIRS),
    "null.jsonl": lines(*CHAT, {"instruction": "x", "output": None}),
    "number.jsonl": lines(*CHAT, {"instruction": 1, "output": "x"}),
    "empty-answer.jsonl": lines(*CHAT, {"instruction": "x", "output": " "}),
    "list.jsonl": lines(*CHAT, [1]),
    "half-row.jsonl": lines(*CHAT)[:-9],
    "first.jsonl": lines({"note": "x"}, *CHAT),
    "float.jsonl": lines(*LABELS, {"text": "x", "label": 0.5}),
    "no-rejected.jsonl": lines(*PAIRS, {"prompt": "x", "chosen": "y"}),
    "one.jsonl": lines(CHAT[0]),
    "one-label.jsonl": lines(*LABELS[::2]),
    "split.jsonl": lines(*({**row, "split": "test"} for row in CHAT)),
    "nothing.jsonl": lines({"note": "x"}),
    "empty.jsonl": "",
    "empty.json": "[]",
    "header.csv": "text,label\n",
    "object.json": json.dumps(CHAT[0]),
    "half.json": json.dumps(CHAT)[:-9],
    "half.parquet": b"PAR1 and then nothing",
    "headless.tsv": "number 1\todd\nnumber 2\teven\n",
    "quote.csv": 'text,label\n"number 1,odd\nnumber 2,even\n',
    "stray.csv": 'text,label\n"a" b,odd\nnumber 2,even\n',
    "mac.csv": "text,label\ra,b\rc,d\r",
    "bad.jinja": "{% for message in messages %}\n{{ message.content }\n{% endfor %}",
    "endless.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "latin.jinja": "{{ 'é' }}".encode("latin-1"),
}


def succeed(line: str) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(line.split()) == 0, said.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, files with and without mistakes, and runs of each kind."""
    place = tmp_path_factory.mktemp("made")
    torch.manual_seed(7)
    for name, more in {"base": {}, "narrow": {"context_length": 90}}.items():
        config = GPTConfig(**{**SIZES, "context_length": 200, **more})
        gptsmith.save(GPT(config), byte_tokenizer(), place / name)
    for name, content in FILES.items():
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with contextlib.chdir(place):
        words = "--tokenizer char --n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --steps 1"
        succeed(f"train text.txt {words} --batch-tokens 32 {MACHINE} --out letters")
        succeed(f"finetune base --data chat.jsonl --lora 2 {TOY} --out adapter")
        succeed(f"finetune base --data labels.jsonl {TOY} --out labeller")
        succeed(f"finetune base --data labels.jsonl --lora 2 {TOY} --out label-adapter")
        shutil.copytree("base", "gone")
        succeed(f"finetune gone --data chat.jsonl --lora 2 {TOY} --out orphan")
        shutil.rmtree("gone")
        succeed(f"finetune base --data pairs.jsonl {ROWS} --steps 2 --save-every 1 --out pairs")
    return place


@pytest.fixture(autouse=True)
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def tuning(words: str, *, model: str = "base") -> str:
    """A line that fine-tunes on the file that the words begin with."""
    return f"finetune {model} --data {words} {TOY} --out OUT"


SKIP = "skip such rows with --bad-rows skip"


@pytest.mark.parametrize(
    ("line", "message", "cures"),
    [
        *(
            (tuning(f"{name}.jsonl"), said, [tuning(f"{name}.jsonl --bad-rows skip")])
            for name, said in {
                "mixed": "line 6 has no 'prompt' (there are: 'text', 'label'): it is an example "
                "for classify, not for chat",
                "mixed-pairs": "it is an example for preference, not for chat",
                "null": "line 6 has no 'output' (there are: 'instruction')",
                "number": "line 6 has int in 'instruction': text is needed",
                "empty-answer": "line 6 has an empty 'output': text is needed",
                "list": "line 6 is not a JSON object: one with named fields is needed",
                "half-row": "one object per line is needed",
                "first": "first.jsonl, line 1 has none of the fields of an example",
                "float": "line 9 has float in 'label': text is needed",
                "no-rejected": "line 6 has no 'rejected'",
            }.items()
        ),
        (tuning("chat-16.json"), "add --encoding utf-16",
         [tuning("chat-16.json --encoding utf-16")]),
        (tuning("latin.json"), "gptsmith: latin.json: byte 0xe9 at position 13 is not utf-8: name "
         "the file's encoding with --encoding, as latin-1",
         [tuning("latin.json --encoding latin-1")]),
        (tuning("headless.tsv"), "if the file has no header, name its columns with --columns",
         [tuning("headless.tsv --columns text,label")]),
        (tuning("labels.jsonl", model="label-adapter") + " --lora 3", "without --lora, it learns",
         [tuning("labels.jsonl", model="label-adapter")]),
        (tuning("chat.jsonl", model="orphan"), "is not there: name it with --base, as in `gptsmith "
         "merge ", ["merge orphan OUT --base base", tuning("chat.jsonl", model="cured-0")]),
        (tuning("adapter/data --task classify"), "has examples for the task chat, not classify: "
         "leave out --task", [tuning("adapter/data")]),
        (tuning("adapter/data", model="narrow"), "has rows of up to 200 tokens, but the model a "
         "context of 90: name the file that it was made from, ",
         [tuning("chat.jsonl", model="narrow")]),
        (tuning("adapter/data", model="letters"), "was made with another tokenizer than the "
         "model's: name the file that it was made from, ", []),
        (f"finetune base --data one.jsonl {ROWS} --validation-fraction 0 --out OUT",
         "(1) is left to learn from: use more, or --test-fraction 0 and --validation-fraction 0",
         [tuning("one.jsonl")]),
        (tuning("chat.jsonl --template bad.jinja"), "bad.jinja, line 2: the chat template is not ",
         [tuning("chat.jsonl --template plain")]),
        ("classify labeller --data labels.jsonl --confusion base", "base is a folder: name a "
         "file for --confusion", ["classify labeller --data labels.jsonl --confusion OUT.png"]),
        ("merge base OUT", "is a whole model: an adapter is needed", ["merge adapter OUT"]),
        ("finetune --resume labeller --lora 2", "leave it out", ["finetune --resume labeller"]),
    ],
)  # fmt: skip
def test_advice_in_words_works(
    line: str, message: str, cures: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    said = followed(line, message, cures, capsys)
    assert "--bad-rows" not in "".join(cures) or f"; correct it, or {SKIP}" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("chat.jsonl --template alpacca", "no chat template 'alpacca', did you mean 'alpaca'?"),
        ("chat.jsonl --lora-alpha 3", "has no effect without adapters: add lora 16"),
        ("chat.jsonl --epochs 1", "--steps cannot go with epochs, which set the steps: leave "),
        ("labels.jsonl --template alpaca", "has no effect on the task classify, only on chat and "
         "preference: leave it out"),
        ("adapter/data --freeze all-but-last-1", "--freeze cannot go with an adapter, "),
        ("chat.jsonl --beta 0.2", "--beta has no effect on the task chat, only on preference: "),
        ("chat.jsonl --batch-tokens 64", "--batch-tokens has no effect on the task chat, only on "),
        ("chat.jsonl --task classfy", "did you mean 'classify'?"),
        ("chatt.jsonl", "did you mean 'chat.jsonl'?"),
    ],
)  # fmt: skip
def test_advice_about_a_flag_works(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = tuning(words)
    if "classfy" in words:
        line = line.replace("chat.jsonl", "labels.jsonl")
    if "adapter" in words:
        line = line.replace("base", "adapter")
    cured(line.split(), message, capsys)


def test_the_adapter_of_a_classifier_is_merged_as_advised(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = tuning("labels.jsonl", model="label-adapter") + " --lora 3"
    cured(line.split(), "`gptsmith merge ", capsys)
    one, other = (gptsmith.load(name)[0] for name in ("label-adapter", "cured-0"))
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(one.scores(tokens), other.scores(tokens), atol=1e-5, rtol=0)
    succeed(tuning("labels.jsonl --lora 2", model="cured-0").replace("OUT", "again"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (tuning("empty.jsonl"), "there is no example in empty.jsonl: rows of messages; "),
        (tuning("empty.json"), "there is no example in empty.json: "),
        (tuning("header.csv"), "there is no example in header.csv: "),
        (tuning("nothing.jsonl --bad-rows skip"), "the first bad row: nothing.jsonl, line 1 has "),
        (tuning("object.json"), "object.json is not a JSON list: a list of objects is needed"),
        (tuning("half.json"), "half.json is not JSON: "),
        (tuning("half.parquet"), "half.parquet cannot be read as Parquet"),
        (tuning("quote.csv"), "a field that begins with a quotation mark ends with one"),
        (tuning("stray.csv"), "a field that begins with a quotation mark ends with one"),
        (tuning("mac.csv"), "a carriage return alone does not end a line: end lines"),
        (tuning("one-label.jsonl"), "all labels are '0': at least two different ones are needed"),
        (tuning("split.jsonl"), "none of the examples (5) is left to learn from: use more, or "
         "change 'split'"),
        (tuning("chat.jsonl --template endless.jinja"), "writes no special token after an answer"),
        (tuning("chat.jsonl --template latin.jinja"), "latin.jinja is not in UTF-8"),
        (tuning("chat.jsonl --template base"),
         "no chat template 'base': alpaca, plain, completion, fixed-length or a file"),
        (tuning("chat.jsonl", model="labeller"), "is a classifier, which labels texts and "),
        (tuning("chat.jsonl", model="."), "has no config.json: a folder with a GPT-2"),
        (tuning("pairs.jsonl --beta 0"), "--beta is 0.0: above 0 is needed"),
        (f"finetune base --data text.txt --epochs 1 {MACHINE} --out OUT", "--epochs has no effect "
         "on the task text, only on chat, classify and preference: leave it out"),
        (tuning("chat.jsonl").replace("OUT", "base"), "base already exists: give --out another"),
        (tuning("chat.jsonl").replace("OUT", "adapter"), "`gptsmith train --resume adapter`"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_line_and_leaves_nothing(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(Path().rglob("*"))
    found = refusal(line.replace("OUT", "runs/some/run").split(), capsys)
    assert said in found
    assert "Traceback" not in found
    assert sorted(Path().rglob("*")) == before


# -- what is unusual, and works


def test_examples_that_are_tokens_already_are_data(capsys: pytest.CaptureFixture[str]) -> None:
    succeed(tuning("adapter/data --lora 2").replace("OUT", "again"))
    one, other = (gptsmith.load(name)[0].state_dict() for name in ("adapter", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not Path("again/data").exists()
    assert main(["finetune", "--resume", "again"]) == 0


def test_a_text_may_come_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be read only once, so not also to recognise the task."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path("text.txt").read_bytes())))
    succeed(f"finetune base --data - {MACHINE} --steps 1 --batch-tokens 200 --out run")


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbftext,label\r\nnumber 1,odd\r\n\r\nnumber 2,even\r\n",
        lines({"text": "a<|endoftext|>b", "label": 1}, {"text": "c<|endoftext|>", "label": 2}),
        lines(*({"text": "x" * 3000 + str(n), "label": f"L{n}"} for n in range(300))),
        lines({"prompt": "", "completion": "<|endoftext|>"}, {"prompt": "x", "completion": "y"}),
        lines({"instruction": "x" * 3000, "output": "y" * 3000}),
        lines({"prompt": "x" * 999, "chosen": "y" * 500, "rejected": "z"}),
    ],
    ids=["crlf", "end-of-text", "300-labels", "end-in-answer", "long", "long-pair"],
)
def test_odd_examples_are_learned(content: str | bytes) -> None:
    name = "odd.csv" if isinstance(content, bytes) else "odd.jsonl"
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    succeed(tuning(name).replace("OUT", "run"))
    record = json.loads(Path("run/metrics.jsonl").read_text())
    assert 0 < record["loss"] < 10


@pytest.mark.parametrize("task", ["chat", "labels", "pairs"])
def test_a_context_of_a_few_tokens_and_a_thousandth_of_an_epoch(task: str) -> None:
    config = GPTConfig(**SIZES, context_length=8)
    gptsmith.save(GPT(config), byte_tokenizer(), "short")
    few = TOY.replace("--steps 1", "--epochs 0.001")
    succeed(f"finetune short --data {task}.jsonl {few} --out run")
    assert json.loads(Path("run/metrics.jsonl").read_text())["step"] == 1


def test_an_adapter_learns_further_as_its_run_advises(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    succeed(tuning("chat.jsonl --lora 2", model="adapter").replace("OUT", "on"))
    succeed("train on/config.toml --from on --steps 1 --out further")
    assert Path("further/checkpoints/step-00000001/adapter_model.safetensors").exists()


def test_a_classifier_keeps_the_adapters_of_the_model_it_is_made_from() -> None:
    """A checkpoint has what the classifier has learned from: the adapters too."""
    fast = "--learning-rate 0.1"
    succeed(tuning(f"chat.jsonl --lora 2 {fast}").replace("OUT", "far"))
    line = tuning("labels.jsonl --learning-rate 0", model="far").replace("OUT", "labels")
    succeed(line.replace("--steps 1", "--steps 1 --evaluate-every 1"))
    assert Path("labels/checkpoints/step-00000001/adapter_model.safetensors").exists()
    one, other = (gptsmith.load(name)[0] for name in ("far", "labels"))
    tokens = torch.arange(40)[None]
    torch.testing.assert_close(one.features(tokens), other.features(tokens), atol=1e-5, rtol=0)


# -- damage


def to_step_one() -> None:
    """As if the run `pairs` had been killed after its first step."""
    for path in checkpoints(Path("pairs")):
        if path.name > "step-00000001":
            shutil.rmtree(path)


def half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other_pairs(path: Path) -> None:
    np.save(path, np.zeros((9, 2)))


def emptied(path: Path) -> None:
    path.write_text('{"format": "gptsmith-examples", "version": 1}')


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("reference-train.npy", half, "reference-train.npy is damaged ("),
        ("reference-train.npy", other_pairs, "reference-train.npy is not about the"),
        ("reference-validation.npy", Path.unlink, "has lost reference-validation.npy"),
        ("data/examples.json", half, "data/examples.json is not valid JSON"),
        ("data/examples.json", emptied, "data/examples.json lacks counts, labels, settings"),
        ("data/ends.npy", half, "pairs/data is damaged: "),
        ("data/tokens.bin", half, "pairs/data has tokens.bin or targets.bin of another size"),
    ],
)  # fmt: skip
def test_a_run_with_a_damaged_file_is_refused_and_mended_as_advised(
    name: str,
    damage: Callable[[Path], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to_step_one()
    damage(Path("pairs") / name)
    found = refusal(["train", "--resume", "pairs"], capsys)
    assert said in found
    if "start another run" in found:
        succeed("train pairs/config.toml --out another")
    else:
        assert "remove pairs/data, and the examples are read again" in found
        shutil.rmtree("pairs/data")
        succeed("train --resume pairs")


@pytest.mark.parametrize("place", ["rows", "reference"])
def test_a_full_disk_leaves_nothing(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    save = np.save

    def full_at_reference(file: Any, *arguments: Any) -> None:
        (full if "reference" in getattr(file, "name", "") else save)(file, *arguments)

    if place == "rows":
        monkeypatch.setattr(RowWriter, "add", full)
    else:
        monkeypatch.setattr(np, "save", full_at_reference)
    line = tuning("pairs.jsonl").replace("OUT", "runs/run")
    assert "the disk is full: " in refusal(line.split(), capsys)
    assert not Path("runs").exists()
