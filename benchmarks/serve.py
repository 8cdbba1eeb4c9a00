"""How well a server keeps many clients busy: tokens per second, waiting times, memory.

    python benchmarks/serve.py MODEL --clients 64 --seconds 60       served for as long
    python benchmarks/serve.py MODEL -- --dtype bf16 --slots 64      with flags of gptsmith serve
    python benchmarks/serve.py http://127.0.0.1:8000                 any server of OpenAI's API

Each client asks for a completion of random tokens, reads the stream and asks again. What is
measured begins when every client has been answered once, so that all are busy all the time.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from http.client import HTTPConnection, HTTPException, HTTPResponse
from itertools import count, pairwise
from typing import IO, Any
from urllib.parse import urlsplit

import numpy as np
import psutil
from results import Results, carry_out, parser

from gptsmith.checkpoint.finding import find_model
from gptsmith.checkpoint.folder import read_config
from gptsmith.config.tables import columns, three_digits
from gptsmith.machine.environment import api_key

Figures = dict[str, Any]

SILENCE = 60.0  # seconds without a byte after which a request has failed
PAUSE = 1.0  # seconds until a client asks again, after a failure that names no time
STARTING, ENDING = 600.0, 10.0  # seconds that a server may take to load its model, and to go
IDS = 32  # prompts are of the ids below this, which every vocabulary has
TICK = 0.1  # seconds between looks at the clients and at the server's memory
PERCENTILES = (50, 95, 99)
LEGEND = """
first token: from before connecting to the first event; an event is a piece of a stream"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the server is asked for while it is measured."""

    clients: int = 8
    seconds: float = 20.0
    prompt_tokens: int = 32
    max_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clients", "prompt_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}: above 0 is needed")


# -- one question
#
# Each client blocks a thread of its own on a connection of Python's own. With 64 streams open that
# took about 50 microseconds of the processor for each event, where httpx took two to four times as
# much; the processor is the server's too, and nothing tried was nearer to the moment of an arrival.


class Failure(ValueError):
    """A request that brought no whole answer: of which kind, what was said, and when to go on."""

    def __init__(self, kind: str, said: str = "", pause: float = PAUSE) -> None:
        super().__init__(f"{kind}: {said}" if said else kind)
        self.kind, self.pause = kind, pause


@dataclass(frozen=True)
class Server:
    """Where to ask: http://host:port, what may stand before /v1, and the key if one is needed."""

    host: str
    port: int
    path: str = ""
    key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, address: str, key: str | None = None) -> "Server":
        """The server at an address, with or without /v1 at its end; ValueError if it is none."""
        parts = urlsplit(address)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{address} is no address of plain HTTP, as http://127.0.0.1:8000 is")
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or 80, path, key)

    def __str__(self) -> str:
        return f"http://{self.host}:{self.port}{self.path}"


@dataclass(frozen=True)
class Answer:
    """A whole answer; moments are seconds by time.perf_counter."""

    started: float
    arrivals: Sequence[float]  # of the events that brought text, or of the last if none did
    prompt: int  # tokens, as the server counts them
    generated: int


@contextmanager
def answered(
    server: Server, path: str, question: dict[str, Any] | None = None
) -> Iterator[HTTPResponse]:
    """The answer to a GET, or to a POST of a question, to be read; Failure where that goes wrong.

    Each has a connection of its own, as a client that comes for the first time.
    """
    headers = {} if server.key is None else {"Authorization": f"Bearer {server.key}"}
    body = None if question is None else json.dumps(question)
    if body is not None:
        headers["Content-Type"] = "application/json"
    connection = HTTPConnection(server.host, server.port, timeout=SILENCE)
    try:
        connection.request("GET" if body is None else "POST", server.path + path, body, headers)
        response = connection.getresponse()
        if response.status != 200:
            raise refusal(response)
        yield response
    except Failure:
        raise
    except TimeoutError:
        raise Failure(f"nothing came for {SILENCE:g} s") from None
    except ConnectionRefusedError:
        raise Failure("nobody listens") from None
    except (OSError, HTTPException) as error:
        raise Failure("the connection broke", str(error) or type(error).__name__) from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Failure("an answer that is not of OpenAI's form", repr(error)) from None
    finally:
        connection.close()


