"""`gptsmith serve` as a process: signals in the middle of work, and standard streams that are not
there, are full, or that nobody reads."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gptsmith import GPTConfig, save
from gptsmith.serving.http import UvicornServer, listen
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled, until
from tests.serving.running import refuses

pytestmark = [pytest.mark.slow, pytest.mark.system("posix", "sends signals")]

CONTEXT = 20_000  # tokens: many seconds of writing
BODY = {"model": "toy", "prompt": "a", "logit_bias": {"256": -100}, "stream": True}
EXACT = ("--compile", "no", "--threads", "1")  # begins soonest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "toy"
    config = GPTConfig(**(TINY | {"vocab_size": 257, "context_length": CONTEXT}))
    save(scrambled(config), byte_tokenizer(), path)
    return path


@contextmanager
def started(folder: Path, *flags: str, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own; nothing of it is left in the end."""
    words = [sys.executable, "-m", "gptsmith", "serve", str(folder), *EXACT, *flags]
    with subprocess.Popen(words, text=True, **({"stderr": subprocess.PIPE} | how)) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def ready(folder: Path, *flags: str, **how: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command once it is ready, and its address."""
    with started(folder, "--port", "0", *flags, **how) as process:
        found = re.search(r"http://\S+", said := process.stderr.readline())
        assert found, said + process.stderr.read()
        yield process, found[0]


def until_healthy(address: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    """What the server says of itself, once it does."""

    def answers() -> bool:
        assert process.poll() is None, f"it ended with {process.returncode}"
        return not refuses(address)

    until(answers)
    return httpx2.get(f"{address}/health", timeout=120).json()


class Listener(threading.Thread):
    """A client that reads a stream to its end, or to where it is cut."""

    def __init__(self, address: str, count: int) -> None:
        super().__init__(daemon=True)
        self.address, self.body = address, BODY | {"max_tokens": count}
        self.lines: list[str] = []
        self.cut = False

    def run(self) -> None:
        try:
            url = f"{self.address}/v1/completions"
            with httpx2.stream("POST", url, json=self.body, timeout=120) as answer:
                self.lines += (line for line in answer.iter_lines() if line)
        except httpx2.TransportError:
            self.cut = True

    @property
    def finish(self) -> str | None:
        """How the text ended, of a stream that is whole."""
        assert self.lines[-1] == "data: [DONE]"
        return json.loads(self.lines[-2].removeprefix("data: "))["choices"][0]["finish_reason"]


def listeners(address: str, count: int, running: int, waiting: int) -> list[Listener]:
    """Clients whose texts run and wait."""
    found = [Listener(address, count) for _ in range(running + waiting)]
    for each in found:
        each.start()

    def all_there() -> bool:
        health = httpx2.get(f"{address}/health", timeout=120).json()
        return (health["running"], health["waiting"]) == (running, waiting)

    until(all_there)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_after_a_signal_what_runs_and_what_waits_is_finished(
    folder: Path, number: signal.Signals
) -> None:
    with ready(folder, "--slots", "2") as (process, address):
        clients = listeners(address, 400, running=2, waiting=3)
        process.send_signal(number)
        until(lambda: refuses(address))
        assert process.poll() is None, "the texts take longer than this"
        assert process.wait(120) == 0
        for client in clients:
            client.join(120)
            assert client.finish == "length"


def test_under_nohup_it_outlives_its_terminal(folder: Path) -> None:
    def ignoring() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with ready(folder, preexec_fn=ignoring) as (process, address):
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        assert httpx2.get(f"{address}/health").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_at_a_second_signal_it_ends_at_once(folder: Path, number: signal.Signals) -> None:
    with ready(folder, "--slots", "1") as (process, address):
        clients = listeners(address, CONTEXT, running=1, waiting=2)
        process.send_signal(number)
        until(lambda: refuses(address))
        process.send_signal(number)
        # The texts alone would take until the 30 s are over that a first signal leaves them.
        assert process.wait(20) == 128 + number
        for client in clients:
            client.join(120)
            assert client.cut


def test_what_is_not_finished_in_time_is_cut(folder: Path) -> None:
    with ready(folder, "--slots", "1", "--drain", "1") as (process, address):
        clients = listeners(address, CONTEXT, running=1, waiting=2)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0  # and not after the 30 s that are usual
        assert time.monotonic() - begun > 0.8
        for client in clients:
            client.join(120)
            error = json.loads(client.lines[-1].removeprefix("data: "))["error"]
            assert error["message"] == "the server is stopping: retry in a moment"
        # The one had begun, and the others had not.
        assert sorted(len(client.lines) > 1 for client in clients) == [False, False, True]


def test_whoever_says_nothing_does_not_keep_it_from_ending(folder: Path) -> None:
    """Connections that are open, half asked, or kept for later."""
    with ready(folder) as (process, address):
        at = ("127.0.0.1", int(address.rpartition(":")[2]))
        half = [socket.create_connection(at) for _ in range(3)]
        half[1].sendall(b"GET /hea")
        half[2].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert half[2].recv(1000)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0  # the usual patience is 30 s, and that with a request 60
        for raw in half:
            raw.close()


def test_a_server_that_was_killed_leaves_its_port(folder: Path) -> None:
    with ready(folder, "--slots", "1") as (process, address):
        clients = listeners(address, CONTEXT, running=1, waiting=1)
        process.kill()
        process.wait(120)
    with started(folder, "--port", address.rpartition(":")[2]) as process:
        assert address in process.stderr.readline()
        assert until_healthy(address, process)["running"] == 0
    for client in clients:
        client.join(120)
        assert client.cut


@pytest.mark.timeout(120)
def test_of_two_that_begin_at_once_at_a_port_one_is_told() -> None:
    """Both can be bound to it as long as neither listens."""
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "lifespan"
        await receive()
        await send({"type": "lifespan.startup.complete"})
        ended.append((await receive())["type"])
        await send({"type": "lifespan.shutdown.complete"})

    with listen("127.0.0.1", 0) as first, listen(*first.getsockname()) as second:
        first.listen()
        with pytest.raises(ValueError, match=r"port \d+ of 127\.0\.0\.1 is taken: choose another"):
            UvicornServer(app, drain=1).run(sockets=[second])
    assert ended == ["lifespan.shutdown"]


@pytest.mark.parametrize("closed", [1, 2], ids=["stdout", "stderr"])
def test_a_standard_stream_that_is_closed_is_not_missed(
    folder: Path, tmp_path: Path, closed: int
) -> None:
    """And no client gets what was meant for it."""
    port = free_port()
    with (
        (tmp_path / "said").open("w") as said,
        started(
            folder,
            "--port",
            str(port),
            stdout=said,
            stderr=said,
            preexec_fn=lambda: os.close(closed),
        ) as process,
    ):
        address = f"http://127.0.0.1:{port}"
        until_healthy(address, process)
        opened = os.readlink(f"/proc/{process.pid}/fd/{closed}")
        assert opened == os.devnull
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    assert ("serving toy at" in (tmp_path / "said").read_text()) is (closed == 1)


def test_a_stderr_that_is_full_does_not_end_it(folder: Path) -> None:
    port = free_port()
    with (
        Path("/dev/full").open("w") as full,
        started(folder, "--port", str(port), stderr=full) as process,
    ):
        until_healthy(f"http://127.0.0.1:{port}", process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


@pytest.mark.parametrize("gone", [False, True], ids=["there", "gone"])
def test_a_reader_of_stderr_who_does_not_read_holds_nobody_up(folder: Path, gone: bool) -> None:
    with ready(folder) as (process, address):
        if gone:
            process.stderr.close()
        with httpx2.Client(timeout=120) as client:
            for _ in range(600):  # lines that no pipe holds
                assert client.get(f"{address}/{'x' * 200}").status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0


def free_port() -> int:
    """A port at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])
