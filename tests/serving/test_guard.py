"""The guard: what it keeps out, what it lets through untouched, and what it says of both."""

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptsmith.serving.guard import Access, Guard, line
from tests.conftest import until

MOST_BYTES = 10
HUNG_UP: Message = {"type": "http.disconnect"}


@dataclass
class Told:
    """Everything that came out of one request."""

    messages: list[Message] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return self.messages[0]["headers"]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


def parts(*bodies: bytes) -> list[Message]:
    last = len(bodies) - 1
    return [
        {"type": "http.request", "body": body, "more_body": number < last}
        for number, body in enumerate(bodies)
    ]


def ask(
    app: ASGIApp,
    given: Sequence[Message] = (),
    *,
    path: str = "/health",
    headers: Sequence[tuple[bytes, bytes]] = (),
    key: str | None = None,
    origins: Sequence[str] = (),
    **rest: Any,
) -> Told:
    """One request, without any server; after what is given, the client waits for ever."""
    told = Told()
    waiting = list(given)

    async def receive() -> Message:
        if waiting:
            return waiting.pop(0)
        return await asyncio.Future()

    async def send(message: Message) -> None:
        told.messages.append(message)

    guard = Guard(
        app, api_key=key, most_bytes=MOST_BYTES, origins=origins, seen=told.accesses.append
    )
    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers)}
    scope |= {"client": ("10.1.2.3", 4567), **rest}
    try:
        asyncio.run(asyncio.wait_for(guard(scope, receive, send), 5))
    finally:
        assert len(told.accesses) == 1
    return told


class Echo:
    """Answers what it was sent, and remembers what it saw."""

    def __init__(self, *, begin_first: bool = False, stumble: bool = False) -> None:
        self.begin_first, self.stumble = begin_first, stumble
        self.seen = b""
        self.cut = self.called = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.called = True
        start = {"type": "http.response.start", "status": 201, "headers": [(b"x-own", b"1")]}
        if self.begin_first:
            await send(start)
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.cut = True
                if self.stumble:
                    raise OSError("the client is gone")
                break
            self.seen += message["body"]
            more = message["more_body"]
        if not self.begin_first:
            await send(start)
        await send({"type": "http.response.body", "body": self.seen})


def test_a_body_is_refused_by_its_announced_length_before_it_is_read() -> None:
    app = Echo()
    told = ask(app, headers=[(b"Content-Length", b"11")])
    assert (told.status, app.called) == (413, False)
    assert told.error["message"] == "the body is larger than 10 bytes: send less at once"
    assert told.error["type"] == "invalid_request_error"
    assert set(told.error) == {"message", "type", "param", "code"}
    assert told.accesses[0].status == 413

    assert ask(app, parts(b"x" * 10), headers=[(b"content-length", b"0010")]).status == 201


@pytest.mark.parametrize("length", [b"abc", b"-1", b"+5", b"1_0", b"1.0", b"", b"\xb2", b"5, 5"])
def test_a_length_that_is_no_number_is_refused(length: bytes) -> None:
    app = Echo()
    told = ask(app, headers=[(b"content-length", length)])
    assert (told.status, app.called) == (400, False)
    assert "Content-Length" in told.error["message"]


def test_a_length_of_thousands_of_digits_is_too_large_and_nothing_worse() -> None:
    assert ask(Echo(), headers=[(b"content-length", b"9" * 50_000)]).status == 413


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_a_body_without_a_length_is_counted(bodies: list[bytes], stumble: bool, lies: bool) -> None:
    """An announced length that is too small changes nothing."""
    app = Echo(stumble=stumble)
    whole = b"".join(bodies)
    told = ask(app, parts(*bodies), headers=[(b"content-length", b"1")] * lies)
    assert len(app.seen) <= MOST_BYTES
    assert whole.startswith(app.seen)
    if len(whole) <= MOST_BYTES:
        assert (told.status, told.body, app.cut) == (201, whole, False)
    else:
        assert (told.status, told.error["code"], app.cut) == (413, "body_too_large", True)
    assert told.accesses[0].status == told.status
    assert told.accesses[0].bytes == len(told.body)
    starts = [m for m in told.messages if m["type"] == "http.response.start"]
    assert len(starts) == 1


