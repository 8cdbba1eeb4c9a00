"""The library: docs/library.md as it is typed, and each verb against the command of its name."""

import ast
import inspect
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith.checkpoint.finding import checkpoints
from gptsmith.cli.main import main

PAGE = Path(__file__).parents[1] / "docs" / "library.md"
VERBS = ("train", "finetune", "load", "generate", "stream", "evaluate", "describe", "save")
TEXT = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(60))
SMALL: dict[str, Any] = {
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 8,
    "context_length": 8,
    "batch_tokens": 48,
    "steps": 6,
    "evaluate_every": 3,
    "threads": 1,
    "dtype": "float32",
    "attention": "kernel",
    "sample_tokens": 5,
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own, with a text."""
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text(TEXT)


def typed(settings: dict[str, Any]) -> list[str]:
    """Settings as the flags of the command line."""
    flags = {"--" + name.replace("_", "-"): str(value) for name, value in settings.items()}
    return [word for flag in flags.items() for word in flag]


# -- the page


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread", "own_cache")
def test_every_example_runs_as_it_stands() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    assert len(blocks) >= len(VERBS)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (names["run"] / "best").is_file()
    assert len(checkpoints(Path("runs/rate-0.01"))) == 1
    assert len(names["texts"]) == 4
    assert names["found"].tokens > 100
    assert Path("my-model/model.safetensors").is_file()


def test_every_verb_has_a_section_with_its_signature() -> None:
    text = PAGE.read_text()
    assert tuple(re.findall(r"^## (\w+)$", text, flags=re.M)) == VERBS
    for verb in VERBS:
        shown = re.search(rf"^## {verb}\n\n    (.*)$", text, flags=re.M)
        assert shown, verb
        function = ast.parse(f"def {shown[1]}: ...").body[0]
        assert isinstance(function, ast.FunctionDef)
        given, real = function.args, inspect.signature(getattr(gptsmith, verb)).parameters
        names = [*given.args, *given.kwonlyargs, *filter(None, [given.kwarg])]
        assert [name.arg for name in names] == list(real)
        defaults = [*given.defaults, *filter(None, given.kw_defaults)]
        usual = [p.default for p in real.values() if p.default is not p.empty]
        where = {"torch": torch, "SamplingSettings": gptsmith.SamplingSettings}
        assert [eval(ast.unparse(default), where) for default in defaults] == usual


# -- each verb, and the command


def test_train_is_the_command_to_the_bit(capfd: pytest.CaptureFixture[str]) -> None:
    run = gptsmith.train("notes.txt", out="here", **SMALL)
    assert capfd.readouterr() == ("", "")
    assert run == Path("here")
    assert main(["train", "notes.txt", *typed(SMALL), "--out", "there"]) == 0
    weights = "checkpoints/step-00000006/model.safetensors"
    assert (run / weights).read_bytes() == Path("there", weights).read_bytes()
    assert (run / "config.toml").read_text() == Path("there/config.toml").read_text()


def test_train_takes_settings_and_shows_what_the_command_shows(
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = gptsmith.RunSettings(
        model=gptsmith.GPTConfig(n_layer=1, n_head=2, n_embd=8, context_length=8),
        data=gptsmith.DataSettings(data="notes.txt", tokenizer="char"),
        training=gptsmith.TrainingSettings(steps=2, batch_tokens=16),
        machine=gptsmith.MachineSettings(threads=1, dtype="float32", attention="kernel"),
        report=gptsmith.ReportSettings(sample_tokens=0),
    )
    run = gptsmith.train(settings, show=True, steps=3)
    assert run == Path("runs/notes-1")
    out, err = capfd.readouterr()
    assert out == ""
    assert "step 3/3" in err
    assert gptsmith.train(settings) == Path("runs/notes-2")
    model, tokenizer = gptsmith.load(run)
    assert tokenizer is not None
    assert model.config.vocab_size == tokenizer.vocab_size == len(set(TEXT))


@pytest.mark.slow
def test_train_goes_on_with_a_run() -> None:
    through = gptsmith.train("notes.txt", out="through", **SMALL)
    half = gptsmith.train("notes.txt", out="half", **SMALL, save_every=3)
    shutil.rmtree(checkpoints(half)[0])  # as if killed after step 3
    assert gptsmith.train(resume=half, keep=3) == half
    weights = "checkpoints/step-00000006/model.safetensors"
    assert (half / weights).read_bytes() == (through / weights).read_bytes()


def test_train_works_in_a_thread_of_its_own() -> None:
    found: list[Path] = []
    words = {"out": "run", **SMALL}
    thread = threading.Thread(target=lambda: found.append(gptsmith.train("notes.txt", **words)))
    thread.start()
    thread.join(60)
    assert found == [Path("run")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"stepz": 3}, "there is no setting 'stepz', did you mean 'steps'?"),
        ({"steps": 0}, "steps is 0: at least 1 is needed"),
        ({"dtype": "int8"}, "dtype is 'int8': one of auto, float32, bf16, fp16, fp8 is needed"),
        ({"resume": "run"}, "leave out `what` and `out`"),
    ],
)
def test_what_train_refuses(words: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        gptsmith.train("notes.txt", **words)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_ctrl_c_saves_and_then_interrupts() -> None:
    how = SMALL | {"steps": 10**6, "compile": "no", "out": "run"}
    program = (
        "import gptsmith, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may have ignored it
        f"gptsmith.train('notes.txt', **{how})"
    )
    words = [sys.executable, "-c", program]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 60
        while not checkpoints(Path("run")) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=60)
    assert said.strip().endswith("KeyboardInterrupt")
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    assert checkpoints(Path("run"))[0].name == f"step-{len(lines):08}"


@pytest.fixture
def run() -> Path:
    return gptsmith.train("notes.txt", out="run", **SMALL)


def test_the_others_say_what_their_commands_say(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = gptsmith.load(run)

    def command(*words: str) -> str:
        assert main(list(words)) == 0
        return capsys.readouterr().out

    assert f"{gptsmith.describe(run)}\n" == command("describe", str(run))
    assert f"{gptsmith.describe('gpt2')}\n" == command("describe", "gpt2")
    for data in ("run/data", "notes.txt"):
        found = gptsmith.evaluate(model, tokenizer, data, context_length=5, tokens=90)
        words = ("--data", data, "--context-length", "5", "--tokens", "90", "--json")
        said = json.loads(command("evaluate", str(run), *words))
        assert said.pop("bytes") == found.bytes
        assert said.pop("model") == str(run)
        assert found.documents is not None
        assert said.pop("documents") == len(found.documents)
        assert said.pop("block_bytes") == found.documents.block_bytes
        assert said.pop("interval") == found.interval
        assert said == {name: getattr(found, name) for name in said}
        assert set(said) == {"loss", "perplexity", "bits_per_byte", "tokens"}
    words = ("sample", str(run), "--prompt", "fox", "--seed", "3", "--max-tokens", "9")
    how: dict[str, Any] = {"max_tokens": 9, "seed": 3}
    assert "fox" + gptsmith.generate(model, tokenizer, "fox", **how)[0] + "\n" == command(*words)
    assert gptsmith.complete(model, tokenizer, "fox", **how) == [
        "".join(gptsmith.stream(model, tokenizer, "fox", **how))
    ]


def test_evaluate_refuses_what_is_not_the_models(run: Path) -> None:
    model, tokenizer = gptsmith.load(run)
    for choice, said in {
        "context_length": "context_length is 9: 1 to the model's 8 is needed",
        "split": "split is for prepared data: notes.txt is text",
    }.items():
        wrong: dict[str, Any] = {choice: {"context_length": 9, "split": "validation"}[choice]}
        with pytest.raises(ValueError, match=said):
            gptsmith.evaluate(model, tokenizer, "notes.txt", **wrong)
    with pytest.raises(
        ValueError, match=r"the model has no tokenizer to encode notes\.txt: use data"
    ):
        gptsmith.evaluate(model, None, "notes.txt")