def refusal(response: HTTPResponse) -> Failure:
    """What a status other than 200 says, in OpenAI's form if it has that."""
    try:
        error = json.loads(response.read())["error"]
        name, said = error.get("code") or error.get("type") or "", error.get("message") or ""
    except (ValueError, LookupError, TypeError, AttributeError):
        name, said = response.reason, ""
    wait = response.headers.get("Retry-After", "")
    pause = float(wait) if wait.isdecimal() else PAUSE  # it may be a date, too
    return Failure(f"HTTP {response.status} {name}".rstrip(), said, pause)


def events(response: HTTPResponse) -> Iterator[tuple[float, dict[str, Any]]]:
    """The moment and the JSON of each event of a stream; Failure where [DONE] is not its end."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        arrived, data = time.perf_counter(), line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if error := event.get("error"):
            raise Failure("an error within a stream", str(error.get("message")))
        yield arrived, event
    raise Failure("a stream ended without [DONE]")


def ask(server: Server, question: dict[str, Any], abandoned: threading.Event) -> Answer:
    """A question's answer, read as a stream; Failure where there is none."""
    started, arrivals, last, usage = time.perf_counter(), [], 0.0, None
    question = question | {"stream": True, "stream_options": {"include_usage": True}}
    with answered(server, "/v1/completions", question) as response:
        for arrived, event in events(response):
            if abandoned.is_set():
                raise Failure("abandoned")
            usage = event.get("usage") or usage
            last = arrived if event.get("choices") else last or arrived
            if any(choice.get("text") for choice in event.get("choices") or ()):
                arrivals.append(arrived)
        if usage is None:
            raise Failure("a stream without usage", "its tokens cannot be counted")
        counted = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    return Answer(started, arrivals or [last], *counted)


def model_name(server: Server) -> str:
    """The first model that the server has; ValueError where it tells none."""
    try:
        with answered(server, "/v1/models") as response:
            return str(json.loads(response.read())["data"][0]["id"])
    except Failure as failure:
        raise ValueError(f"{server}/v1/models: {failure}") from None


# -- many clients