def test_an_answer_that_has_begun_is_not_replaced() -> None:
    app = Echo(begin_first=True)
    told = ask(app, parts(b"x" * 6, b"y" * 6))
    assert app.cut
    assert app.seen == b"x" * 6
    assert [m["type"] for m in told.messages].count("http.response.start") == 1
    assert told.status == told.accesses[0].status == 201
    assert told.body == app.seen
    with pytest.raises(OSError, match="the client is gone"):
        ask(Echo(begin_first=True, stumble=True), parts(b"x" * 6, b"y" * 6))


@pytest.mark.parametrize(
    ("key", "sent", "status"),
    [
        ("sesam", None, 401),
        ("sesam", b"", 401),
        ("sesam", b"sesam", 401),
        ("sesam", b"Bearer", 401),
        ("sesam", b"Bearer ", 401),
        ("sesam", b"Bearer sesa", 401),
        ("sesam", b"Bearer sesamo", 401),
        ("sesam", b"Bearer Sesam", 401),
        ("sesam", b"Basic sesam", 401),
        ("sesam", b"sesam sesam", 401),
        ("sesam", "Bearer schlüssel".encode(), 401),
        ("sesam", b"Bearer \xff\xfe", 401),
        ("schlüssel", b"Bearer sesam", 401),
        ("sesam", b"Bearer sesam", 201),
        ("sesam", b"bearer  sesam ", 201),
        ("schlüssel", "Bearer schlüssel".encode(), 201),
        (None, None, 201),
        (None, b"Bearer anything", 201),
    ],
)
def test_what_lies_under_v1_needs_the_key(key: str | None, sent: bytes | None, status: int) -> None:
    app = Echo()
    headers = [] if sent is None else [(b"Authorization", sent)]
    told = ask(app, parts(b""), path="/v1/completions", headers=headers, key=key)
    assert (told.status, app.called) == (status, status == 201)
    if status == 401:
        assert (b"www-authenticate", b"Bearer") in told.headers
        assert told.error["code"] == "invalid_api_key"
        assert key not in told.error["message"]
        assert ("API key is missing" in told.error["message"]) == (sent is None)
    assert ask(Echo(), parts(b""), path="/health", headers=headers, key=key).status == 201


pieces = st.sampled_from(["/", "v1", "V1", "secret", "..", ".", "pre", "%2f", "//", "\n", "", ";x"])


@given(st.lists(pieces, max_size=6), st.sampled_from(["", "/pre", "/v1", "/pre/v1", "/"]))
def test_no_way_of_writing_a_path_leads_past_the_key(written: list[str], root: str) -> None:
    """Whatever FastAPI finds under /v1, the guard has found too; and the key leads there."""
    reached: list[str] = []
    inner, outer = (FastAPI(docs_url=None, redoc_url=None, openapi_url=None) for _ in range(2))

    @inner.get("/v1/secret")
    @inner.get("/v1/{name:path}")
    async def secret(request: Request) -> str:
        reached.append(request.url.path)
        return "told"

    outer.mount("/pre", inner)
    rest: dict[str, Any] = {"method": "GET", "root_path": root, "query_string": b"", "key": "sesam"}
    path = "".join(written)
    for app in (inner, outer):
        for tried in (f"/{path}", f"{root}/{path}", f"{root}/pre/{path}", f"{root}/v1/{path}"):
            ask(app, path=tried, **rest)
            assert not reached
    ask(inner, path=f"{root}/v1/secret", headers=[(b"authorization", b"Bearer sesam")], **rest)
    assert len(reached) == 1


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/pre/tokenize", "/v1"])
def test_what_shows_the_model_needs_the_key(path: str) -> None:
    for app, headers, status in (
        (Echo(), [], 401),
        (Echo(), [(b"authorization", b"Bearer sesam")], 201),
    ):
        told = ask(app, parts(b""), path=path, headers=headers, key="sesam")
        assert (told.status, app.called) == (status, status == 201)
        assert (b"cache-control", b"no-store") in told.headers
    assert ask(Echo(), parts(b""), path="/tokenizer", key="sesam").status == 201


