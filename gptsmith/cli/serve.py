"""The verb that serves a model through OpenAI's API: serve."""

import contextlib
import ipaddress
import logging
import os
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any, Self

from ..config.settings import InferenceSettings, ServingSettings
from ..machine.environment import api_key, use_huge_pages
from ..machine.terminal import tell
from .flags import Parser, add_flags, chosen
from .opening import MODEL_HELP, open_writer

EXTRA = ("fastapi", "jinja2", "prometheus_client", "uvicorn")
MOST_LINES = 1000  # that wait to be read; what comes then is not said
LAST_SECONDS = 1.0  # in which the last lines have to be read


def arguments(parser: Parser) -> None:
    """What may follow `gptsmith serve`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_flags(parser, ServingSettings)
    add_flags(parser, InferenceSettings)


def run(options: Namespace) -> None:
    """Serve a model through OpenAI's API, to many clients at once, until Ctrl-C."""
    settings = chosen(options, ServingSettings)
    chosen(options, InferenceSettings)  # a mistake is said before anything is opened
    check_extra()
    from ..serving.app import make_app
    from ..serving.guard import Guard
    from ..serving.http import Server, listen, url

    key = api_key() if settings.api_key is None else settings.api_key
    with listen(settings.host, settings.port) as bound, Teller() as teller:
        served = open_served(options, settings, teller)
        guarded = Guard(
            make_app(served, with_key=key is not None),
            api_key=key,
            most_bytes=settings.max_request_bytes,
            seen=recorder(served.metrics, teller if settings.log_requests else None),
        )
        if key is None and not ipaddress.ip_address(bound.getsockname()[0]).is_loopback:
            teller.say("note: whoever reaches this machine may use the model: set GPTSMITH_API_KEY")
        cache = served.service.engine.slots.cache
        room = (
            f"{served.service.slots} slots of {cache.capacity:,} tokens: {cache.size / 1e9:.2f} GB"
        )
        what = f"serving {served.name} at {url(bound)}"
        server = Server(
            guarded,
            drain=settings.drain,
            ready=lambda: teller.say(f"{what}  ({room}; page: /, docs: /docs; Ctrl-C ends)"),
            ending=lambda: teller.say(
                f"finishing what is begun, in at most {settings.drain} s; Ctrl-C ends it at once"
            ),
        )
        server.run(sockets=[bound])


def check_extra() -> None:
    """ImportError, with what to do, where the libraries of the server are missing."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ImportError(f"serving needs {missing[0]}, an extra: pip install 'gptsmith[serve]'")


class Teller(logging.Handler):
    """Tells lines, and what is logged, in a thread of its own: who does not read them, or cannot
    be written to, holds nobody up."""

    def __enter__(self) -> Self:
        self.lines: Queue[str | None] = Queue(MOST_LINES)
        self.thread = Thread(target=self.run, name="teller", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        logging.getLogger().removeHandler(self)
        with contextlib.suppress(Full):
            self.lines.put(None, timeout=LAST_SECONDS)
        self.thread.join(LAST_SECONDS)
        if self.thread.is_alive() and kind is None:  # it holds what Python would wait for
            os._exit(0)

    def say(self, text: str) -> None:
        """Tell a line, soon."""
        with contextlib.suppress(Full):
            self.lines.put_nowait(text)

    def emit(self, record: logging.LogRecord) -> None:
        """Tell what is logged."""
        self.say(self.format(record))

    def run(self) -> None:
        """Line after line, to the last."""
        while (text := self.lines.get()) is not None:
            with contextlib.suppress(OSError):
                tell(text)


def open_served(options: Namespace, settings: ServingSettings, teller: Teller) -> Any:
    """The model that the flags ask for, ready to be served."""
    use_huge_pages()
    folder, model, tokenizer, decoder = open_writer(options, options.model)
    from ..serving.chat import ends_of, open_template
    from ..serving.handler import Served
    from ..serving.metrics import Metrics
    from ..serving.worker import Service

    logging.basicConfig(format="%(message)s", handlers=[teller])  # of what goes wrong inside
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would say the same again
    service = Service(model, decoder=decoder, slots=settings.slots, waiting=settings.waiting)
    return Served(
        service=service,
        tokenizer=tokenizer,
        name=settings.name or Path(options.model).resolve().name,
        aliases=frozenset({options.model}),
        ends=ends_of(folder, tokenizer),
        template=open_template(folder, tokenizer),
        timeout=settings.timeout,
        metrics=Metrics(service.counts, slots=service.slots),
    )


def recorder(metrics: Any, teller: Teller | None) -> Any:
    """What takes down each request: in the figures, and as a line where there is a teller."""
    from ..serving.guard import Access, line

    def seen(access: Access) -> None:
        metrics.finished(access.path, access.status, access.seconds)
        if teller is not None:
            teller.say(line(access))

    return seen
