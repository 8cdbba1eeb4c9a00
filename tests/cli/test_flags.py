"""The help of every verb is true: what it offers is accepted, its defaults are those used."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from gptsmith import GPTConfig, save
from gptsmith.cli.flags import Parser, add_flags, chosen
from gptsmith.cli.main import VERBS, find_verb, main
from gptsmith.config.fields import REQUIRED, Bytes, SettingError, at_least, setting
from gptsmith.config.fitting import Devices
from gptsmith.config.recipe import run_settings
from gptsmith.config.settings import TrainingSettings
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled

# What has to be given to each verb besides the flags that are looked at.
NEEDED = {
    "prepare": "text.txt",
    "tokenizer": "text.txt --vocab-size 300 --out out",
    "train": "text.txt",
    "finetune": "model --data text.txt",
    "sample": "model",
    "chat": "model",
    "classify": "model --text hello",
    "evaluate": "model --data text.txt",
    "plot": "run",
    "compare": "run",
    "sweep": "text.txt --set seed=1,2",
    "inspect": "model --prompt text",
    "describe": "gpt2 --devices 2",
    "import": "model out",
    "export": "model out --to nanogpt",
    "merge": "adapter out",
    "quantize": "model out --bits 8",
    "serve": "model",
    "bench": "generate gpt2",
    "doctor": "",
    "completion": "bash",
}
FLAG = re.compile(r"^  (--\S+)(?: (\S+))?(?:$|  )")
DEFAULT = re.compile(r"\(default: (?!\S*NAME)(\S+)\)$")  # a value, not how one is found


@pytest.fixture
def help_of(capsys: pytest.CaptureFixture[str]) -> Callable[[str], dict[str, tuple[str, str]]]:
    """For each flag that a verb's help shows, what stands for its value, and its sentence."""

    def read(verb: str) -> dict[str, tuple[str, str]]:
        capsys.readouterr()
        assert main([verb, "--help"]) == 0
        found: dict[str, list[str]] = {}
        for line in capsys.readouterr().out.splitlines():
            if start := FLAG.match(line):
                found[flag := start[1]] = [start[2] or "", line[start.end() :].strip()]
            elif found and line.startswith(" " * 8):
                found[flag][1] += " " + line.strip()
        return {flag: (shown, text.strip()) for flag, (shown, text) in found.items()}

    return read


def test_the_table_has_every_verb() -> None:
    assert set(NEEDED) == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_choice_that_is_offered_is_accepted(verb: str, help_of: Any) -> None:
    _, parser = find_verb(verb)
    for flag, (shown, _) in help_of(verb).items():
        for choice in shown.split("|") if "|" in shown else ():
            options = parser.parse([*NEEDED[verb].split(), flag, choice])
            assert choice in (str(value) for value in vars(options).values()) or verb == "bench"


