"""A real server in a thread of the test: uvicorn on a free port of this machine."""

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import openai

from gptsmith import GPT
from gptsmith.cli.inspect import inspector_page, looker
from gptsmith.serving.app import make_app
from gptsmith.serving.guard import Access, Guard
from gptsmith.serving.handler import ServedModel
from gptsmith.serving.http import UvicornServer, listen, url
from gptsmith.serving.metrics import Metrics
from gptsmith.serving.worker import Service
from gptsmith.tokenizers import Tokenizer


class Running:
    """A server that runs, and what it has taken down."""

    def __init__(self, address: str, served: ServedModel, accesses: list[Access]) -> None:
        self.url, self.served, self.accesses = address, served, accesses
        self.clients: dict[str, openai.OpenAI] = {}

    def client(self, key: str = "any") -> openai.OpenAI:
        """OpenAI's, which does not retry, and whose connections end with the server."""
        if key not in self.clients:
            at = f"{self.url}/v1"
            self.clients[key] = openai.OpenAI(base_url=at, api_key=key, max_retries=0)
        return self.clients[key]

    def wait_until_idle(self) -> float:
        """How many seconds it took until no text was being written or waiting; at most 120."""
        begun = time.monotonic()
        while any(self.served.service.counts()) or not self.served.service.engine.idle:
            assert time.monotonic() < begun + 120, "somebody still writes"
            time.sleep(0.002)
        return time.monotonic() - begun


def refuses(address: str) -> bool:
    """Whether nobody listens there."""
    try:
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 120).close()
    except (ConnectionRefusedError, ConnectionResetError):  # or it stopped just now
        return True
    return False


@contextmanager
def serving(
    model: GPT,
    tokenizer: Tokenizer,
    *,
    slots: int = 4,
    waiting: int = 16,
    step_seconds: float = 0.0,
    key: str | None = None,
    origins: Sequence[str] = (),
    **how: Any,
) -> Iterator[Running]:
    """Serve a model as `gptsmith serve` does; each step takes `step_seconds` longer."""
    service = Service(model, slots=slots, waiting=waiting)
    if step_seconds:
        slow_down(service, step_seconds)
    metrics = Metrics(service.counts, slots=slots)
    names: dict[str, Any] = {"name": "toy", "aliases": frozenset({"models/toy"})}
    names |= {"look": looker(model, tokenizer, "toy")}
    served = ServedModel(service=service, tokenizer=tokenizer, metrics=metrics, **(names | how))
    accesses: list[Access] = []
    ready = threading.Event()
    with listen("127.0.0.1", 0) as bound:
        app = Guard(
            make_app(served, inspector=inspector_page()),
            api_key=key,
            most_bytes=1 << 20,
            origins=origins,
            seen=accesses.append,
        )
        server = UvicornServer(app, drain=5, ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            assert ready.wait(120), "the server did not start"
            running = Running(url(bound), served, accesses)
            try:
                yield running
            finally:
                for client in running.clients.values():
                    client.close()
        finally:
            server.should_exit = True
            thread.join(120)
        assert not thread.is_alive()


def slow_down(service: Service, seconds: float) -> None:
    """Let each step of the engine take longer."""
    step = service.engine.step

    def slowly(now: float) -> Any:
        time.sleep(seconds)
        return step(now)

    service.engine.step = slowly  # type: ignore[method-assign]
