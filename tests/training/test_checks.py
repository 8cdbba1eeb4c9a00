"""What would spoil a run is said before its first step, with advice that helps."""

import os
import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gptsmith.cli.main import main
from gptsmith.machine import devices, environment
from gptsmith.machine.terminal import count
from tests.advice import followed
from tests.conftest import TOY
from tests.training.test_run import TEXT, TINY, here

__all__ = ["here"]  # each test in a folder of its own, with a text


def words_of(seed: int, length: int) -> str:
    """The words of the text in another order, of so many characters: none of it repeats."""
    choose = random.Random(seed)
    return " ".join(choose.choices(TEXT.split(), k=length))[:length]


LONG = words_of(0, 10 * len(TEXT))


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
        length = (10 if long else 1) * len(TEXT)
        Path(f"texts/{number:02}.txt").write_text(words_of(number, length))
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
    for free, rows in ((60, 3), (30, 1)):
        with_free(monkeypatch, free * 1000)
        (note,) = noted("--micro-batch", "6")
        assert re.match(rf"training needs about \d+ KB more memory, but {free} KB are free", note)
        assert f"use --micro-batch {rows} or a smaller model" in note
        assert noted(*flags_in(note.removesuffix(" or a smaller model"))) == []
    assert noted("--micro-batch", "3", "--n-embd", "2", "--n-head", "1") == []
    with_free(monkeypatch, 7_000)
    assert main(["train", "text.txt", *TINY, "--steps", "3", "--out", "none"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"needs \d+ KB for gradients and the optimizer, but 7 KB are free", said)
    assert said.endswith("use a smaller model")
    line = ["train", "text.txt", *TINY, "--steps", "3", "--out", "smaller"]
    assert main([*line, "--n-embd", "2", "--n-head", "1"]) == 0
    with_free(monkeypatch, 7_000, swap=10**6)
    assert len(noted()) == 1


def test_one_thing_is_singular() -> None:
    assert [count(number, "step") for number in (0, 1, 2000)] == [
        "0 steps",
        "1 step",
        "2,000 steps",
    ]


# -- what is advised

FINE = "--steps 1 --warmup-steps 0 --batch-tokens 32 --threads 1 --dtype float32 --sample-tokens 2"


@pytest.mark.parametrize(
    ("line", "message", "cures"),
    [
        ("train --resume run --learning-rate 0.5", "leave it out, or start another run",
         ["train --resume run", f"train text.txt {TOY} --out OUT --learning-rate 0.5"]),
        ("train --resume run --data text.txt", "its own copy of its text in run/data: leave it out",
         ["train --resume run"]),
        (f"train text.txt {FINE} --out OUT --from run --n-layer 2", "its own model: leave it out",
         [f"train text.txt {FINE} --out OUT --from run"]),
        (f"train text.txt {FINE} --out OUT --from run --tokenizer byte",
         "leave it out to use the model's", [f"train text.txt {FINE} --out OUT --from run"]),
        (f"train text.txt {TOY} --out OUT --learning-rate 0.001 --min-learning-rate 0.01",
         "lower it",
         [f"train text.txt {TOY} --out OUT --learning-rate 0.001 --min-learning-rate 0.001"]),
        (f"train text.txt {TOY} --out OUT --block modern --fused yes", "take no",
         [f"train text.txt {TOY} --out OUT --block modern --fused no"]),
        ("plot run --out none/new.png", "create it first", ["plot run --out made/new.png"]),
        ("train own.toml --out OUT", "'training' is a section: write [training]",
         [f"train whole.toml --data text.txt {TOY} --out OUT"]),
        ("quantize small OUT --bits 4", "give the model that it was made from",
         ["quantize run OUT --bits 4 --tokens 8"]),
        ("quantize odd OUT --bits 8", "a multiple of 8 is needed to quantize a model",
         ["quantize run OUT --bits 8 --tokens 8"]),
        ("sample modern --seed 1 --compile yes", "leave it out",
         ["sample modern --seed 1 --max-tokens 2"]),
        ("sample run --seed 1 --prompt fé", "leave it out",
         ["sample run --seed 1 --max-tokens 2 --prompt f"]),
        ("sample run --seed 1 --prompt f\udcff", "it is not valid Unicode; remove it",
         ["sample run --seed 1 --max-tokens 2 --prompt f"]),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_what_is_advised_for_models_and_runs_works(
    line: str, message: str, cures: list[str], toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("made").mkdir()
    Path("own.toml").write_text("training = 1\n")
    Path("whole.toml").write_text("[training]\nseed = 1\n")
    for word, made in {
        "small": "quantize run small --bits 8 --tokens 8",
        "modern": f"train text.txt {TOY} --out modern --block modern",
        "odd": f"train text.txt {TOY} --out odd --n-embd 4",
    }.items():
        if f" {word} " in f"{line} ":
            assert main(made.split()) == 0, capsys.readouterr().err
    followed(line, message, cures, capsys)


@pytest.mark.system("posix", "runs /bin/false")
def test_without_a_compiler(
    toys: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each command names its own flag, and the other way is a compiler."""
    lines = {
        f"train text.txt {TOY} --out OUT --fused yes": "go on with --fused no",
        "sample run --seed 1 --max-tokens 2 --compile yes": "leave it out to do without",
    }
    for broken in (lambda: None, lambda: "/bin/false"):
        for number, (line, message) in enumerate(lines.items()):
            place = str(tmp_path / f"{number}-{broken()}".replace("/", ""))
            cure = line.replace(" --compile yes", "").replace("fused yes", "fused no")
            cure = cure.replace("OUT", place)
            with monkeypatch.context() as patch:
                patch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
                patch.setattr(environment, "compiler", broken)
                said = followed(line, message, [cure], capsys)
            assert ("install one" in said) == (broken() is None)
            assert ("compile" in said.partition(", but ")[0]) == line.startswith("sample")


def test_a_line_that_is_no_record_is_removed(
    toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = Path("run/metrics.jsonl")
    kept = metrics.read_text()
    metrics.write_text('{"loss": 1}\n' + kept)
    followed("plot run --out OUT.png", "line 1 is not the record of a step: remove it", [], capsys)
    metrics.write_text(metrics.read_text().partition("\n")[2])
    assert main("plot run --out new.png".split()) == 0


def test_a_name_that_is_not_utf8_is_changed(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = os.fsdecode(b"caf\xe9.txt")
    Path("text.txt").rename(odd)
    followed(f"train {odd} {TOY} --out OUT", "rename the file or folder, or choose", [], capsys)
    Path(odd).rename("text.txt")
    assert main(f"train text.txt {TOY} --out new".split()) == 0