@pytest.mark.parametrize(
    ("verb", "flag", "choice", "offered"),
    [
        ("sample", "--dtype", "fp8", "auto|float32|bf16|fp16|int8|int4"),
        ("evaluate", "--dtype", "fp8", "auto|float32|bf16|fp16|int8|int4"),
        ("serve", "--dtype", "fp8", "auto|float32|bf16|fp16|int8|int4"),
        ("train", "--dtype", "int8", "auto|float32|bf16|fp16|fp8"),
        ("train", "--dtype", "int4", "auto|float32|bf16|fp16|fp8"),
        ("sample", "--compile", "max-autotune", "auto|yes|no"),
        ("serve", "--compile", "max-autotune", "auto|yes|no"),
        ("import", "--dtype", "q8_0", "float32|fp16|bf16"),
        ("quantize", "--bits", "3", "8|4"),
        ("evaluate", "--split", "test", "train|validation"),
        ("sample", "--attention", "flash", "auto|kernel|blocks"),
    ],
)
def test_what_a_verb_cannot_do_is_refused_with_what_it_can(
    verb: str,
    flag: str,
    choice: str,
    offered: str,
    help_of: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert help_of(verb)[flag][0] == offered
    assert main([verb, *NEEDED[verb].split(), flag, choice]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gptsmith: {flag} is '{choice}': ")
    assert said.count("\n") == 1
    assert all(word in said for word in offered.split("|"))


@pytest.mark.parametrize("verb", VERBS)
def test_every_default_that_is_shown_is_the_one_used(verb: str, help_of: Any) -> None:
    """What is typed as the help shows it makes the same settings as nothing."""
    module, parser = find_verb(verb)
    typed: list[str] = []
    for flag, (_, text) in help_of(verb).items():
        if (default := DEFAULT.search(text)) and default[1] in ("yes", "no"):
            typed.append(flag.replace("[no-]", "" if default[1] == "yes" else "no-"))
        elif default:
            typed += [flag, default[1]]
    words = NEEDED[verb].split()
    without, with_defaults = parser.parse(words), parser.parse([*words, *typed])
    if verb == "train":  # whose defaults are those of the recipe for data alone
        Path("text.txt").write_text("to be")
        given = {k: v for k, v in vars(with_defaults).items() if k != "what"}
        assert len(given) > 40
        settings, _ = run_settings("text.txt", given)
        assert settings == run_settings("text.txt", {})[0]
        return
    for kind in vars(module).values():
        settings = isinstance(kind, type) and is_dataclass(kind)
        if settings and kind not in (GPTConfig, TrainingSettings, Devices):
            assert chosen(without, kind) == chosen(with_defaults, kind)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: None) -> None:
    """A folder with a small model and a text."""
    monkeypatch.chdir(tmp_path)
    config = GPTConfig(**TINY | {"vocab_size": 257, "n_embd": 24})
    save(scrambled(config), byte_tokenizer(), "model")
    Path("text.txt").write_text("the quick brown fox\n" * 20)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("sample", "model --seed 1 --prompt the --threads 1"),
        ("evaluate", "model --data text.txt --threads 1 --json"),
    ],
)
def test_a_default_that_is_typed_changes_nothing_that_is_computed(
    verb: str, words: str, here: None, help_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {flag: text for flag, (_, text) in help_of(verb).items() if "[no-]" not in flag}

    def found(*more: str) -> str:
        capsys.readouterr()
        assert main([verb, *words.split(), *more]) == 0
        return capsys.readouterr().out

    usual, tried = found(), 0
    for flag, text in flags.items():
        if default := DEFAULT.search(text):
            assert found(flag, default[1]) == usual, flag
            tried += 1
    assert "(default: float32, or" in flags["--dtype"]
    assert found("--dtype", "float32") == usual
    assert tried >= 5


@pytest.mark.slow
def test_every_precision_that_is_offered_is_computed_in(
    here: None, help_of: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or refused because this machine lacks something, which is named."""
    losses = {}
    for dtype in help_of("evaluate")["--dtype"][0].split("|"):
        words = f"evaluate model --data text.txt --threads 1 --json --dtype {dtype}"
        status = main(words.split())
        out, err = capsys.readouterr()
        if status:
            assert dtype == "fp16"
            assert err.startswith("gptsmith: --dtype is fp16, which needs CUDA: ")
        else:
            losses[dtype] = json.loads(out)["loss"]
    exact = losses.pop("float32")
    assert all(loss == pytest.approx(exact, abs=0.5) for loss in losses.values())
    assert losses["int4"] != exact != losses["bf16"]


# -- how a field becomes a flag


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One of each kind."""

    words: tuple[str, ...] = setting((), "several; repeatable")
    bits: Literal[8, 4] | None = setting(None, "a choice among numbers")
    size: Bytes = setting(10, "bytes")
    out: Path | None = setting(None, "where", metavar="DIR")
    rate: float = setting(0.0, "50% is 0.5", flag="speed")
    yes: bool = setting(True, "a switch")
    count: int = setting(REQUIRED, "has no default")

    def __post_init__(self) -> None:
        at_least(self, 1, "count")


@pytest.fixture
def parser() -> Parser:
    parser = Parser(prog="test")
    add_flags(parser, Settings)
    return parser


def test_words_become_settings(parser: Parser) -> None:
    words = "--count 1e3 --words a --words b --bits 4 --size 1.5KiB --out x/y --speed 2 --no-yes"
    assert chosen(parser.parse(words.split()), Settings) == Settings(
        count=1000, words=("a", "b"), bits=4, size=1536, out=Path("x/y"), rate=2.0, yes=False
    )
    assert chosen(parser.parse(["--count", "1"]), Settings) == Settings(count=1)
    assert vars(parser.parse(["--count", "1"])) == {"count": 1}


def test_the_help_shows_kinds_choices_and_defaults(parser: Parser) -> None:
    text = " ".join(parser.format_help().split())
    for shown in (
        "usage: test --count N [--option value ...]",
        "--words TEXT several; repeatable --bits 8|4 a choice among numbers",
        "--size SIZE bytes (default: 10) --out DIR where --speed X 50% is 0.5 (default: 0.0)",
        "--[no-]yes a switch (default: yes) --count N has no default",
    ):
        assert shown in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--count many", "--count is 'many': a whole number is needed"),
        ("--bits 5", "--bits is '5': one of 8, 4 is needed"),
        ("--size large", "--size is 'large': a size such as 500MB or 5GB is needed"),
        ("--size 0", "--size is '0': a size such as 500MB or 5GB is needed"),
        ("--speed nan", "--speed is nan: a number that a machine can hold is needed"),
        ("", "the following arguments are required: --count"),
        ("--count 1 --word a", "unknown option '--word', did you mean '--words'?"),
    ],
)
def test_what_cannot_be_parsed_names_the_flag(words: str, said: str, parser: Parser) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parser.parse(words.split())


def test_a_setting_that_was_typed_is_named_as_the_flag(parser: Parser) -> None:
    options = parser.parse("--count 0 --speed 1".split())
    zero = pytest.raises(ValueError, match=r"^--count is 0: at least 1 is needed$")
    with zero, parser.naming_flags(options):
        chosen(options, Settings)
    with pytest.raises(ValueError, match=r"^--speed is too high$"), parser.naming_flags(options):
        raise SettingError("rate", "is too high")
    with pytest.raises(SettingError, match=r"^size is wrong$"), parser.naming_flags(options):
        raise SettingError("size", "is wrong")  # which nobody typed
