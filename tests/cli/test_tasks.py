"""`evaluate --task` and `train --evaluate-tasks`: what is printed, recorded and refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gptsmith
from gptsmith import GPTConfig
from gptsmith.cli.main import main
from gptsmith.config.classifier import ClassifierConfig
from gptsmith.evaluation.labels import predict
from gptsmith.tokenizers import byte_tokenizer, learn_bpe

from ..conftest import TINY, TOY, scrambled
from ..model import test_classifier

WORDS = ["fox", "owl", "a hen", "some dogs"]
CHOICES = [
    {"prompt": f"Line {n}", "choices": WORDS, "answer": WORDS[n % 4]} for n in range(24)
]  # the answers are the likeliest by chance


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture
def does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Two models with different tokenizers, and a classifier."""
    monkeypatch.chdir(tmp_path)
    sizes = {**TINY, "context_length": 24}
    for name, tokenizer in {"a": byte_tokenizer(), "b": learn_bpe(WORDS * 9, 270)}.items():
        config = GPTConfig(**sizes | {"vocab_size": tokenizer.vocab_size})
        gptsmith.save(scrambled(config), tokenizer, Path(name))
    config = GPTConfig(**sizes | {"vocab_size": 257})
    labels = test_classifier.scrambled(ClassifierConfig.of(config, ("ham", "spam"), 0))
    gptsmith.save(labels, byte_tokenizer(), Path("classifier"))
    write("choices.jsonl", CHOICES)

    def run(*words: str, status: int = 0) -> str:
        assert main(["evaluate", *words]) == status
        said = capsys.readouterr()
        return said.err if status else said.out

    return run


def test_models_are_measured_and_compared(does: Callable[..., str]) -> None:
    words = ("a", "--task", "choices", "--data", "choices.jsonl", "--against", "b")
    found = json.loads(does(*words, "--json"))
    other = found["against"]
    assert (found["model"], found["task"], found["items"], found["cut"]) == ("a", "choices", 24, 0)
    assert other["difference"] == pytest.approx(found["accuracy"] - other["accuracy"])
    assert other["interval"][0] <= other["difference"] <= other["interval"][1]
    norm = found["accuracy_norm"] - other["accuracy_norm"]
    assert other["difference_norm"] == pytest.approx(norm)
    assert {other["verdict"], other["verdict_norm"]} <= {"better", "worse", "undecided"}
    assert 0 < other["p_value"] <= 1
    title, head, *rows = does(*words).split("\n\n")[0].splitlines()
    assert title == "choices: 24 items of choices.jsonl, ± one standard error"
    assert head.split() == ["model", "accuracy", "accuracy_norm"]
    assert [row.split()[0] for row in rows] == ["b", "a"]
    assert f"{found['accuracy']:.4f} ± {found['accuracy_stderr']:.4f}" in rows[1]
    both = does(*words[:1], "b", *words[1:5], "--json").splitlines()
    assert [json.loads(line)["model"] for line in both] == ["a", "b"]
    assert [json.loads(line)["accuracy"] for line in both] == [found["accuracy"], other["accuracy"]]


