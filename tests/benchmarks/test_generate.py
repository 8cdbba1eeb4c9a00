"""Generation beside other systems: what is asked of them, what they would say, and the table."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generate
import pytest
import torch
from generate import (
    BYTES,
    OURS,
    SYSTEMS,
    Case,
    Place,
    first_difference,
    table,
    time_transformers,
    varied_model,
)

from gptsmith import GPTConfig, generate_greedy, save
from gptsmith.cli.timing import fresh_model, random_prompt
from tests.conftest import TINY, scrambled

# PyTorch's own, as it is imported by its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

PROGRAM = Path(generate.__file__)
# n_embd is whole blocks of 32, as llama.cpp's numbers of few bits need it.
TOY = GPTConfig(vocab_size=257, context_length=64, n_layer=2, n_head=4, n_embd=64)
CASE = Case(dtype="float32", rows=3, prompt_tokens=4, max_tokens=7)
PREFILL = Case(dtype="float32", rows=1, prompt_tokens=9, max_tokens=1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of the toy."""
    path = tmp_path_factory.mktemp("generate") / "toy.toml"
    names = ("vocab_size", "context_length", "n_layer", "n_head", "n_embd")
    path.write_text("[model]\n" + "".join(f"{name} = {getattr(TOY, name)}\n" for name in names))
    return path


def test_the_model_for_comparisons_does_not_repeat_itself() -> None:
    def different(model: torch.nn.Module) -> int:
        return generate_greedy(model.eval(), random_prompt(257, 1, 16), 32)[:, 16:].unique().numel()

    assert different(fresh_model(TOY)) < 4
    assert different(varied_model(TOY)) > 5


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transformers_is_timed_for_what_it_would_say(tmp_path: Path, compiled: bool) -> None:
    import transformers

    model = scrambled(GPTConfig(**TINY), seed=1)
    with torch.no_grad():
        model.wpe.weight.mul_(5)
    save(model, None, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompt = random_prompt(37, 3, 4)
    found = time_transformers(model, prompt, 7, compiled=compiled)
    tokens = prompt
    with torch.no_grad():
        for _ in range(7):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert found.pop("tokens") == tokens[:, 4:].tolist()
    assert all(value > 0 for value in found.values())


# -- processes


def test_others_are_offline_and_have_our_settings_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    found = generate.variables_for_others()
    assert (found["GOMP_SPINCOUNT"], found["THP_MEM_ALLOC_ENABLE"]) == ("7", "1")
    assert (found["HF_HUB_OFFLINE"], found["HF_HUB_DISABLE_TELEMETRY"]) == ("1", "1")
    assert found["PATH"] == os.environ["PATH"]


def test_a_process_gets_a_question_and_what_libraries_say_is_no_part_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "generate.py"
    program.write_text(
        f"import os, sys; sys.path.insert(0, {str(PROGRAM.parent)!r})\n"
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('generate', {str(PROGRAM)!r})\n"
        "generate = importlib.util.module_from_spec(spec); sys.modules['generate'] = generate\n"
        "spec.loader.exec_module(generate)\n"
        "def measure(case, place):\n"
        "    print('a library says something')\n"
        "    os.write(1, b'and its C code too\\n')\n"
        "    if case.rows == 2: raise ValueError('it has no two rows')\n"
        "    offline = os.environ['HF_HUB_OFFLINE']\n"
        "    return {'offline': offline, 'case': str(case), 'model': place.model}\n"
        "generate.SYSTEMS['it'] = generate.System(measure, ())\n"
        "generate.carry_out(generate.main)\n"
    )
    monkeypatch.setattr(generate, "__file__", str(program))
    place = Place(model="here", scratch="there", device="cpu", threads=1)
    found = generate.in_a_process("it", CASE, place)
    assert found.pop("peak_memory_megabytes") > 50
    case = "float32, 3 rows, 4 + 7 tokens"
    assert found == {"offline": "1", "case": case, "model": "here"}
    two = Case(dtype="float32", rows=2, prompt_tokens=4, max_tokens=7)
    assert generate.in_a_process("it", two, place) == {"error": "it has no two rows"}


# -- the table


def row(round: int, system: str, case: Case, speed: float, tokens: Any) -> dict[str, Any]:
    figures = dict.fromkeys(("prefill_tokens_per_second", "decode_tokens_per_second"), speed)
    figures |= {"first_token_milliseconds": 1000 / speed, "peak_memory_megabytes": 10 * speed}
    return {"round": round, "system": system, **vars(case), **figures, "tokens": tokens}


def cells(found: list[dict[str, Any]], bound: float = 100.0) -> dict[str, list[str]]:
    """The rows of the table by the name of the system."""
    lines = table(found, [CASE, PREFILL], {"float32": bound})
    return {line.split(" | ")[1]: line.strip("| ").split(" | ")[2:] for line in lines[2:]}


def test_a_ratio_is_of_what_was_measured_side_by_side() -> None:
    """The ratio of the medians would be 20 / 10."""
    same, other = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 7, 7]]
    speeds = {OURS: (20.0, 90.0, 10.0), "theirs": (40.0, 10.0, 10.0), "third": (10.0,) * 3}
    found = [
        row(number, name, case, speed, other if name == "third" else same)
        for name, each in speeds.items()
        for number, speed in enumerate(each, 1)
        for case in (CASE, PREFILL)
    ]
    shown = cells(found, bound=100.0)
    assert shown[OURS] == [
        *("20.0 (10.0 to 90.0)", "7%", "20.0 (10.0 to 90.0)", "50.0 (11.1 to 100)", "200", "-", "-")
    ]
    assert shown["theirs"][-2:] == ["1.00 (0.500 to 9.00)", "yes"]
    assert shown["third"][-1] == "differ from token 2"


