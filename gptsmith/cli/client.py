"""One question to a server, and the moment of each piece of its answer.

Knows HTTP, server-sent events and the completions of OpenAI's API; nothing of what answers there.

It blocks its thread, on a connection of Python's own. With 64 streams open that took about 50
microseconds of the processor, which is the server's too, for each event, where httpx took two to
four times as much; and nothing tried was nearer to the moment of an arrival.
"""

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

SILENCE = 60.0  # seconds without a byte after which a request has failed
PAUSE = 1.0  # seconds until one should ask again, after a failure that names no time


class Failure(ValueError):
    """A request that brought no whole answer: of which kind, what was said, and when to go on."""

    def __init__(self, kind: str, said: str = "", pause: float = PAUSE) -> None:
        super().__init__(f"{kind}: {said}" if said else kind)
        self.kind, self.pause = kind, pause


@dataclass(frozen=True)
class Server:
    """Where to ask: http://host:port, with what may stand before /v1, and the key if one is
    needed."""

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
    """The moment and the JSON of each event of a stream; Failure where it does not end with
    [DONE]."""
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
