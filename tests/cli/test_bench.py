"""How fast this machine is: one measurement or a table, and where the other measurements went."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith import GPTConfig, generate_greedy, load, save
from gptsmith.cli import timing
from gptsmith.cli.main import main
from gptsmith.cli.timing import fitting, generation_figures, random_prompt
from gptsmith.config.tables import spread, three_digits
from tests.conftest import TINY, scrambled

pytestmark = pytest.mark.usefixtures("own_cache")
FIGURES = (
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
    "first_token_milliseconds",
    "peak_memory_megabytes",
)


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


@pytest.mark.slow
def test_a_folder_is_measured_with_its_own_weights(folder: Path, bench: Callable[..., Any]) -> None:
    words = "--rows 3 --prompt-tokens 4 --max-tokens 7 --threads 1 --json".split()
    status, out, err = bench("generate", folder, *words)
    assert status == 0, err
    found = json.loads(out)
    model, _ = load(folder)
    expected = generate_greedy(model, random_prompt(37, 3, 4), 7)[:, 4:]
    assert found["tokens"] == expected.tolist()
    assert expected.unique().numel() > 5, "a model that repeats itself would show nothing"
    wanted = {"rows": 3, "prompt_tokens": 4, "new_tokens": 7, "threads": 1}
    assert {name: found[name] for name in wanted} == wanted
    assert all(found[name] > 0 for name in FIGURES)


@pytest.mark.slow
def test_one_measurement_shows_no_tokens(folder: Path, bench: Callable[..., Any]) -> None:
    _, out, _ = bench("generate", folder, "--rows", 1, "--threads", 1)
    shown = {line.strip().partition("  ")[0] for line in out.splitlines()[1:]}
    assert {"decode tokens per second", "peak memory megabytes", "rows"} <= shown
    assert "tokens" not in shown


@pytest.mark.slow
def test_training_is_timed_with_the_optimizer_asked_for(
    folder: Path, bench: Callable[..., Any]
) -> None:
    words = "--rows 2 --steps 3 --optimizer muon --threads 1".split()
    status, out, err = bench("train", folder, *words, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["batch_tokens"] == 2 * TINY["context_length"]
    assert found["tokens_per_second"] == pytest.approx(
        1000 * found["batch_tokens"] / found["step_milliseconds"]
    )
    assert found["slowest_step_milliseconds"] >= found["step_milliseconds"] > 0
    _, out, _ = bench("train", folder, *words)
    assert out.splitlines()[0] == f"train: {folder}"
    assert "  tokens per second" in out


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


# -- a table


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What processes of their own are asked for: each answers at once, the n-th with speeds of n,
    and int8 as compiled."""
    asked: list[dict[str, Any]] = []

    def alone(model: str, settings: dict[str, Any]) -> dict[str, Any]:
        asked.append(dict(settings))
        figures = dict.fromkeys(FIGURES, float(len(asked)))
        about = {"device": "cpu", "threads": 1, "parameters": 5, "new_tokens": 8}
        compiled = settings["dtype"] == "int8"
        return {**settings, **about, **figures, "compiled": compiled, "tokens": [[1]]}

    monkeypatch.setattr(timing, "alone", alone)
    return asked


