"""Generation measured: one figure or a table, alone and against transformers, each in its turn."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith import GPTConfig, generate_greedy, load, save
from gptsmith.cli import turns
from gptsmith.cli.comparison import (
    Measure,
    Spread,
    first_difference,
    lines,
    measures,
    paired_ratio,
    render,
    three_digits,
)
from gptsmith.cli.main import main
from gptsmith.cli.peers import time_generate
from gptsmith.cli.timing import (
    fitting,
    fresh_model,
    generation_figures,
    random_prompt,
    varied_model,
)
from gptsmith.cli.turns import Case, Figures, Measurement, System, in_turn, python, somebody_else
from gptsmith.machine.environment import variables_for_others
from tests.conftest import TINY, scrambled

# PyTorch's own, as it is imported by its compiler.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")

CASE = Case(dtype="float32", rows=3, prompt_tokens=4, max_tokens=7)
FIGURES = {
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "first_token_milliseconds",
    "peak_memory_megabytes",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights nobody would draw, and which does not repeat itself."""
    place = tmp_path_factory.mktemp("bench") / "model"
    model = scrambled(GPTConfig(**TINY), seed=1)
    with torch.no_grad():
        model.ln_f.bias.zero_()
        model.wpe.weight.mul_(5)
    save(model, None, place)
    return place


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`gptsmith bench` with these words: status, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["bench", *map(str, words)])
        return status, *capsys.readouterr()

    return call


# -- one measurement


def test_a_folder_is_measured_with_its_own_weights(folder: Path, bench: Callable[..., Any]) -> None:
    words = "--rows 3 --prompt-tokens 4 --max-tokens 7 --threads 1 --json".split()
    status, out, err = bench("generate", folder, *words)
    assert status == 0, err
    found = json.loads(out)
    model, _ = load(folder)
    expected = generate_greedy(model, random_prompt(37, 3, 4), 7)[:, 4:]
    assert found["tokens"] == expected.tolist()
    assert expected.unique().numel() > 5, "a model that repeats itself would show nothing"
    assert {name: found[name] for name in ("rows", "prompt_tokens", "new_tokens", "threads")} == {
        "rows": 3,
        "prompt_tokens": 4,
        "new_tokens": 7,
        "threads": 1,
    }
    assert all(found[name] > 0 for name in FIGURES)


def test_one_measurement_shows_no_tokens(folder: Path, bench: Callable[..., Any]) -> None:
    _, out, _ = bench("generate", folder, "--rows", 1, "--threads", 1)
    shown = {line.strip().partition("  ")[0] for line in out.splitlines()[1:]}
    assert {"decode tokens per second", "peak memory megabytes", "rows"} <= shown
    assert "tokens" not in shown


def test_speeds_are_of_the_first_token_and_of_the_rest() -> None:
    found = generation_figures([10.0, 10.5, 10.75, 11.0, 11.5], rows=3, prompt_tokens=8)
    assert found == {
        "prefill_tokens_per_second": 3 * 8 / 0.5,
        "decode_tokens_per_second": 3 * 3 / 1.0,
        "first_token_milliseconds": 500,
    }
    assert generation_figures([1.0, 2.0], 1, 5)["decode_tokens_per_second"] is None


@pytest.mark.parametrize(
    ("context", "prompt", "new", "expected"),
    [
        (1024, None, None, (32, 128)),
        (1024, 1000, None, (1000, 25)),
        (1024, None, 1020, (5, 1020)),
        (64, None, None, (16, 49)),
        (64, 64, None, (64, 1)),
        (2, None, None, (1, 2)),
    ],
)
def test_what_is_not_asked_for_is_made_to_fit(
    context: int, prompt: int | None, new: int | None, expected: tuple[int, int]
) -> None:
    assert fitting(GPTConfig(**(TINY | {"context_length": context})), prompt, new) == expected


def test_the_model_for_comparisons_does_not_repeat_itself() -> None:
    config = GPTConfig(vocab_size=257, context_length=64, n_layer=2, n_head=4, n_embd=64)

    def different(model: torch.nn.Module) -> int:
        return generate_greedy(model.eval(), random_prompt(257, 1, 16), 32)[:, 16:].unique().numel()

    assert different(fresh_model(config)) < 4
    assert different(varied_model(config)) > 5


# -- in turn


def test_systems_take_turns_within_a_case() -> None:
    asked = []

    def system(name: str, *dtypes: str) -> System:
        def measure(case: Case) -> Figures:
            asked.append((name, case))
            return {}

        return System(name, measure, dtypes or None)

    other = Case(dtype="int8", rows=1, prompt_tokens=4, max_tokens=7)
    told: list[str] = []
    found = list(in_turn([system("a"), system("b", "float32")], [CASE, other], 2, told.append))
    assert asked == [("a", CASE), ("b", CASE), ("a", other)] * 2
    assert [m.round for m in found] == [1, 1, 1, 2, 2, 2]
    assert told[1] == "round 1 of 2: b, float32, 3 rows, 4 + 7 tokens"


