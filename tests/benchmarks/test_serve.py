"""The load of a server: figures against known times, and whatever can go wrong on the way.

The server is `slow_server`, a program that answers at known times; `gptsmith serve` is measured by
the last test here.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import results
import serve
from serve import (
    Answer,
    Crowd,
    Failure,
    Load,
    Server,
    answered,
    ask,
    figures,
    measure,
    model_name,
    percentiles,
    render,
    served,
)

from gptsmith import GPTConfig, save
from gptsmith.tokenizers import char_tokenizer
from tests.conftest import TINY, scrambled

Serve = Callable[..., AbstractContextManager[Server]]


def words(**how: Any) -> list[str]:
    """The command line of a server that behaves so."""
    return [sys.executable, str(Path(__file__).parent / "slow_server.py"), json.dumps(how)]


@contextmanager
def slow_server(**how: Any) -> Iterator[Server]:
    """A server that behaves so, while the context lasts."""
    with served(words(**how)) as (address, _):
        yield Server.at(address, how.get("key"))


@pytest.fixture(scope="module")
def steady() -> Iterator[Server]:
    """50 ms to the first event, 10 ms to each after it."""
    with slow_server() as server:
        yield server


Call = Callable[..., tuple[int, str, str, list[dict[str, Any]]]]


@pytest.fixture
def bench(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Call:
    """`serve.py` with these words: status, stdout, stderr, and the lines of its file."""
    out = tmp_path / "results.jsonl"
    monkeypatch.setattr(results.signal, "signal", lambda *handled: None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))

    def call(*words: object) -> tuple[int, str, str, list[dict[str, Any]]]:
        capsys.readouterr()
        out.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["serve.py", "--out", str(out), *map(str, words)])
        status = 0
        try:
            results.carry_out(serve.main)
        except SystemExit as end:
            status = int(end.code or 0)
        lines = out.read_text().splitlines() if out.exists() else []
        return status, *capsys.readouterr(), [json.loads(line) for line in lines]

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context holds 11 tokens."""
    place = tmp_path_factory.mktemp("load") / "toy"
    save(scrambled(GPTConfig(**TINY)), None, place)
    return place


def load(**asked: Any) -> Load:
    """A short measurement."""
    return Load(**{"clients": 1, "seconds": 0.5, "max_tokens": 6, **asked})


# -- figures of known moments


def test_only_what_happens_within_the_time_counts() -> None:
    answers = [
        Answer(started=9.0, arrivals=[9.5, 9.9, 10.2], prompt=100, generated=3),  # one of three
        Answer(started=10.0, arrivals=[10.1, 10.3, 10.7, 11.5], prompt=5, generated=8),
        Answer(started=11.6, arrivals=[11.9, 12.4], prompt=7, generated=2),  # one of two
        Answer(started=12.1, arrivals=[12.2], prompt=100, generated=50),
    ]
    found = figures(answers, begin=10.0, end=12.0)
    assert found["seconds"] == 2
    assert found["answered"] == 2
    assert found["prompt_tokens_per_second"] == (5 + 7) / 2
    assert found["generated_tokens_per_second"] == (1 + 8 + 1) / 2
    assert found["tokens_per_event"] == pytest.approx(10 / 6)
    assert found["first_token_milliseconds"]["p50"] == pytest.approx((100 + 300) / 2)
    gaps = [300, 200, 400, 800]  # ending within: of the first answer one, of the second three
    expected = np.quantile(gaps, [0.5, 0.95, 0.99], method="linear")
    between = list(found["between_events_milliseconds"].values())
    assert between == pytest.approx(list(expected))


def test_percentiles_lie_between_the_nearest_values() -> None:
    hundred_and_one = random.Random(1).sample([number / 1000 for number in range(101)], 101)
    assert percentiles(hundred_and_one) == pytest.approx({"p50": 50, "p95": 95, "p99": 99})
    assert percentiles([0.010, 0.020]) == pytest.approx({"p50": 15, "p95": 19.5, "p99": 19.9})
    assert percentiles([0.010]) == pytest.approx({"p50": 10, "p95": 10, "p99": 10})
    assert percentiles([]) == {"p50": None, "p95": None, "p99": None}


