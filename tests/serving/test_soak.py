"""A server under load: no error, no leak, and nobody's text depends on the others.

For ten seconds, or for as many as SOAK_SECONDS says: `make soak` takes a minute.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import psutil
import pytest
from serve import Crowd, Failure, Load, Server, ask

from gptsmith import GPTConfig, save
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled

CLIENTS, SECONDS = 64, float(os.environ.get("SOAK_SECONDS", "10"))
SETTLED = SECONDS / 4
MOST_GROWTH = 0.05  # of the resident memory, from when it has settled
PROBES = [
    {"prompt": prompt, "seed": seed, "max_tokens": 40, "temperature": heat}
    for seed, (prompt, heat) in enumerate([("To be", 1), ("", 0.7), ("x" * 90, 1), ("ab", 0)])
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, str]]:
    """The command, its process and its address."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    config = GPTConfig(**(TINY | {"vocab_size": 257, "context_length": 256}))
    save(scrambled(config), byte_tokenizer(), folder)
    words = [sys.executable, "-m", "gptsmith", "serve", str(folder), "--port", "0"]
    words += ["--no-log-requests", "--slots", "16", "--threads", "1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = re.search(r"http://\S+", process.stderr.readline())
            assert found
            yield process.pid, found[0]
            process.terminate()
            assert process.wait(20) == 0
            said = process.stderr.read().splitlines()
            assert len(said) == 1, said  # that it ends
        finally:
            process.kill()


def text_of(address: str, probe: dict[str, Any]) -> str:
    """What the server writes for a probe."""
    found = httpx2.post(f"{address}/v1/completions", json={"model": "toy"} | probe, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["text"]


@pytest.mark.slow
def test_many_clients_for_a_while(server: tuple[int, str]) -> None:
    pid, address = server
    quiet = [text_of(address, probe) for probe in PROBES]
    load = Load(clients=CLIENTS, prompt_tokens=40, max_tokens=60, seconds=SECONDS)
    crowd = Crowd(Server.at(address), load)
    process, begun = psutil.Process(pid), time.monotonic()
    settled, probed = 0, 0

    def enough() -> bool:
        return len(crowd.answers) > 3 * CLIENTS and probed > 2 * len(PROBES)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(crowd.work, client) for client in range(CLIENTS)]
        try:
            while (now := time.monotonic() - begun) < SECONDS or not enough():
                assert not crowd.failures, crowd.refusals()
                number = probed % len(PROBES)
                assert text_of(address, PROBES[number]) == quiet[number]
                probed += 1
                settled = settled or (process.memory_info().rss if now >= SETTLED else 0)
                time.sleep(0.2)
            resident = process.memory_info().rss
        finally:
            crowd.closing.set()
        for client in clients:
            client.result(120)
    assert not crowd.failures, crowd.refusals()
    assert enough()
    assert resident < settled * (1 + MOST_GROWTH), f"{settled:,} bytes grew to {resident:,}"
    health = httpx2.get(f"{address}/health").json()
    assert (health["running"], health["waiting"]) == (0, 0)
    assert [text_of(address, probe) for probe in PROBES] == quiet


@pytest.mark.slow
def test_clients_that_come_and_go_leave_nothing(server: tuple[int, str]) -> None:
    """Streams that are abandoned at random, for a while: slots, sockets and memory come back."""
    pid, address = server
    process = psutil.Process(pid)
    quiet = text_of(address, PROBES[0])
    at = Server.at(address)

    def leave(number: int) -> None:
        abandoned = threading.Event()
        timer = threading.Timer(0.01 * (number % 20), abandoned.set)
        timer.start()
        question = {"model": "toy", "prompt": [1, 2, 3], "max_tokens": 250, "seed": number}
        try:
            ask(at, question, abandoned)
        except Failure as failure:
            said.append(str(failure))
        timer.cancel()

    said: list[str] = []
    resident = []
    for _ in range(4):
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(leave, range(150)))
        end = time.monotonic() + 120
        while any(httpx2.get(f"{address}/health").json()[each] for each in ("running", "waiting")):
            assert time.monotonic() < end, "somebody still writes"
            time.sleep(0.05)
        resident.append(process.memory_info().rss)
    assert set(said) == {"abandoned"}
    assert resident[-1] < resident[1] * (1 + MOST_GROWTH), resident
    sockets = [each for each in process.net_connections() if each.status == "ESTABLISHED"]
    assert len(sockets) < 5
    assert text_of(address, PROBES[0]) == quiet
