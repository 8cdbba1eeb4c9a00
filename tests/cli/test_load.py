"""A server under load: figures against known times, and whatever can go wrong on the way.

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

import gptsmith.cli.load as command
from gptsmith import GPTConfig, save
from gptsmith.cli.client import Answer, Failure, Server, answered, ask, model_name
from gptsmith.cli.crowd import Crowd, figures, measure, percentiles, render
from gptsmith.cli.load import served
from gptsmith.cli.main import main
from gptsmith.config.settings import LoadSettings
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


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`gptsmith bench serve` with these words: status, stdout, stderr."""

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["bench", "serve", *map(str, words)])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context holds 11 tokens."""
    place = tmp_path_factory.mktemp("load") / "toy"
    save(scrambled(GPTConfig(**TINY)), None, place)
    return place


def settings(**asked: Any) -> LoadSettings:
    """A short measurement."""
    return LoadSettings(**{"clients": 1, "seconds": 0.5, "max_tokens": 6, **asked})


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
    found = measure(steady, LoadSettings(clients=3, seconds=2, prompt_tokens=7, max_tokens=20))
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
    assert found["answered"] < found["asked"]  # with those before and after


def test_events_of_several_tokens_are_said_to_be(bench: Callable[..., Any]) -> None:
    with slow_server(per_event=4) as server:
        status, out, err = bench(server, "--clients", 2, "--seconds", 0.5, "--max-tokens", 12)
    assert status == 0, err
    rows = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert rows["tokens per event"].strip() == "4.00"
    assert rows["failed, of all asked"].strip().startswith("0 of")


def test_every_prompt_is_another_and_the_first_answers_differ_in_length() -> None:
    with slow_server(first=0.0, every=0.001) as server:
        measure(server, settings(clients=4, prompt_tokens=9, max_tokens=8))
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
        return Crowd(steady, settings(seed=seed)).question(client=2, request=3)

    assert prompt(5) == prompt(5) != prompt(6)


# -- what goes wrong


def test_refusals_are_counted_and_their_time_is_waited_for() -> None:
    refused = {"refused": [3, 6, 9], "retry_after": 1, "first": 0.0, "every": 0.001}
    with slow_server(**refused) as server:
        found = measure(server, settings(seconds=2.5))
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
def test_no_half_answer_is_an_answer(end: str, kind: str, bench: Callable[..., Any]) -> None:
    with slow_server(end=end) as server:
        status, out, err = bench(server, "--clients", 2, "--seconds", 5, "--max-tokens", 6)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(f"no request was answered: 2 x ({kind})", err)


def test_an_unknown_path_is_a_failure(steady: Server) -> None:
    elsewhere = Server(steady.host, steady.port, "/elsewhere")
    with pytest.raises(Failure, match="HTTP 404 Not Found"):
        ask(elsewhere, {}, threading.Event())


def test_a_stream_that_says_nothing_more_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptsmith.cli.client.SILENCE", 0.3)
    with slow_server(every=30) as server:
        began = time.monotonic()
        with pytest.raises(ValueError, match=r"1 x nothing came for 0\.3 s"):
            measure(server, settings())
    assert time.monotonic() - began < 20


def test_too_short_a_time_is_told() -> None:
    with (
        slow_server(first=1, every=0.001) as server,
        pytest.raises(ValueError, match=r"no token within 0\.1 s: none came: give it more"),
    ):
        measure(server, settings(seconds=0.1))


def test_what_no_client_expects_is_not_waited_for(
    steady: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*question: Any) -> Answer:
        raise ZeroDivisionError

    monkeypatch.setattr("gptsmith.cli.crowd.ask", broken)
    with pytest.raises(ZeroDivisionError):
        measure(steady, settings(clients=2))


def test_a_wrong_key_is_told_in_a_line(bench: Callable[..., Any]) -> None:
    with slow_server(key="sesame") as server:
        assert model_name(server) == "toy"
        status, out, err = bench(server, "--api-key", "simsim")
        assert (status, out) == (2, "")
        assert err.endswith("/v1/models: HTTP 401 invalid_api_key: that is no key\n")
        assert "sesame" not in repr(server)
        status, _, err = bench(server, "--api-key", "sesame", "--seconds", 0.1, "--max-tokens", 3)
        assert status == 0, err


def test_where_nobody_listens_is_told_in_a_line(bench: Callable[..., Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but not listening
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        status, out, err = bench(address)
    assert (status, out) == (2, "")
    assert err == f"gptsmith: {address}/v1/models: nobody listens\n"


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("https://127.0.0.1:1", "is no address of plain HTTP"),
        ("http://", "is no address of plain HTTP"),
        ("http://127.0.0.1:1 --threads 2 --dtype bf16", "--threads and --dtype: a server that"),
        ("http://127.0.0.1:1 --clients 0", "clients is 0: at least 1 is needed"),
        ("http://127.0.0.1:1 --seconds 0", "seconds is 0.0: above 0 is needed"),
        ("http://127.0.0.1:1 --rows 2", "--rows are of generation: say 'bench generate'"),
        ("http://127.0.0.1:1 --profile", "--profile are of training: say 'bench train'"),
        ("nowhere", "no model at nowhere"),
    ],
)
def test_mistakes_are_told_in_a_line(given: str, complaint: str, bench: Callable[..., Any]) -> None:
    status, out, err = bench(*given.split())
    assert (status, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_what_is_of_serving_is_refused_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", "gpt2", "--clients", "3", "--api-key", "k"]) == 2
    assert "--clients and --api-key are of serving" in capsys.readouterr().err


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
        found = measure(Server.at(address), settings(), memory)["memory_megabytes"]
        actual = psutil.Process(number).memory_info().rss / 1e6
    assert found["end"] == pytest.approx(actual, rel=0.1)
    assert 5 < found["start"] <= found["peak"] >= found["end"]
    assert is_over(number)


def test_the_command_starts_measures_and_ends_a_server(
    folder: Path, bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    original, before = command.program, servers_of(psutil.Process())

    def program(options: Any) -> list[str]:
        asked.append(original(options))
        return words(key="k")

    monkeypatch.setattr(command, "program", program)
    flags = "--clients 2 --seconds 0.3 --json --api-key k --dtype bf16 --threads 1 --slots 3"
    status, out, err = bench(folder, *flags.split())
    assert status == 0, err
    found = json.loads(out)
    assert (found["prompt_tokens"], found["max_tokens"]) == (3, 9)  # as the context holds
    assert found["memory_megabytes"]["peak"] > 5
    assert servers_of(psutil.Process()) == before
    serve = [sys.executable, "-m", "gptsmith", "serve", str(folder), "--host", "127.0.0.1"]
    assert asked[0][: len(serve) + 2] == [*serve, "--port", "0"]
    rest = asked[0][len(serve) + 2 :]
    pairs = dict(zip(rest[::2], rest[1::2], strict=True))
    assert pairs == {"--dtype": "bf16", "--threads": "1", "--slots": "3", "--api-key": "k"}


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ({"start": "die"}, "gptsmith: the server ended: there is no such model: train one\n"),
        ({"dies_at": 20}, "gptsmith: the server ended: the lights went out\n"),
    ],
)
def test_a_server_that_dies_is_told_with_its_last_line(
    how: dict[str, Any],
    line: str,
    folder: Path,
    bench: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "program", lambda options: words(**how))
    status, out, err = bench(folder, "--seconds", 30)
    assert (status, out, err) == (2, "", line)


def test_a_running_server_that_dies_is_measured_up_to_there() -> None:
    with slow_server(dies_at=30) as server:
        found = measure(server, settings(clients=3, seconds=3))
    broken = found["failed"]
    assert broken.pop("nobody listens") >= 1
    assert sum(broken.values()) >= 1
    assert set(broken) <= {"a stream ended without [DONE]", "the connection broke"}


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_a_signal_ends_the_server_too(number: int, status: int, folder: Path) -> None:
    program = (
        "import sys, gptsmith.commands.load as load; from gptsmith.cli import main\n"
        f"load.program = lambda options: {words()!r}\n"
        "load.fitted = lambda model, settings, asked: settings\n"  # which imports PyTorch
        f"sys.exit(main(['bench', 'serve', {str(folder)!r}, '--seconds', '60']))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    seen = psutil.Process(parent.pid)
    until = time.monotonic() + 60
    while not (found := servers_of(seen)) and time.monotonic() < until:
        time.sleep(0.05)
    (server,) = found
    while not psutil.Process(server).net_connections("tcp4") and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(1)  # it measures
    os.kill(parent.pid, number)
    assert parent.wait(30) == status
    assert is_over(server)
    assert b"Traceback" not in parent.stderr.read()  # type: ignore[union-attr]


def test_a_model_is_served_and_measured(
    tmp_path: Path, bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTSMITH_API_KEY", "sesame")  # which both sides read
    model = scrambled(GPTConfig(**TINY | {"context_length": 40}))
    save(model, char_tokenizer("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 "), tmp_path / "toy")
    flags = "--clients 3 --seconds 1 --prompt-tokens 5 --max-tokens 30 --slots 2 --threads 1"
    status, out, err = bench(tmp_path / "toy", *flags.split(), "--compile", "no", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["failed"] == {}
    assert found["answered"] > 3
    ratio = found["prompt_tokens_per_second"] / found["generated_tokens_per_second"]
    assert ratio == pytest.approx(5 / 30, rel=0.3)
    assert found["tokens_per_event"] == pytest.approx(1, abs=0.1)
    first, between = found["first_token_milliseconds"], found["between_events_milliseconds"]
    assert between["p50"] > 0
    assert first["p95"] > 5 * between["p50"]  # of three clients one waits for one of two slots
    assert 100 < found["memory_megabytes"]["start"] <= found["memory_megabytes"]["peak"]