# -- figures of a server whose times are known


def test_the_figures_are_the_servers(steady: Server) -> None:
    kept: list[dict[str, Any]] = []
    wanted = Load(clients=3, seconds=2, prompt_tokens=7, max_tokens=20)
    found = measure(steady, wanted, keep=kept.append)
    first, between = found["first_token_milliseconds"], found["between_events_milliseconds"]
    assert 50 <= first["p50"] <= 90
    assert 9 <= between["p50"] <= 16
    assert first["p50"] <= first["p95"] <= first["p99"]
    assert found["tokens_per_event"] == pytest.approx(1)
    fastest = 3 * 20 / (0.050 + 19 * 0.010)  # if asking again took no time
    assert 0.5 * fastest < found["generated_tokens_per_second"] <= fastest * 1.1
    ratio = found["prompt_tokens_per_second"] / found["generated_tokens_per_second"]
    assert ratio == pytest.approx(7 / 20, rel=0.2)  # less whole answers than events: 2 s hold 8
    assert 2 <= found["seconds"] < 2.5
    assert found["failed"] == {}
    assert found["memory_megabytes"] is None
    assert found["answered"] < found["asked"] == len(kept)  # with those before and after
    assert {each["new_tokens"] for each in kept} == {7, 14, 20}  # the first are of other lengths
    assert all(0.05 <= each["first"] - each["started"] <= 0.2 for each in kept)


def test_events_of_several_tokens_are_said_to_be(bench: Call) -> None:
    with slow_server(per_event=4) as server:
        status, out, err, lines = bench(
            server, "--clients", 2, "--seconds", 0.5, "--max-tokens", 12
        )
    assert status == 0, err
    assert lines[-1]["tokens_per_event"] == 4
    assert sum("started" in line for line in lines) == lines[-1]["asked"] == len(lines) - 1
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert rows["tokens per event"].strip() == "4.00"
    assert rows["failed, of all asked"].strip().startswith("0 of")


def test_every_prompt_is_another_and_the_first_answers_differ_in_length() -> None:
    with slow_server(first=0.0, every=0.001) as server:
        measure(server, load(clients=4, prompt_tokens=9, max_tokens=8))
        with answered(server, "/sent") as response:
            sent = json.loads(response.read())
    prompts = [tuple(each["prompt"]) for each in sent]
    assert len(set(prompts)) == len(prompts) > 10
    assert {len(prompt) for prompt in prompts} == {9}
    assert set().union(*prompts) <= set(range(32))
    assert len({each["seed"] for each in sent}) == len(sent)
    lengths = [each["max_tokens"] for each in sent]
    assert sorted(length for length in lengths if length != 8) == [2, 4, 6]
    assert {(each["model"], each["stream"], each["temperature"]) for each in sent} == {
        ("toy", True, 1)
    }


def test_a_seed_asks_the_same_again(steady: Server) -> None:
    def prompt(seed: int) -> Any:
        return Crowd(steady, load(seed=seed)).question(client=2, request=3)

    assert prompt(5) == prompt(5) != prompt(6)


# -- what goes wrong


def test_refusals_are_counted_and_their_time_is_waited_for() -> None:
    refused = {"refused": [3, 6, 9], "retry_after": 1, "first": 0.0, "every": 0.001}
    with slow_server(**refused) as server:
        found = measure(server, load(seconds=2.5))
        with answered(server, "/sent") as response:
            sent = json.loads(response.read())
    # Had it come back early, it would have been told so, which is another kind.
    kind = "HTTP 429 rate_limit_error"
    expected = sum(number % 10 in refused["refused"] for number in range(len(sent)))
    assert found["failed"] == {kind: expected}
    assert expected >= 2
    assert found["asked"] == len(sent)
    assert f"{expected} of {len(sent)}, {expected} x {kind}" in render(found)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("silent", r"a stream ended without \[DONE\]"),
        ("cut", r"a stream ended without \[DONE\]|the connection broke"),
        ("no usage", "a stream without usage: its tokens cannot be counted"),
        ("error", "an error within a stream: it broke"),
        ("strange", "an answer that is not of OpenAI's form: TypeError"),
    ],
)
def test_no_half_answer_is_an_answer(end: str, kind: str, bench: Call) -> None:
    with slow_server(end=end) as server:
        status, out, err, lines = bench(server, "--clients", 2, "--seconds", 5, "--max-tokens", 6)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(f"no request was answered: 2 x ({kind})", err)
    assert re.match(kind, lines[0]["failed"])