class Crowd:
    """Clients that each ask, read the answer and ask again, and what became of it."""

    def __init__(
        self, server: Server, load: Load, keep: Callable[[Figures], None] = lambda row: None
    ) -> None:
        self.server, self.load, self.keep, self.model = server, load, keep, model_name(server)
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
                answer = ask(self.server, self.question(client, request), self.abandoned)
                self.answers.append(answer)
                self.ready.add(client)
                first, last = answer.arrivals[0], answer.arrivals[-1]
                seconds = {"started": answer.started, "first": first, "last": last}
                tokens = {"prompt_tokens": answer.prompt, "new_tokens": answer.generated}
                self.keep({"client": client, **seconds, **tokens})
            except Failure as failure:
                self.failures.append(failure)
                self.ready.add(client)
                self.keep({"client": client, "failed": str(failure)})
                self.closing.wait(failure.pause)

    def question(self, client: int, request: int) -> dict[str, Any]:
        """Random tokens to continue: never the same twice, which a server might remember.

        The clients' first questions ask for different lengths, so that they do not go in step.
        """
        wanted = self.load
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
    server: Server,
    load: Load,
    memory: Callable[[], int] | None = None,
    keep: Callable[[Figures], None] = lambda row: None,
) -> Figures:
    """The figures of a server under a load; ValueError where no client is answered.

    `memory` tells the server's resident bytes; what it raises ends the measurement. `keep` gets
    each answer and failure. Ctrl-C ends the time early: nothing more is asked, and what is being
    read is read to its end.
    """
    crowd, begin, end, interrupted = Crowd(server, load, keep), 0.0, 0.0, False
    samples: list[tuple[float, int]] = []
    with ThreadPoolExecutor(load.clients) as pool:
        clients = [pool.submit(crowd.work, client) for client in range(load.clients)]
        looks = watch(clients, memory, samples)
        try:
            begin = next(now for now in looks if len(crowd.ready) == load.clients)
            if not crowd.answers:
                raise ValueError(f"no request was answered: {crowd.refusals()}")
            end = next(now for now in looks if now - begin >= load.seconds)
            crowd.closing.set()
            next(now for now in looks if all(client.done() for client in clients))
        except KeyboardInterrupt:
            if not begin:
                raise
            interrupted, end = True, end or time.perf_counter()
            crowd.closing.set()
            wait(clients)
        finally:
            crowd.closing.set()
            crowd.abandoned.set()
    found = figures(crowd.answers, begin, end)
    if not found["generated_tokens_per_second"]:
        why = crowd.refusals() or "none came: give it more --seconds"
        raise ValueError(f"no token within {load.seconds:g} s: {why}")
    return {
        "interrupted": interrupted,
        "clients": load.clients,
        "prompt_tokens": load.prompt_tokens,
        "max_tokens": load.max_tokens,
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
    """The time now and again, for as long as nothing unexpected happens to a client or server."""
    while True:
        time.sleep(TICK)
        now = time.perf_counter()
        if memory is not None:
            samples.append((now, memory()))
        for client in clients:
            if client.done():
                client.result()  # raises what no client expects
        yield now


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
    return "\n".join([*lines, LEGEND])


# -- a server of our own


@contextmanager
def served(words: Sequence[str]) -> Iterator[tuple[str, Callable[[], int]]]:
    """The address that a server started by these words tells, and what gives its resident bytes.

    It is ended in every case; ValueError with its last line where it ends by itself.
    """
    # Appended to, so that our reading does not move the place where the server writes.
    with tempfile.TemporaryFile("a+", encoding="utf-8", errors="replace") as said:
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        process = psutil.Process(child.pid)

        def memory() -> int:
            check_running(child, said)
            return process.memory_info().rss

        try:
            yield wait_until_ready(child, said), memory
        finally:
            child.terminate()
            try:
                child.wait(ENDING)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def check_running(child: subprocess.Popen[bytes], said: IO[str]) -> None:
    """ValueError with the last line that a server said, where it has ended."""
    if child.poll() is not None:
        said.seek(0)
        lines = said.read().strip().splitlines() or [f"with status {child.returncode}"]
        raise ValueError(f"the server ended: {lines[-1].removeprefix('gptsmith: ')}")


def wait_until_ready(child: subprocess.Popen[bytes], said: IO[str]) -> str:
    """The address that a server tells once it is ready."""
    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        check_running(child, said)
        said.seek(0)
        if address := re.search(r"(http://[\w.:]+)\s", said.read()):
            return address[1]
        time.sleep(TICK)
    raise ValueError(f"the server was not ready within {STARTING:g} s")


# -- the program


def fitted(model: str, load: Load, asked: dict[str, Any]) -> Load:
    """The load with prompt and new tokens as asked for, or as the model's context holds them."""
    from gptsmith.cli.timing import fitting

    names = ("prompt_tokens", "max_tokens")
    found = fitting(read_config(find_model(model)), *(asked.get(name) for name in names))
    return replace(load, **dict(zip(names, found, strict=True)))


def main() -> None:
    """Measure a server at an address, or serve a model and measure that."""
    words, known = sys.argv[1:], parser(__doc__)
    end = words.index("--") if "--" in words else len(words)
    words, flags = words[:end], words[end + 1 :]
    known.add_argument("model", metavar="MODEL|URL", help="what is served, or is asked")
    known.add_argument("--clients", type=int, metavar="N", help="that ask at once (default: 8)")
    known.add_argument("--seconds", type=float, metavar="X", help="measured (default: 20)")
    known.add_argument("--prompt-tokens", type=int, metavar="N", help="of each (default: 32)")
    known.add_argument("--max-tokens", type=int, metavar="N", help="of each answer (default: 128)")
    known.add_argument("--seed", type=int, metavar="S", help="random seed for prompts and sampling")
    known.add_argument("--api-key", metavar="KEY", help="default: GPTSMITH_API_KEY")
    options = known.parse_args(words)
    names = {each.name for each in fields(Load)}
    asked = {name: value for name, value in vars(options).items() if name in names}
    asked = {name: value for name, value in asked.items() if value is not None}
    load, key, results = Load(**asked), options.api_key or api_key(), Results(options.out)
    if "://" in options.model:
        if flags:
            raise ValueError(f"{flags[0]} is for gptsmith serve, but that server runs already")
        found = measure(Server.at(options.model, key), load, keep=results.add)
    else:
        load = fitted(options.model, load, asked)
        flags += ["--api-key", options.api_key] if options.api_key else []
        with served(command(options.model, flags)) as (address, memory):
            found = measure(Server.at(address, key), load, memory, results.add)
    results.add({"model": options.model, **found})
    print(f"serve: {options.model}\n{render(found)}")
    if found["interrupted"]:
        raise KeyboardInterrupt


def command(model: str, flags: Sequence[str]) -> list[str]:
    """The command line that serves a model at a free port of this machine."""
    place = ("--host", "127.0.0.1", "--port", "0")
    return [sys.executable, "-m", "gptsmith", "serve", model, *place, *flags]


if __name__ == "__main__":
    carry_out(main)