def test_what_failed_or_was_not_reached_is_said() -> None:
    whole, no = row(1, OURS, CASE, 4.0, [[1]]), {"round": 1, "system": "no", **vars(CASE)}
    shown = cells([whole, no | {"error": "out of luck"}, row(1, "late", PREFILL, 5.0, [[1]])])
    assert shown[OURS] == ["4.00", "1%", "-", "250", "40.0", "-", "-"]
    assert shown["no"] == ["failed: out of luck"]
    assert shown["late"] == ["-", "-", "5.00", "-", "-", "-", "-"]


def test_where_texts_part() -> None:
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 4]]) is None
    assert first_difference([[1, 2], [3, 4]], [[1, 9], [9, 4]]) == 1


# -- whole runs


Run = tuple[list[dict[str, Any]], list[list[str]], str]


@pytest.fixture
def run(toy: Path, tmp_path: Path) -> Callable[..., Run]:
    """The program with these words: the lines of its file, the table's cells, and all it shows."""

    def call(*words: str) -> Run:
        out = tmp_path / "generate.jsonl"
        asked = ["--rows", "2", "--rounds", "1", "--threads", "1", "--out", out, *words]
        done = subprocess.run(
            [sys.executable, PROGRAM, toy, *asked], capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines = done.stdout.splitlines()
        cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        return [json.loads(line) for line in out.read_text().splitlines()], cells[2:], done.stdout

    return call


def test_generation_beside_llama_cpp(run: Callable[..., Run]) -> None:
    who = ["gptsmith, plain", "CTranslate2", "llama.cpp"]
    lines, table, text = run("--systems", *who, "--dtypes", "float32")
    known = [name for name in who if f"\n{name}: not installed: " not in text]
    assert {"gptsmith, plain", "llama.cpp"} <= set(known)
    assert [row[:2] for row in table] == [["float32", name] for name in known]
    ours, *others = [line["tokens"] for line in lines if line.get("rows") == 2]
    assert len(others) == len(known) - 1
    assert all(tokens == ours for tokens in others)
    assert len(ours) == 2
    assert all(len(row) == 48 for row in ours)
    rates = [line["gigabytes_per_second"] for line in lines if "gigabytes_per_second" in line]
    assert len(rates) == 2
    alone = next(line["decode_tokens_per_second"] for line in lines if "round" in line) / 2
    weights = 2 * (4 * 64 * 64 + 2 * 64 * 256) + 257 * 64
    assert table[0][3] == f"{alone / (max(rates) * 1e9 / 4 / weights):.0%}"


def test_an_interrupted_run_keeps_what_it_measured(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "generate.jsonl"
    words = ["--systems", "gptsmith, plain", "--dtypes", "float32", "--rows", "2", "--out", out]
    process = subprocess.Popen(
        [sys.executable, PROGRAM, toy, *words, "--rounds", "99"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not (out.exists() and "round" in out.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith("interrupted: what was measured so far is kept\n")
    assert "| float32 | gptsmith, plain | " in shown
    assert any("tokens" in json.loads(line) for line in out.read_text().splitlines())


@pytest.mark.slow
def test_generation_in_few_bits(run: Callable[..., Run]) -> None:
    peers = ["transformers, compiled", "transformers, dynamic int8", "CTranslate2", "llama.cpp"]
    dtypes = ["bf16", "int8", "int4"]
    _, table, text = run("--systems", OURS, *peers, "--dtypes", *dtypes)
    assert not [row for row in table if "failed" in row[2]]
    rows = {(row[0], row[1]): row for row in table}
    for dtype in dtypes:
        assert (dtype, "llama.cpp") in rows
        assert (dtype, OURS) in rows
    assert float(rows["bf16", "transformers, compiled"][-2]) > 0
    assert ("int8", "transformers, dynamic int8") in rows
    assert (("int8", "CTranslate2") in rows) != ("CTranslate2: not installed" in text)


def test_every_system_is_of_known_number_formats() -> None:
    assert all(set(system.dtypes) <= set(BYTES) for system in SYSTEMS.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("gpt2 --max-tokens 1", "1 new tokens are no decoding: at least 2 are needed"),
        ("gpt2 --max-tokens 1025", "do not fit the context_length 1024: lower --max-tokens"),
        ("nowhere", "'nowhere' is not a preset, recipe or model"),
    ],
)
def test_mistakes_are_told_in_a_line(
    words: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["generate.py", *words.split()])
    with pytest.raises(ValueError, match=said):
        generate.main()