def test_an_unknown_path_is_a_failure(steady: Server) -> None:
    elsewhere = Server(steady.host, steady.port, "/elsewhere")
    with pytest.raises(Failure, match="HTTP 404 Not Found"):
        ask(elsewhere, {}, threading.Event())


def test_a_stream_that_says_nothing_more_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.SILENCE", 0.3)
    with slow_server(every=30) as server:
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"1 x nothing came for 0\.3 s"):
            measure(server, load())
    assert time.monotonic() - began < 20


def test_too_short_a_time_is_told() -> None:
    with (
        slow_server(first=1, every=0.001) as server,
        pytest.raises(ValueError, match=r"no token within 0\.1 s: none came: give it more"),
    ):
        measure(server, load(seconds=0.1))


def test_what_no_client_expects_is_not_waited_for(
    steady: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*question: Any) -> Answer:
        raise ZeroDivisionError

    monkeypatch.setattr("serve.ask", broken)
    with pytest.raises(ZeroDivisionError):
        measure(steady, load(clients=2))


def test_a_wrong_key_is_told_in_a_line(bench: Call) -> None:
    with slow_server(key="sesame") as server:
        assert model_name(server) == "toy"
        status, out, err, _ = bench(server, "--api-key", "simsim")
        assert (status, out) == (2, "")
        assert err.endswith("/v1/models: HTTP 401 invalid_api_key: that is no key\n")
        assert "sesame" not in repr(server)
        status, _, err, _ = bench(
            server, "--api-key", "sesame", "--seconds", 0.1, "--max-tokens", 3
        )
        assert status == 0, err


def test_where_nobody_listens_is_told_in_a_line(bench: Call) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        status, out, err, _ = bench(address)
    assert (status, out) == (2, "")
    assert err == f"serve.py: {address}/v1/models: nobody listens\n"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("https://127.0.0.1:1", "is no address of plain HTTP"),
        ("http://", "is no address of plain HTTP"),
        ("http://127.0.0.1:1 -- --threads 2", "--threads is for gptsmith serve"),
        ("http://127.0.0.1:1 --clients 0", "clients is 0: at least 1 is needed"),
        ("http://127.0.0.1:1 --seconds 0", "seconds is 0.0: above 0 is needed"),
        ("nowhere", "no model at nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(given: str, complaint: str, bench: Call) -> None:
    before, *after = given.split(" -- ")
    flags = ["--", *after[0].split()] if after else []
    status, out, err, _ = bench("--seed", 0, *before.split(), *flags)
    assert (status, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://localhost:81/v1/", Server("localhost", 81)),
        ("http://there/behind/v1", Server("there", 80, "/behind")),
        ("http://there/", Server("there", 80)),
    ],
)
def test_addresses(address: str, expected: Server) -> None:
    assert Server.at(address) == expected


# -- a server of our own


