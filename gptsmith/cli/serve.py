"""The verb that serves a model through OpenAI's API: serve."""

import ipaddress
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

from ..config.fields import SettingError
from ..config.settings import InferenceSettings, ServingSettings
from ..machine.environment import api_key, use_huge_pages
from .flags import Parser, add_flags, chosen
from .inspect import inspector_page, looker
from .opening import MODEL_HELP, open_model, with_decoder

LOG = logging.getLogger(__name__)
EXTRA = ("fastapi", "prometheus_client", "uvicorn")
MOST_LINES = 1000  # log lines that may wait to be written; more are dropped
MOST_LABELS = 8  # that the line at the start shows
LAST_SECONDS = 1.0  # for writing the last lines at exit


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith serve`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_flags(parser, ServingSettings)
    add_flags(parser, InferenceSettings)


def run(options: Namespace) -> None:
    """Serve a model through OpenAI's API, to many clients at once, until Ctrl-C."""
    settings = chosen(options, ServingSettings)
    chosen(options, InferenceSettings)  # so that a mistake is reported before anything is opened
    check_extra()
    from ..serving.app import make_app
    from ..serving.guard import Guard
    from ..serving.http import UvicornServer, listen, listen_at, url

    key = api_key() if settings.api_key is None else settings.api_key
    path = settings.unix_socket
    with (
        listen(settings.host, settings.port) if path is None else listen_at(path) as bound,
        logging_in_thread(),
    ):
        served = open_served(options, settings)
        app = make_app(
            served, with_key=key is not None, inspector=inspector_page() if served.writes else None
        )
        guarded = Guard(
            app,
            api_key=key,
            most_bytes=settings.max_request_bytes,
            origins=settings.allow_origin,
            seen=recorder(served.metrics, log_requests=settings.log_requests),
        )
        host = None if path else ipaddress.ip_address(bound.getsockname()[0])
        if key is None and host is not None and not host.is_loopback:
            LOG.info(
                "note: anybody who can reach this machine can use the model: set GPTSMITH_API_KEY"
            )
        what = f"serving {served.name} at {url(bound)}"
        server = UvicornServer(
            guarded,
            drain=settings.drain,
            ready=lambda: LOG.info(f"{what}  ({room(served)}; page: /, docs: /docs; Ctrl-C ends)"),
            ending=lambda: LOG.info(
                f"finishing open requests, for at most {settings.drain} s; Ctrl-C stops at once"
            ),
        )
        server.run(sockets=[bound])


def check_extra() -> None:
    """Raise ImportError, with the command to type, if a library of the server is missing."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ImportError(f"serving needs {missing[0]}, an extra: pip install 'gptsmith[serve]'")


class LossyQueueHandler(QueueHandler):
    """Puts log records into a queue, and drops them when it is full."""

    queue: SimpleQueue[Any]

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put a record into the queue, or drop it."""
        if self.queue.qsize() < MOST_LINES:
            super().enqueue(record)


@contextmanager
def logging_in_thread() -> Iterator[None]:
    """Write the log to standard error in a thread of its own, so that a full or closed pipe does
    not block the server."""
    queue = SimpleQueue[Any]()
    handler, listener = LossyQueueHandler(queue), QueueListener(queue, logging.StreamHandler())
    logging.getLogger("gptsmith").setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # it would repeat our lines
    logging.getLogger().addHandler(handler)
    listener.start()
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        # `stop` waits until the last line is written, which may never happen.
        stopping = Thread(target=listener.stop, daemon=True)
        stopping.start()
        stopping.join(LAST_SECONDS)
    if stopping.is_alive():
        os._exit(0)  # a normal exit would wait for the listener's lock on standard error


def room(served: Any) -> str:
    """Return how many texts are generated, or labelled, at once."""
    if not served.writes:
        return f"labels: {', '.join(served.labels[:MOST_LABELS])}"
    cache = served.service.engine.slots.cache
    return f"{served.service.slots} slots of {cache.capacity:,} tokens: {cache.size / 1e9:.2f} GB"


def open_served(options: Namespace, settings: ServingSettings) -> Any:
    """Open the model and return it ready to be served."""
    use_huge_pages()
    opened = open_model(options, options.model, labels=None)
    from ..model.classifier import Classifier

    if isinstance(opened[1], Classifier):
        if settings.adapter:
            raise SettingError("adapter", f"is of a model that writes, not of {options.model}")
        return classifier_served(options, settings, *opened[1:])
    folder, model, tokenizer, decoder = with_decoder(options, options.model, *opened)
    from ..model.lora import own_bytes
    from ..serving.handler import ServedModel
    from ..serving.metrics import Metrics
    from ..serving.worker import Counts, Service, Turns
    from ..tokenizers.chat import open_template

    turns = Turns()
    limits: Any = {"slots": settings.slots, "waiting": settings.waiting}
    service = Service(model, decoder=decoder, turns=turns, **limits)
    services = [service]

    def counts() -> Counts:
        return Counts(*map(sum, zip(*(each.counts() for each in services), strict=True)))

    adapters = []
    for word in settings.adapter:
        name, _, path = word.partition("=")
        place, merged, its_tokenizer, its_decoder = with_decoder(
            options, path, *open_model(options, path, base=folder), sharing=model
        )
        services.append(Service(merged, decoder=its_decoder, turns=turns, **limits))
        LOG.info(
            f"adapter {name}: {own_bytes(merged, model) / 1e9:.2f} GB of weights of its own, and "
            f"{services[-1].engine.slots.cache.size / 1e9:.2f} GB for {services[-1].slots} slots"
        )
        adapters.append((name, path, place, merged, its_tokenizer, services[-1]))
    metrics = Metrics(counts, slots=sum(each.slots for each in services))

    def served(
        name: str, path: str, place: Path, model: Any, tokenizer: Any, service: Any
    ) -> ServedModel:
        return ServedModel(
            service=service,
            tokenizer=tokenizer,
            name=name,
            aliases=frozenset({path}),
            ends=tokenizer.ends,
            template=open_template(place, tokenizer),
            look=looker(model, tokenizer, name),
            timeout=settings.timeout,
            metrics=metrics,
        )

    name = settings.name or Path(options.model).resolve().name
    whole = served(name, options.model, folder, model, tokenizer, service)
    return replace(whole, adapters=tuple(served(*each) for each in adapters))


def classifier_served(
    options: Namespace, settings: ServingSettings, model: Any, tokenizer: Any
) -> Any:
    """Return a classifier ready to be served; ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError(
            f"{options.model} has no tokenizer.json, which reading text needs: add one"
        )
    from ..serving.classify import ServedClassifier
    from ..serving.labelling import LabelService
    from ..serving.metrics import Metrics

    service = LabelService(model, slots=settings.slots, waiting=settings.waiting)
    return ServedClassifier(
        service=service,
        tokenizer=tokenizer,
        name=settings.name or Path(options.model).resolve().name,
        aliases=frozenset({options.model}),
        timeout=settings.timeout,
        metrics=Metrics(service.counts, slots=service.slots),
    )


def recorder(metrics: Any, *, log_requests: bool) -> Callable[[Any], None]:
    """Return the function that records each request in the metrics and, if wanted, in the log."""
    from ..serving.guard import Access, line

    def seen(access: Access) -> None:
        metrics.finished(access.path, access.status, access.seconds)
        if log_requests:
            LOG.info(line(access))

    return seen