@pytest.mark.parametrize(
    ("target", "path", "guarded"),
    [
        ("http://host/health", "/health", False),
        ("HTTPS://user@host:80/v1/models", "/v1/models", True),
        ("http://host", "/", False),
        ("http://[::1]:80//v1/x", "//v1/x", True),
        ("/http://host/health", "/http://host/health", False),
        ("http://v1/models", "/models", False),
        ("http://a\n/v1/x\n", "/v1/x\n", True),
        ("*", "*", False),
        ("host:443", "host:443", False),
    ],
)
def test_a_target_with_its_host_is_its_path(target: str, path: str, guarded: bool) -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["path"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    told = ask(app, path=target, key="sesam")
    assert told.status == (401 if guarded else 200)
    assert seen == ([] if guarded else [path])
    assert ask(app, path=target).status == 200
    assert seen[-1] == path


def test_every_answer_has_an_id() -> None:
    for told in (
        ask(Echo(), parts(b"")),
        ask(Echo(), parts(b"x" * 11)),
        ask(Echo(), headers=[(b"content-length", b"99")]),
        ask(Echo(), path="/v1/models", key="sesam"),
    ):
        (id,) = (value for name, value in told.headers if name == b"x-request-id")
        assert len(id) == 28
    given = [(b"X-Request-ID", b"mine")]
    assert (b"x-request-id", b"mine") in ask(Echo(), parts(b""), headers=given).headers


ORIGIN = b"https://app.example"


def from_page(*more: tuple[bytes, bytes], origin: bytes = ORIGIN) -> list[tuple[bytes, bytes]]:
    return [(b"origin", origin), *more]


PREFLIGHT = (
    (b"access-control-request-method", b"POST"),
    (b"access-control-request-headers", b"authorization,content-type,x-stainless-os"),
)


@pytest.mark.parametrize("allowed", [ORIGIN.decode(), "*"])
def test_a_page_of_an_origin_that_may_can_read_every_answer(allowed: str) -> None:
    how: dict[str, Any] = {"path": "/v1/completions", "key": "sesam", "origins": (allowed, "x://y")}
    app = Echo()
    asked = ask(app, headers=from_page(*PREFLIGHT), method="OPTIONS", **how)
    assert (asked.status, app.called) == (200, False), "a preflight request has no key"
    said = {name: value.decode() for name, value in asked.headers}
    assert said[b"access-control-allow-origin"] == allowed
    assert "POST" in said[b"access-control-allow-methods"]
    assert said[b"access-control-allow-headers"] == PREFLIGHT[1][1].decode()
    assert b"x-request-id" in said
    key = (b"authorization", b"Bearer sesam")
    for headers, status in ((from_page(key), 201), (from_page(), 401)):
        told = ask(Echo(), parts(b""), headers=headers, **how)
        assert told.status == status
        said = {name: value.decode() for name, value in told.headers}
        assert said[b"access-control-allow-origin"] == allowed
        assert "x-request-id" in said[b"access-control-expose-headers"]
        assert b"access-control-allow-credentials" not in said
    too_large = ask(Echo(), headers=from_page(key, (b"content-length", b"99")), **how)
    assert too_large.status == 413
    assert b"access-control-allow-origin" in dict(too_large.headers)


def test_a_page_of_another_origin_can_read_nothing() -> None:
    other = b"https://app.example.evil"
    for headers, method, status in (
        (from_page(*PREFLIGHT, origin=other), "OPTIONS", 400),
        (from_page(origin=other), "POST", 201),
        ([], "POST", 201),
    ):
        told = ask(Echo(), parts(b""), headers=headers, method=method, origins=(ORIGIN.decode(),))
        assert told.status == status
        assert b"access-control-allow-origin" not in dict(told.headers)


@pytest.mark.parametrize("key", ["", " ", "two words", "tab\tbed", "bell\a", "new\nline"])
def test_a_key_that_no_client_can_send_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="the API key is empty or contains spaces"):
        Guard(Echo(), api_key=key, most_bytes=1, seen=lambda access: None)