def test_the_table_of_two_precisions(
    folder: Path, bench: Callable[..., Any], told: list[dict[str, Any]]
) -> None:
    words = "--dtype float32,int8 --rows 2 --prompt-tokens 4 --threads 1 --rounds 3".split()
    status, out, err = bench("generate", folder, *words, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert [(line["dtype"], line["measure"]) for line in found["table"]] == [
        (dtype, measure)
        for dtype in ("float32", "int8")
        for measure in (
            "decode, 2 rows, tokens/s",
            "prefill, 4 tokens, tokens/s",
            "first token, 2 rows, prompt of 4, ms",
            "peak memory, 2 rows, MB",
        )
    ]
    # Four processes a round: what each line is of is known by the numbers that they answer.
    first = {"float32": (1, 2, 1, 1), "int8": (3, 4, 3, 3)}
    for line, number in zip(found["table"], [*first["float32"], *first["int8"]], strict=True):
        assert line["value"] == {"median": number + 4, "lowest": number, "highest": number + 8}
        assert (
            line["system"] == {"float32": "gptsmith", "int8": "gptsmith, compiled"}[line["dtype"]]
        )
        assert (line["ratio"], line["differs_from"]) == (None, None)
    each = [(m["round"], m["dtype"], m["rows"], m["max_tokens"]) for m in found["measurements"]]
    cases = [(d, *case) for d in ("float32", "int8") for case in ((2, 8), (1, 1))]
    assert each == [(number, *case) for number in (1, 2, 3) for case in cases]
    assert all(asked["threads"] == 1 for asked in told)
    assert err.splitlines()[0] == "round 1 of 3: gptsmith, float32, 2 rows, 4 + 8 tokens"
    assert "tokens" not in found
    # As one measurement alone has them.
    assert (found["rows"], found["decode_tokens_per_second"], found["rounds"]) == (2, 1, 3)


def test_the_table_as_a_person_reads_it(
    folder: Path, bench: Callable[..., Any], told: list[dict[str, Any]]
) -> None:
    _, out, _ = bench("generate", folder, "--dtype", "float32", "--dtype", "int8")
    lines = out.splitlines()
    assert lines[0] == f"generate: {folder}, 5 parameters, greedy, 3 + 8 tokens"
    assert lines[1] == "on cpu, 1 thread, rounds: 1"
    assert lines[3].split() == "dtype measure system value".split()
    assert lines[4].startswith("float32  decode, 1 row, tokens/s")
    assert [asked["rows"] for asked in told] == [1, 8, 1] * 2
    assert "prefill, 11 tokens" in out


@pytest.mark.slow
def test_each_is_measured_in_a_process_of_its_own(folder: Path) -> None:
    case = {"dtype": "bf16", "rows": 2, "prompt_tokens": 4, "max_tokens": 3, "threads": 1}
    found = timing.alone(str(folder), case)
    assert {name: found[name] for name in ("dtype", "rows", "new_tokens")} == {
        "dtype": "bf16",
        "rows": 2,
        "new_tokens": 3,
    }
    assert all(found[name] > 0 for name in FIGURES)
    with pytest.raises(ValueError, match=r"^9 prompt and 9 new tokens do not fit the context"):
        timing.alone(str(folder), case | {"prompt_tokens": 9, "max_tokens": 9})


def test_numbers_for_a_table() -> None:
    assert [three_digits(x) for x in (0.0123456, 1.0, 12.345, 123.45, 6543.2)] == [
        "0.0123",
        "1.00",
        "12.3",
        "123",
        "6,543",
    ]
    assert spread(2.5, 1.0, 3.0) == "2.50 (1.00 to 3.00)"
    assert spread(2.5, 2.5, 2.5) == "2.50"


# -- what is refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate MODEL --dtype float32,bf61", "did you mean 'bf16'?"),
        ("generate MODEL --rows 1,0", "rows is 0: at least 1 is needed"),
        ("generate MODEL --rows one", "rows is 'one': a whole number is needed"),
        ("generate MODEL --rounds 0", "rounds is 0: at least 1 is needed"),
        ("generate MODEL --max-tokens 1", "max_tokens is 1, but decoding starts at the second"),
        ("generate MODEL --rows 1,2 --max-tokens 12", "do not fit the context_length 11"),
        ("generate MODEL --rows 1 --prompt-tokens 12", "do not fit the context_length 11"),
        ("generate MODEL --optimizer muon", "use it with 'bench train'"),
        ("train MODEL --rows 1,2", "one dtype and number of rows at a time"),
        ("train MODEL --dtype float32 --dtype bf16", "one dtype and number of rows at a time"),
        ("train MODEL --rounds 2", "use it with 'bench generate'"),
        ("train MODEL --optimizer adam", "did you mean 'adamw'?"),
        ("train MODEL --steps 0", "steps is 0: at least 1 is needed"),
        ("serve MODEL --clients 3", "run python benchmarks/serve.py MODEL"),
        ("serve http://127.0.0.1:1", "run python benchmarks/serve.py MODEL"),
        ("generate MODEL --clients 3", "run python benchmarks/serve.py instead"),
        ("generate MODEL --api-key k", "run python benchmarks/serve.py instead"),
        ("generate MODEL --against transformers", "run python benchmarks/generate.py instead"),
        ("train MODEL --profile", "run python benchmarks/profile_training.py instead"),
        ("train MODEL --profile --compile yes", "run python benchmarks/profile_training.py"),
    ],
)
def test_what_is_refused(
    words: str, said: str, folder: Path, bench: Callable[..., tuple[int, str, str]]
) -> None:
    status, out, err = bench(*words.replace("MODEL", str(folder)).split())
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert said in err