def is_over(number: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def servers_of(parent: psutil.Process) -> set[int]:
    """The slow servers that a process has started."""
    children = parent.children(recursive=True)
    return {child.pid for child in children if "slow_server" in " ".join(child.cmdline())}


def test_memory_is_the_childs() -> None:
    before = servers_of(psutil.Process())
    with served(words()) as (address, memory):
        (number,) = servers_of(psutil.Process()) - before
        found = measure(Server.at(address), load(), memory)["memory_megabytes"]
        actual = psutil.Process(number).memory_info().rss / 1e6
    assert found["end"] == pytest.approx(actual, rel=0.1)
    assert 5 < found["start"] <= found["peak"] >= found["end"]
    assert is_over(number)


def test_the_program_starts_measures_and_ends_a_server(
    folder: Path, bench: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    original, before = serve.command, servers_of(psutil.Process())

    def command(model: str, flags: list[str]) -> list[str]:
        asked.append(original(model, flags))
        return words(key="k")

    monkeypatch.setattr(serve, "command", command)
    flags = "--clients 2 --seconds 0.3 --api-key k -- --dtype bf16 --threads 1 --slots 3"
    status, out, err, lines = bench(folder, *flags.split())
    assert status == 0, err
    assert (lines[-1]["prompt_tokens"], lines[-1]["max_tokens"]) == (3, 9)  # as the context holds
    assert lines[-1]["memory_megabytes"]["peak"] > 5
    assert "resident megabytes" in out
    assert servers_of(psutil.Process()) == before
    head = [sys.executable, "-m", "gptsmith", "serve", str(folder), "--host", "127.0.0.1"]
    assert asked[0][: len(head) + 2] == [*head, "--port", "0"]
    rest = asked[0][len(head) + 2 :]
    pairs = dict(zip(rest[::2], rest[1::2], strict=True))
    assert pairs == {"--dtype": "bf16", "--threads": "1", "--slots": "3", "--api-key": "k"}


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"start": "die"}, "serve.py: the server ended: there is no such model: train one\n"),
        ({"dies_at": 20}, "serve.py: the server ended: the lights went out\n"),
    ],
)
def test_a_server_that_dies_is_told_with_its_last_line(
    how: dict[str, Any],
    line: str,
    folder: Path,
    bench: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "command", lambda model, flags: words(**how))
    status, out, err, lines = bench(folder, "--seconds", 30)
    assert (status, out, err) == (2, "", line)
    assert sum("started" in each for each in lines) == (0 if "start" in how else 12)


def test_a_running_server_that_dies_is_measured_up_to_there() -> None:
    with slow_server(dies_at=30) as server:
        found = measure(server, load(clients=3, seconds=3))
    broken = found["failed"]
    assert broken.pop("nobody listens") >= 1
    assert sum(broken.values()) >= 1
    assert set(broken) <= {"a stream ended without [DONE]", "the connection broke"}


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_signal_ends_the_server_and_keeps_what_was_measured(
    number: int, status: int, tmp_path: Path
) -> None:
    out = tmp_path / "results.jsonl"
    program = (
        "import sys, serve, results\n"
        f"serve.command = lambda model, flags: {words()!r}\n"
        "serve.fitted = lambda model, load, asked: load\n"  # which imports PyTorch
        "results.carry_out(serve.main)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, "toy", "--max-tokens", "6", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    until = time.monotonic() + 60
    while not (out.exists() and out.read_text().count("\n") > 30) and time.monotonic() < until:
        time.sleep(0.05)
    (server,) = servers_of(psutil.Process(parent.pid))
    os.kill(parent.pid, number)
    shown, said = parent.communicate(timeout=30)
    assert parent.returncode == status
    assert is_over(server)
    assert "Traceback" not in said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum("started" in line for line in lines) > 30
    if number == signal.SIGINT:  # what a person stops is summed up
        assert lines[-1]["interrupted"]
        assert lines[-1]["generated_tokens_per_second"] > 0
        assert lines[-1]["failed"] == {}
        assert "8 clients for" in shown


def test_a_model_is_served_and_measured(
    tmp_path: Path, bench: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTSMITH_API_KEY", "sesame")  # which both sides read
    model = scrambled(GPTConfig(**TINY | {"context_length": 40}))
    save(model, char_tokenizer("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "), tmp_path / "toy")
    flags = "--clients 3 --seconds 1 --prompt-tokens 5 --max-tokens 30"
    served_with = "-- --slots 2 --threads 1 --compile no"
    status, _, err, lines = bench(tmp_path / "toy", *flags.split(), *served_with.split())
    assert status == 0, err
    found = lines[-1]
    assert found["failed"] == {}
    assert found["answered"] > 3
    ratio = found["prompt_tokens_per_second"] / found["generated_tokens_per_second"]
    assert ratio == pytest.approx(5 / 30, rel=0.3)
    assert found["tokens_per_event"] == pytest.approx(1, abs=0.1)
    first, between = found["first_token_milliseconds"], found["between_events_milliseconds"]
    assert between["p50"] > 0
    assert first["p95"] > 5 * between["p50"]  # of three clients one waits for one of two slots
    assert 100 < found["memory_megabytes"]["start"] <= found["memory_megabytes"]["peak"]
