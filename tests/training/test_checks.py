"""What would spoil a run is said before its first step, with advice that helps."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gptsmith.cli.main import main
from gptsmith.machine import devices
from gptsmith.machine.terminal import count
from tests.training.test_run import TEXT, TINY, here

__all__ = ["here"]  # each test in a folder of its own, with a text

LONG = TEXT * 10


@pytest.fixture
def noted(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """Train for some steps; the notes before the first."""

    def check(*words: str, data: str = "text.txt") -> list[str]:
        capsys.readouterr()
        number = len(list(Path().glob("run-*")))
        line = ["train", data, *TINY, "--steps", "2", "--warmup-steps", "1", *words]
        assert main([*line, "--out", f"run-{number}"]) == 0
        said = capsys.readouterr().err
        assert not re.search(r"\b1 (steps|rows|threads|tokens|layers|heads)\b", said), said
        return re.findall(r"^note: (.*)", said.partition("Training\n")[0], re.M)

    return check


def flags_in(note: str) -> list[str]:
    """The flags that a note advises."""
    advised = re.search(r"use (--.*)$", note)
    assert advised, note
    return shlex.split(advised[1])


@pytest.mark.slow
def test_a_warmup_as_long_as_the_run(noted: Callable[..., list[str]]) -> None:
    Path("text.txt").write_text(LONG)
    for steps, warmup in (("30", "100"), ("3", "3")):
        (note,) = noted("--steps", steps, "--warmup-steps", warmup)
        assert "takes the whole run" in note
        assert noted("--steps", steps, *flags_in(note)) == []
    assert noted() == []


def test_a_minimum_above_the_peak_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "text.txt", *TINY, "--steps", "3", "--out", "run"]
    assert main([*line, "--min-learning-rate", "0.01"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--min-learning-rate is 0.01, above the peak learning rate 0.002" in said
    assert not Path("run").exists()
    assert main([*line, "--min-learning-rate", "0.01", "--schedule", "constant"]) == 0


def test_a_validation_split_of_few_tokens(noted: Callable[..., list[str]]) -> None:
    (note,) = noted()
    assert re.match(r"only \d+ tokens are held out for validation", note)
    assert noted(*flags_in(note)) == []
    Path("text.txt").write_text(TEXT[:900])
    (note,) = noted()
    assert note.endswith("use more text")
    assert noted("--validation-fraction", "0") == []


def test_a_share_far_from_what_was_asked(noted: Callable[..., list[str]]) -> None:
    """Twenty documents, of which the two that are held out are long."""
    Path("texts").mkdir()
    for number in range(20):
        long = number in (4, 14)  # the rule's choice of a tenth
        Path(f"texts/{number:02}.txt").write_text(LONG if long else TEXT)
    (note,) = noted(data="texts")
    assert re.match(r"\d\d\.\d% of the tokens are held out for validation, but 10.0%", note)
    Path("one.txt").write_text(
        "\n".join(path.read_text() for path in sorted(Path("texts").iterdir()))
    )
    assert noted(data="one.txt") == []


def test_prepared_data_has_to_be_prepared_again(noted: Callable[..., list[str]]) -> None:
    assert main(["prepare", "text.txt", "--tokenizer", "char", "--out", "data"]) == 0
    (note,) = noted(data="data")
    assert "prepare the text again and use --validation-fraction" in note
    words = ["prepare", "text.txt", "--tokenizer", "char", "--out", "again"]
    assert main([*words, *flags_in(note)]) == 0
    assert noted(data="again") == []


def with_free(monkeypatch: pytest.MonkeyPatch, free: int, swap: int = 0) -> None:
    monkeypatch.setattr(devices, "available_memory", lambda device: free)
    memory = psutil.swap_memory()
    monkeypatch.setattr(psutil, "swap_memory", lambda: memory._replace(free=swap))


def test_more_memory_than_is_free(
    noted: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """1,400 parameters of 4 bytes: 11 KB are certain, and 6 rows of activations take 100 more."""
    Path("text.txt").write_text(LONG)
    with_free(monkeypatch, 10**6)
    assert noted("--micro-batch", "6") == []
    with_free(monkeypatch, 30_000)
    (note,) = noted("--micro-batch", "6")
    assert re.match(r"training needs about \d+ KB more memory, but 30 KB are free", note)
    assert "use --micro-batch 3 or a smaller model" in note
    with_free(monkeypatch, 7_000)
    assert main(["train", "text.txt", *TINY, "--steps", "3", "--out", "none"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"needs \d+ KB for gradients and the optimizer, but 7 KB are free", said)
    with_free(monkeypatch, 7_000, swap=10**6)
    assert len(noted()) == 1


def test_one_thing_is_singular() -> None:
    assert [count(number, "step") for number in (0, 1, 2000)] == [
        "0 steps",
        "1 step",
        "2,000 steps",
    ]