def test_labels_and_written_answers(does: Callable[..., str]) -> None:
    rows = [{"text": f"text {n}", "label": ("ham", "spam")[n % 2]} for n in range(9)]
    rows.append({"text": "longer than the context of it", "label": "ham"})
    words = ("--task", "classify", "--data", write("labels.jsonl", rows), "--json")
    found = json.loads(does("classifier", *words))
    model, tokenizer = gptsmith.load("classifier")
    assert tokenizer is not None
    given = [*predict(model, tokenizer, (r["text"] for r in rows))]
    right = [each.label == row["label"] for each, row in zip(given, rows, strict=True)]
    assert found["accuracy"] == sum(right) / 10
    assert (found["items"], found["cut"]) == (10, 1)
    rows = [{"prompt": "Hello", "answer": "world"}, {"prompt": "", "answer": 4}]
    found = json.loads(does("a", "--task", "exact", "--data", write("e.jsonl", rows), "--json"))
    assert (found["accuracy"], found["items"]) == (0.0, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("no-model --task hellaswag --data choices.jsonl", "those of --task choices; needed are"),
        ("no-model --task choices --data empty.jsonl", "empty.jsonl has no rows of questions"),
        ("no-model --task choices --data wrong.jsonl", "line 1 has 4 in 'answer': the number of"),
        ("no-model --task choice --data choices.jsonl", "--task is 'choice': one of hellaswag, "),
        ("no-model --task choices --data choices.jsonl --prompt llm.c", "is for --task hellaswag"),
        ("no-model --task choices --data choices.jsonl --stride 4", "--stride is for the loss on"),
        ("no-model --task choices --data one.jsonl --against b", "one.jsonl has one item: a comp"),
        ("classifier --task choices --data choices.jsonl", "classifier"),
        ("a --task classify --data labels.jsonl", "a is not a classifier"),
        ("classifier --task classify --data labels.jsonl", "line 1 has the label 'eggs', which"),
    ],
)
def test_one_line_says_what_is_wrong(words: str, said: str, does: Callable[..., str]) -> None:
    write("empty.jsonl", [])
    write("wrong.jsonl", [{**CHOICES[0], "answer": 4}])
    write("one.jsonl", CHOICES[:1])
    write("labels.jsonl", [{"text": "a", "label": "eggs"}])
    line = does(*words.split(), status=2)
    assert said in line
    assert len(line.splitlines()) == 1


def test_a_prompt_that_is_too_long_is_told(
    does: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*CHOICES, {**CHOICES[0], "prompt": "Line 0 " * 9}]
    assert main(["evaluate", "a", "--task", "choices", "--data", write("long.jsonl", rows)]) == 0
    assert "a: 1 item longer than the context of 24 tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_records_what_evaluate_finds(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["fox", "dogs", "met", "brown"]
    rows = [{"prompt": "the", "choices": words, "answer": n % 4} for n in range(9)]
    write("choices.jsonl", rows)
    write("last.jsonl", [{"text": f"the {word}"} for word in ("fox", "dogs", "quick")])
    flags = "--evaluate-tasks choices.jsonl --evaluate-tasks last.jsonl --evaluate-every 1"
    train = ["train", "text.txt", *TOY.split(), *flags.split(), "--steps", "2", "--out", "run2"]
    assert main(train) == 0
    assert main(["train", "--resume", "run2"]) == 0  # nothing is left to do, and nothing differs
    assert "contradicts" not in capsys.readouterr().err
    records = [json.loads(line) for line in Path("run2/metrics.jsonl").read_text().splitlines()]
    last = records[-1]
    for name, task in {"choices": "choices", "last": "lambada"}.items():
        verb = ["evaluate", "run2/checkpoints/step-00000002", "--task", task, "--json"]
        assert main([*verb, "--data", f"{name}.jsonl"]) == 0
        found = json.loads(capsys.readouterr().out)
        for key in ("accuracy", "accuracy_norm", "perplexity"):
            if key in found:
                assert last[f"{name}_{key}"] == pytest.approx(found[key], rel=1e-5)
    assert {key for key in last if key.startswith(("choices_", "last_"))} == {
        *("choices_accuracy", "choices_accuracy_norm", "last_accuracy", "last_perplexity")
    }
    assert str(toys / "last.jsonl") in Path("run2/config.toml").read_text()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("labels.jsonl", "has items of the task classify: that is not for a model that writes"),
        ("missing.jsonl", "no file, folder or built-in text 'missing.jsonl'"),
        ("validation.jsonl", "whose figures would be named 'validation' as others are"),
        ("unknown.jsonl", "line 1: unknown character 'é'"),
    ],
)
def test_a_run_refuses_questions_before_its_first_step(
    file: str, said: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("labels.jsonl", [{"text": "a", "label": "b"}])
    write("validation.jsonl", CHOICES)
    write("unknown.jsonl", [{"text": "the é"}])
    words = ["train", "text.txt", *TOY.split(), "--evaluate-tasks", file, "--out", "run3"]
    assert main(words) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not Path("run3").exists()
