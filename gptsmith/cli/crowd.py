"""How well a server keeps many clients busy: tokens per second, waiting times, memory.

Knows nothing of HTTP, or of what computes the answers.
"""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, pairwise
from typing import Any

import numpy as np

from ..config.settings import LoadSettings
from ..config.tables import columns
from .client import Answer, Failure, Server, ask, model_name
from .comparison import three_digits

Figures = dict[str, Any]

IDS = 32  # prompts are of the ids below this, which every vocabulary has
TICK = 0.1  # seconds between looks at the clients and at the server's memory
PERCENTILES = (50, 95, 99)

LEGEND = """\
measured from when every client had been answered until they stopped asking: all busy all the time
first token: from before connecting to the first event; an event is a piece of a stream"""


class Crowd:
    """Clients that each ask, read the answer and ask again, and what became of it."""

    def __init__(self, server: Server, settings: LoadSettings) -> None:
        self.server, self.settings, self.model = server, settings, model_name(server)
        self.answers: list[Answer] = []
        self.failures: list[Failure] = []
        self.ready: set[int] = set()  # clients that had an answer, or a failure
        self.closing, self.abandoned = threading.Event(), threading.Event()

    def work(self, client: int) -> None:
        """What one client does until the crowd is closing; what it is reading it reads to the end,
        unless it is abandoned."""
        for request in count():
            if self.closing.is_set():
                return
            try:
                question = self.question(client, request)
                self.answers.append(ask(self.server, question, self.abandoned))
                self.ready.add(client)
            except Failure as failure:
                self.failures.append(failure)
                self.ready.add(client)
                self.closing.wait(failure.pause)

    def question(self, client: int, request: int) -> dict[str, Any]:
        """Random tokens to continue: never the same twice, which a server might remember.

        The clients' first questions ask for different lengths, so that they do not go in step.
        """
        wanted = self.settings
        random_ = random.Random(f"{wanted.seed} {client} {request}")
        first = -(-wanted.max_tokens * (client + 1) // wanted.clients)
        return {
            "model": self.model,
            "prompt": random_.choices(range(IDS), k=wanted.prompt_tokens),
            "max_tokens": wanted.max_tokens if request else first,
            "temperature": 1,
            "seed": random_.getrandbits(31),
        }

    def refusals(self) -> str:
        """The failures, counted by kind, with what was said first of each."""
        said = {failure.kind: str(failure) for failure in reversed(self.failures)}
        counts = Counter(failure.kind for failure in self.failures)
        return ", ".join(f"{times} x {said[kind]}" for kind, times in counts.items())


def measure(
    server: Server, settings: LoadSettings, memory: Callable[[], int] | None = None
) -> Figures:
    """The figures of a server that `settings.clients` ask; ValueError where none is answered.

    `memory` tells the server's resident bytes; what it raises ends the measurement.
    """
    crowd = Crowd(server, settings)
    samples: list[tuple[float, int]] = []
    with ThreadPoolExecutor(settings.clients) as pool:
        clients = [pool.submit(crowd.work, client) for client in range(settings.clients)]
        looks = watch(clients, memory, samples)
        try:
            begin = next(now for now in looks if len(crowd.ready) == settings.clients)
            if not crowd.answers:
                raise ValueError(f"no request was answered: {crowd.refusals()}")
            end = next(now for now in looks if now - begin >= settings.seconds)
            crowd.closing.set()
            next(now for now in looks if all(client.done() for client in clients))
        finally:
            crowd.closing.set()
            crowd.abandoned.set()
    found = figures(crowd.answers, begin, end)
    if not found["generated_tokens_per_second"]:
        why = crowd.refusals() or "none came: give it more --seconds"
        raise ValueError(f"no token within {settings.seconds:g} s: {why}")
    return {
        "clients": settings.clients,
        "prompt_tokens": settings.prompt_tokens,
        "max_tokens": settings.max_tokens,
        **found,
        "asked": len(crowd.answers) + len(crowd.failures),
        "failed": dict(Counter(failure.kind for failure in crowd.failures)),
        "memory_megabytes": memory_figures([each for now, each in samples if begin <= now <= end]),
    }


def watch(
    clients: Sequence[Future[None]],
    memory: Callable[[], int] | None,
    samples: list[tuple[float, int]],
) -> Iterator[float]:
    """The moment, again and again, each time with a new sample of the memory; raises what a client
    did not expect."""
    while True:
        time.sleep(TICK)
        for client in clients:
            if client.done():
                client.result()
        now = time.perf_counter()
        if memory is not None:
            samples.append((now, memory()))
        yield now


# -- what was found


def figures(answers: Sequence[Answer], begin: float, end: float) -> Figures:
    """What happened after `begin` until `end`, in the middle of answers or not.

    The tokens of an answer are taken to be spread evenly over its events.
    """

    def within(moment: float) -> bool:
        return begin < moment <= end

    started = [each for each in answers if within(each.arrivals[0])]
    gaps = [
        later - earlier
        for each in answers
        for earlier, later in pairwise(each.arrivals)
        if within(later)
    ]
    events = sum(within(moment) for each in answers for moment in each.arrivals)
    generated = sum(
        each.generated * sum(map(within, each.arrivals)) / len(each.arrivals) for each in answers
    )
    return {
        "seconds": end - begin,
        "answered": sum(within(each.arrivals[-1]) for each in answers),
        "prompt_tokens_per_second": sum(each.prompt for each in started) / (end - begin),
        "generated_tokens_per_second": generated / (end - begin),
        "tokens_per_event": generated / events if events else None,
        "first_token_milliseconds": percentiles(
            [each.arrivals[0] - each.started for each in started]
        ),
        "between_events_milliseconds": percentiles(gaps),
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    """In milliseconds, between the two nearest values where it falls between; None of nothing."""
    values = np.percentile(seconds, PERCENTILES).tolist() if seconds else []
    found = dict(zip(PERCENTILES, values, strict=False))
    return {f"p{each}": found[each] * 1000 if found else None for each in PERCENTILES}


def memory_figures(samples: Sequence[int]) -> dict[str, float] | None:
    """Resident megabytes: at first, in the end and at most."""
    if not samples:
        return None
    kinds = {"start": samples[0], "end": samples[-1], "peak": max(samples)}
    return {name: each / 1e6 for name, each in kinds.items()}


def render(found: Figures) -> str:
    """The figures as text, with what they mean."""
    first, between = found["first_token_milliseconds"], found["between_events_milliseconds"]
    failed = "".join(f", {count} x {kind}" for kind, count in found["failed"].items())
    speeds = [
        ("requests answered", str(found["answered"])),
        ("prompt tokens/s", three_digits(found["prompt_tokens_per_second"])),
        ("generated tokens/s", three_digits(found["generated_tokens_per_second"])),
        ("tokens per event", three_digits(found["tokens_per_event"])),
        ("failed, of all asked", f"{sum(found['failed'].values())} of {found['asked']}{failed}"),
    ]
    times = [("milliseconds", *first)] + [
        (name, *("-" if each is None else three_digits(each) for each in values.values()))
        for name, values in (("first token", first), ("between events", between))
    ]
    lines = [
        f"{found['clients']} clients for {found['seconds']:.1f} s, {found['prompt_tokens']} + "
        f"{found['max_tokens']} tokens each time",
        "",
        *columns(speeds, "<<"),
        "",
        *columns(times, "<>>>"),
    ]
    if memory := found["memory_megabytes"]:
        shown = [(name, three_digits(each)) for name, each in memory.items()]
        lines += ["", *columns([("resident megabytes", ""), *shown], "<>")]
    return "\n".join([*lines, "", LEGEND])