def test_every_answer_has_the_headers_and_none_twice() -> None:
    async def own(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"Cache-Control", b"max-age=5"), (b"X-Frame-Options", b"SAMEORIGIN")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    answers = [
        ask(Echo(), parts(b""), path="/v1/models"),
        ask(Echo(), path="/v1/models", key="sesam"),
        ask(Echo(), headers=[(b"content-length", b"99")], path="/v1/models"),
        ask(own, path="/v1/models"),
    ]
    for told in answers:
        names = [name.lower() for name, _ in told.headers]
        assert len(names) == len(set(names))
        assert {b"x-content-type-options", b"referrer-policy", b"cache-control"} <= set(names)
        assert not [name for name in names if name.startswith(b"access-control")]
    assert (b"cache-control", b"no-store") in answers[0].headers
    assert (b"x-frame-options", b"DENY") in answers[0].headers
    assert (b"Cache-Control", b"max-age=5") in answers[3].headers
    assert b"cache-control" not in dict(ask(Echo(), parts(b""), path="/docs").headers)


def test_a_stream_passes_piece_by_piece() -> None:
    """The next piece is made only when the one before has arrived."""
    arrived: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            body = b"%d" % number
            await send({"type": "http.response.body", "body": body, "more_body": True})
            assert arrived[-1] == body
        await send({"type": "http.response.body"})

    async def send(message: Message) -> None:
        arrived.append(message.get("body", b""))

    async def receive() -> Message:
        return await asyncio.Future()

    guard = Guard(app, api_key=None, most_bytes=1, seen=lambda access: None)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(guard(scope, receive, send))
    assert arrived == [b"", b"0", b"1", b"2", b""]


def answers(*messages: Message, listens: bool = False, fails: bool = False) -> ASGIApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        if listens:
            await receive()
        if fails:
            raise RuntimeError("a mistake")

    return app


START: Message = {"type": "http.response.start", "status": 200, "headers": []}
PIECE: Message = {"type": "http.response.body", "body": b"piece", "more_body": True}
END: Message = {"type": "http.response.body", "body": b"end"}


def test_a_client_that_hung_up_is_told_of_as_nginx_does() -> None:
    assert ask(answers(listens=True), [HUNG_UP]).accesses[0].status == 499
    began = ask(answers(START, PIECE, listens=True), [HUNG_UP]).accesses[0]
    assert (began.status, began.bytes) == (499, 5)
    whole = ask(answers(START, PIECE, END, listens=True), [HUNG_UP]).accesses[0]
    assert (whole.status, whole.bytes) == (200, 8)


def test_an_application_that_fails_is_told_of_and_not_hushed_up() -> None:
    for messages, status in (((), 500), ((START, PIECE), 500), ((START, END), 200)):
        told: list[Access] = []
        guard = Guard(answers(*messages, fails=True), api_key=None, most_bytes=1, seen=told.append)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": None}

        async def ignore(message: Message) -> None: ...

        with pytest.raises(RuntimeError, match="a mistake"):
            asyncio.run(guard(scope, None, ignore))  # type: ignore[arg-type]
        assert [access.status for access in told] == [status]
        assert told[0].client == "-"


