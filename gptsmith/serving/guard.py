"""A guard around the application: API key, size limit, origins, headers and access records.

Knows nothing of models or of the application's responses. It is plain ASGI middleware, so that
streams pass through it event by event.
"""

import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import HUNG_UP, ApiError, refused

Headers = list[tuple[bytes, bytes]]

# Paths below these need the key, and their responses are never cached. Searched anywhere in a path,
# because a proxy may leave its own prefix before it.
GUARDED = re.compile("/(v1|classify|tokenize|detokenize|inspect)/")
MOST_LETTERS = 200  # of each text in an access record
REQUEST_ID = b"x-request-id"
SANE_ID = re.compile(rb"[\w.:/+=-]{1,128}")  # a client's own id that is returned as it is

SAFETY: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]
NOT_KEPT: Headers = [(b"cache-control", b"no-store")]


@dataclass(frozen=True, kw_only=True)
class Access:
    """A record of one request. Its texts are printable ASCII without spaces, whatever was sent."""

    client: str  # an address, or "-" if there is none
    method: str
    path: str  # percent-encoded, without its query
    status: int
    seconds: float  # from the request's arrival to the response's last byte
    bytes: int  # of the response's body


def line(access: Access) -> str:
    """Return a record as one line of an access log."""
    long = access.seconds >= 1
    took = f"{access.seconds:,.2f} s" if long else f"{1000 * access.seconds:.1f} ms"
    asked = f'{access.client} "{access.method} {access.path}"'
    return f"{asked} {access.status} {took} {access.bytes:,} bytes"


def new_request_id() -> bytes:
    """Return the value of `x-request-id` for a request that brings none."""
    return b"req_" + secrets.token_hex(12).encode()


class Guard:
    """ASGI middleware that checks requests before the application sees them.

    It refuses bodies of more than `most_bytes`, with or without a Content-Length. If there is an
    `api_key`, the API's paths need it. Pages of the `origins` may use the API from a browser.
    `seen` gets the record of each request, however it ended.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        most_bytes: int,
        origins: Sequence[str] = (),
        seen: Callable[[Access], None],
    ) -> None:
        self.app = app
        self.key = None if api_key is None else _checked_key(api_key)
        self.most_bytes = most_bytes
        self.origins, self.seen = origins, seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection. WebSockets are refused: the application has none."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = time.perf_counter()
        method, path, headers = scope["method"], _path(scope), _headers(scope)
        guarded = GUARDED.search(f"{path}/") is not None
        id = headers.get(REQUEST_ID, b"")
        own = (REQUEST_ID, id if SANE_ID.fullmatch(id) else new_request_id())
        added = [own, *SAFETY, *NOT_KEPT * guarded]
        exchange = _Exchange(scope, receive, send, self.most_bytes, added)
        try:
            refusal = self._refusal(headers, guarded)
            answer: ASGIApp = self.app if refusal is None else refusal.response()
            if self.origins:  # around the refusal, because a preflight request has no key
                answer = CORSMiddleware(
                    answer,
                    allow_origins=self.origins,
                    allow_methods=("GET", "HEAD", "POST"),
                    allow_headers=("*",),
                    expose_headers=(REQUEST_ID.decode(), "retry-after"),
                )
            asked = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}
            await answer(asked, exchange.receive, exchange.send)
        except Exception:
            exchange.failed = True
            # After a refusal the client has its response, and the application only failed because
            # the body broke off.
            if not exchange.refused:
                raise
        finally:
            self.seen(
                Access(
                    client=_plain(scope["client"][0]) if scope.get("client") else "-",
                    method=_plain(method),
                    path=_plain(path),
                    status=exchange.outcome(),
                    seconds=time.perf_counter() - begun,
                    bytes=exchange.bytes,
                )
            )

    def _refusal(self, headers: dict[bytes, bytes], guarded: bool) -> ApiError | None:
        """Return why a request is refused by its headers; None if it is not."""
        if guarded and self.key is not None and not _has_key(headers, self.key):
            problem = (
                "wrong: ask whoever runs this server for it, and"
                if b"authorization" in headers
                else "missing:"
            )
            return ApiError(
                401,
                f"the API key is {problem} send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return refused("Content-Length is not a number of bytes: send one, or omit it")
        digits = length.lstrip(b"0") or b"0"
        # Compare the numbers of digits first: Python refuses to parse thousands of digits.
        if len(digits) > len(str(self.most_bytes)) or int(digits) > self.most_bytes:
            return _too_large(self.most_bytes)
        return None


class _Exchange:
    """One request and its response: counts bytes, enforces the size limit, adds headers."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, most_bytes: int, headers: Headers
    ) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._room = most_bytes
        self._most_bytes = most_bytes
        self._headers = headers
        self._status = 0  # until a response begins
        self._whole = False
        self._hung_up = False
        self.refused = False
        self.failed = False
        self.bytes = 0

    def outcome(self) -> int:
        """Return the status that was sent, or the one that describes what happened instead."""
        if self._hung_up:
            return HUNG_UP
        failed = self.failed and not self._whole
        return 500 if failed or not self._status else self._status

    async def receive(self) -> Message:
        """Receive the next part of the body; one that is too large ends as if the client had
        disconnected, after a 413 if no response has begun."""
        if self._room < 0:
            return {"type": "http.disconnect"}
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._hung_up = not self._whole  # servers also send it after a complete response
            return message
        self._room -= len(message.get("body", b""))
        if self._room >= 0:
            return message
        if not self._status:  # a response that has begun may end by itself
            await _too_large(self._most_bytes).response()(self._scope, self.receive, self.send)
            self.refused = True
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Send a part of the response, with the security headers."""
        if self.refused:
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            headers = list(message.get("headers", []))
            given = {bytes(name).lower() for name, _ in headers}
            headers += [(name, value) for name, value in self._headers if name not in given]
            message = {**message, "headers": headers}
        elif message["type"] == "http.response.body" and not self._hung_up:
            if self._scope["method"] == "HEAD":  # answered like GET, without the body
                message = {**message, "body": b""}
            self.bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
        await self._send(message)


def _too_large(most_bytes: int) -> ApiError:
    message = f"the body is larger than {most_bytes:,} bytes: send less at once"
    return ApiError(413, message, code="body_too_large")


def _path(scope: Scope) -> str:
    """Return the path, without the scheme and host that an absolute-form target has before it."""
    target = re.match("[A-Za-z][A-Za-z0-9+.-]*://[^/]*(.*)", scope["path"], re.DOTALL)
    return scope["path"] if target is None else target[1] or "/"


def _headers(scope: Scope) -> dict[bytes, bytes]:
    return {bytes(name).lower(): bytes(value).strip() for name, value in scope["headers"]}


def _checked_key(key: str) -> bytes:
    key = key.strip()
    if not key or not key.isprintable() or " " in key:
        raise ValueError(
            "the API key is empty or contains spaces or control characters, which clients cannot "
            "send: give one word, or no key"
        )
    return key.encode()


def _has_key(headers: dict[bytes, bytes], key: bytes) -> bool:
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key)


def _plain(text: str) -> str:
    """Percent-encode a text, so that it cannot move the cursor or begin a new line in a log."""
    quoted = quote(text[:MOST_LETTERS], safe="/:@!$&'()*+,;=", errors="replace")
    return quoted[:MOST_LETTERS]