def test_a_process_that_fails_says_why_in_a_line() -> None:
    code = "import sys; print('x\\ngptsmith: no such thing', file=sys.stderr); sys.exit(2)"
    with pytest.raises(ValueError, match=r"^it: no such thing$"):
        python("-c", code, who="it: ")


def test_another_program_gets_a_question_and_a_place_for_the_answer(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys\n"
        "print('a library says something')\n"
        "asked = json.loads(sys.argv[1])\n"
        "out = open(asked.pop('answer'), 'w')\n"
        "json.dump(asked | {'offline': os.environ['HF_HUB_OFFLINE']}, out)\n"
    )
    system = somebody_else("it", ("float32",), str(program), folder="here")
    assert system.measure(CASE) == {"folder": "here", "offline": "1", **vars(CASE)}


def test_others_are_offline_and_have_our_settings_unless_the_user_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    found = variables_for_others()
    assert (found["GOMP_SPINCOUNT"], found["THP_MEM_ALLOC_ENABLE"]) == ("7", "1")
    assert (found["HF_HUB_OFFLINE"], found["HF_HUB_DISABLE_TELEMETRY"]) == ("1", "1")
    assert found["PATH"] == os.environ["PATH"]


# -- what it says


def measurement(round: int, system: str, speed: float, tokens: list[list[int]]) -> Measurement:
    return Measurement(round, system, CASE, {"decode_tokens_per_second": speed, "tokens": tokens})


def test_a_ratio_is_of_what_was_measured_side_by_side() -> None:
    """The ratio of the medians would be 20 / 10."""
    same, other = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 7, 7]]
    found = [
        *(measurement(n, "ours", speed, same) for n, speed in enumerate((20.0, 90.0, 10.0), 1)),
        *(measurement(n, "theirs", speed, same) for n, speed in enumerate((40.0, 10.0, 10.0), 1)),
        *(measurement(n, "third", 10.0, same if n < 3 else other) for n in (1, 2, 3)),
    ]
    ours, theirs, third = lines([Measure("decode", CASE, "decode_tokens_per_second")], found)
    assert (ours.value, ours.ratio) == (Spread(20, 10, 90), None)
    assert (theirs.value, theirs.ratio) == (Spread(10, 10, 40), Spread(1, 0.5, 9))
    assert (theirs.differs_from, third.differs_from) == (None, 2)
    shown = render([ours, theirs, third]).splitlines()
    assert shown[1].split() == "float32 decode ours 20.0 (10.0 to 90.0)".split()
    assert shown[2].split("  ")[-2:] == ["1.00 (0.500 to 9.00)", "yes"]
    assert shown[3].endswith("differ from token 2")
    assert "ratio" not in render([ours])


def test_what_was_compiled_is_called_so() -> None:
    found = [measurement(1, "ours", 1.0, [[1]])]
    found[0].figures["compiled"] = True
    (ours,) = lines([Measure("decode", CASE, "decode_tokens_per_second")], found)
    assert ours.system == "ours, compiled"


def test_what_is_measured_of_a_precision() -> None:
    found = measures("bf16", [2, 5], 4, 7, long_prompt=9)
    decode, wide, prefill, first, memory = found
    assert (
        decode.case
        == first.case
        == memory.case
        == Case(dtype="bf16", rows=2, prompt_tokens=4, max_tokens=7)
    )
    assert (wide.case.rows, prefill.case.rows) == (5, 1)
    assert (prefill.case.prompt_tokens, prefill.case.max_tokens) == (9, 1)
    assert {each.figure for each in found} == FIGURES


def test_numbers_for_a_table() -> None:
    assert [three_digits(x) for x in (0.0123456, 1.0, 12.345, 123.45, 6543.2)] == [
        "0.0123",
        "1.00",
        "12.3",
        "123",
        "6,543",
    ]
    assert str(Spread.of([3.0, 1.0, 2.5])) == "2.50 (1.00 to 3.00)"
    assert paired_ratio([1.0, 6.0], [2.0, 2.0]) == Spread(1.75, 0.5, 3.0)
    assert first_difference([[1, 2], [3, 4]], [[1, 2], [3, 4]]) is None
    assert first_difference([[1, 2], [3, 4]], [[1, 9], [9, 4]]) == 1


# -- the table, by real processes