def test_a_request_that_is_cancelled_is_told_of() -> None:
    told: list[Access] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(60)

    async def start_and_cancel() -> None:
        guard = Guard(app, api_key=None, most_bytes=1, seen=told.append)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        running = asyncio.ensure_future(guard(scope, None, None))  # type: ignore[arg-type]
        await asyncio.sleep(0.02)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(start_and_cancel())
    assert [access.status for access in told] == [500]
    assert 0.01 < told[0].seconds < 10


def test_the_line_of_a_log() -> None:
    access = Access(
        client="127.0.0.1",
        method="POST",
        path="/v1/completions",
        status=200,
        seconds=1.2431,
        bytes=3214,
    )
    assert line(access) == '127.0.0.1 "POST /v1/completions" 200 1.24 s 3,214 bytes'
    told = ask(Echo(), parts(b"abc"), path='/a b\n\x1b[31m"é', method="GET")
    shown = line(told.accesses[0])
    assert shown.startswith('10.1.2.3 "GET /a%20b%0A%1B%5B31m%22%C3%A9" 201 ')
    assert shown.endswith(" ms 3 bytes")
    assert float(shown.split()[-4]) < 1000


anything = st.text(st.characters(codec=None), max_size=300)


@given(anything, anything, anything)
def test_no_request_writes_its_own_line(path: str, method: str, client: str) -> None:
    told = ask(Echo(), parts(b""), path=path, method=method, client=(client, 1))
    shown = line(told.accesses[0])
    assert shown.isascii()
    assert shown.isprintable()
    assert shown.count('"') == 2
    assert len(shown) < 700


def test_other_scopes() -> None:
    sent: list[Message] = []
    called: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        called.append(scope["type"])

    async def send(message: Message) -> None:
        sent.append(message)

    guard = Guard(app, api_key="sesam", most_bytes=1, seen=lambda access: None)
    for kind in ("lifespan", "websocket"):
        scope = {"type": kind, "path": "/v1/realtime", "headers": []}
        asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
    assert called == ["lifespan"]
    assert [message["type"] for message in sent] == ["websocket.close"]


@contextmanager
def served(app: ASGIApp, http_by: Any, seen: Callable[[Access], None]) -> Iterator[int]:
    """A real server in a thread, and its port."""
    guard = Guard(app, api_key=None, most_bytes=100_000, seen=seen)
    config = uvicorn.Config(guard, http=http_by, log_level="critical", access_log=False)
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(120)
        assert not thread.is_alive()


@pytest.mark.parametrize("http_by", ["h11", "auto"])
def test_behind_a_real_server(http_by: str) -> None:
    """Large bodies, lengths that are none, and a client that leaves, over real sockets."""
    told: list[Access] = []
    inner = FastAPI()
    asked, left = threading.Event(), threading.Event()

    @inner.post("/size")
    async def size(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(len(await request.body())))

    @inner.get("/wait")
    async def wait(request: Request) -> None:
        asked.set()
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        left.set()

    with served(inner, http_by, told.append) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        # One connection throughout: what is left of a refused body is no request of its own.
        for count, chunked, status in (
            (100_000, False, 200),
            (3_000_000, False, 413),
            (3_000_000, True, 413),
            (100_000, True, 200),
        ):
            pieces = iter([b"x" * 50_000] * (count // 50_000))
            headers = {} if chunked else {"Content-Length": str(count)}
            connection.request("POST", "/size", pieces, headers, encode_chunked=chunked)
            answer = connection.getresponse()
            body = answer.read()
            assert answer.status == status
            assert body == b"100000" if status == 200 else b"larger than 100,000 bytes" in body

        with socket.create_connection(("127.0.0.1", port), timeout=120) as raw:
            raw.sendall(b"POST /size HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n")
            assert raw.recv(100).startswith(b"HTTP/1.1 400")

        with socket.create_connection(("127.0.0.1", port), timeout=120) as raw:
            raw.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
            assert asked.wait(120)
        assert left.wait(120)
        until(lambda: told[-1].path == "/wait")
        assert told[-1].status == 499
        connection.close()
    assert [access.status for access in told[:4]] == [200, 413, 413, 200]