def test_the_table_of_two_precisions(folder: Path, bench: Callable[..., Any]) -> None:
    words = (
        "--dtype float32,bf16 --rows 2 --prompt-tokens 4 --threads 1 --compile no --json".split()
    )
    status, out, err = bench("generate", folder, *words)
    assert status == 0, err
    found = json.loads(out)
    assert [(line["dtype"], line["measure"]) for line in found["table"]] == [
        (dtype, measure)
        for dtype in ("float32", "bf16")
        for measure in (
            "decode, 2 rows, tokens/s",
            "prefill, 4 tokens, tokens/s",
            "first token, 2 rows, prompt of 4, ms",
            "peak memory, 2 rows, MB",
        )
    ]
    for line in found["table"]:
        assert (line["system"], line["ratio"], line["differs_from"]) == ("gptsmith", None, None)
        assert line["value"]["lowest"] == line["value"]["median"] > 0
    each = [(m["dtype"], m["rows"], m["max_tokens"]) for m in found["measurements"]]
    assert each == [(d, *case) for d in ("float32", "bf16") for case in ((2, 8), (1, 1))]
    assert "tokens" not in found
    # As one measurement alone has them.
    assert found["rows"] == 2
    speed = found["table"][0]["value"]["median"]
    assert (
        speed
        == found["decode_tokens_per_second"]
        == pytest.approx(found["measurements"][0]["decode_tokens_per_second"])
    )


def test_against_transformers_on_the_same_fresh_weights(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = "\n".join(f"{name} = {value}" for name, value in TINY.items())
    (tmp_path / "tiny.toml").write_text(f"[model]\n{sizes}\n")
    words = "--against transformers --rounds 1 --rows 2 --prompt-tokens 4 --threads 1".split()
    status, out, err = bench(
        "generate", tmp_path / "tiny.toml", *words, "--compile", "no", "--json"
    )
    assert status == 0, err
    assert err.count("\n") == 4, "a line for each measurement"
    found = json.loads(out)
    assert len(found["table"]) == 8
    for ours, theirs in zip(found["table"][::2], found["table"][1::2], strict=True):
        assert (ours["system"], theirs["system"]) == ("gptsmith", "transformers")
        assert ours["measure"] == theirs["measure"]
        ratio = ours["value"]["median"] / theirs["value"]["median"]
        assert theirs["ratio"] == asdict(Spread(ratio, ratio, ratio))
        assert theirs["differs_from"] is None


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_transformers_is_timed_for_what_it_would_say(folder: Path, compiled: bool) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = random_prompt(37, 3, 4)
    found = time_generate(model, prompt, 7, compiled=compiled)
    tokens = prompt
    with torch.no_grad():
        for _ in range(7):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    assert found["tokens"] == tokens[:, 4:].tolist()
    assert all(found[name] > 0 for name in FIGURES)


def test_what_transformers_does_not_have_is_said(
    folder: Path, bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process is started: whoever is asked answers at once."""
    figures = dict.fromkeys(FIGURES, 2.0) | {"device": "cpu", "threads": 1, "parameters": 5}

    def answered(*words: str, **more: Any) -> str:
        if words[:2] == ("-m", "gptsmith.cli.peers"):
            asked = json.loads(words[2])
            assert asked["dtype"] == "bf16"
            Path(asked["answer"]).write_text(json.dumps(figures | {"tokens": [[1, 2]]}))
        return json.dumps(figures | {"tokens": [[1, 3]]})

    monkeypatch.setattr(turns, "python", answered)
    words = "--dtype bf16,int8 --against transformers --rounds 2 --rows 1".split()
    status, out, err = bench("generate", folder, *words)
    assert status == 0, err
    assert err.splitlines()[0] == "note: transformers not measured in int8"
    theirs = [line for line in out.splitlines() if " transformers " in line]
    assert len(theirs) == 4
    assert all(line.startswith("bf16 ") for line in theirs)
    assert all(line.endswith("1.00   differ from token 2") for line in theirs)
    assert sum(line.startswith("int8 ") for line in out.splitlines()) == 4


# -- what is refused


def test_without_transformers_a_line_says_what_to_install(
    folder: Path, bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, out, err = bench("generate", folder, "--against", "transformers-compiled")
    assert (status, out) == (2, "")
    expected = "--against transformers-compiled needs a package: pip install transformers"
    assert err == f"gptsmith: {expected}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate MODEL --against transfomers", "did you mean 'transformers'?"),
        ("generate MODEL --dtype float32,bf61", "did you mean 'bf16'?"),
        ("generate MODEL --rows 1,0", "rows is 0: at least 1 is needed"),
        ("generate MODEL --rows one", "rows is 'one': a whole number is needed"),
        ("generate MODEL --rounds 0", "rounds is 0: at least 1 is needed"),
        ("generate MODEL --max-tokens 1", "max_tokens is 1, which is no decoding"),
        ("generate MODEL --rows 1,2 --max-tokens 12", "more than the context_length 11"),
        ("generate MODEL --rows 1 --prompt-tokens 12", "more than the context_length 11"),
        ("train MODEL --rows 1,2", "one dtype and number of rows at a time"),
        ("train MODEL --dtype float32 --dtype bf16", "one dtype and number of rows at a time"),
        ("train MODEL --against transformers", "say 'bench generate'"),
    ],
)
def test_what_is_refused(
    words: str, said: str, folder: Path, bench: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, err = bench(*words.replace("MODEL", str(folder)).split())
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert said in err
