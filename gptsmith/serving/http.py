"""Run an application as a server: bind an address, limit slow clients, shut down gracefully.

Knows nothing of what the application does.
"""

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import refused
from .guard import REQUEST_ID, new_request_id

KEEP_ALIVE = 75  # seconds; longer than clients keep an idle connection
PATIENCE = 60.0  # seconds for a request to arrive, and for a client to read more of a response


def listen(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; ValueError if that is impossible."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        # On Windows, SO_REUSEADDR would let two servers have one port.
        alone = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        try:
            bound.setsockopt(socket.SOL_SOCKET, alone, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except socket.gaierror as error:
        raise ValueError(
            f"no host '{host}': a name or address of this machine is needed, as 127.0.0.1"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise taken(host, port) from error
        raise ValueError(
            f"{host}, port {port}, cannot be used: {error.strerror}; "
            "choose another --host or --port"
        ) from error
    return bound


def taken(host: str, port: int) -> ValueError:
    """Return the error for an address that is in use."""
    return ValueError(f"port {port} of {host} is taken: choose another --port, or 0 for a free one")


class UnixSocket(socket.socket):
    """A socket at a path, which is removed when the socket is closed."""

    def close(self) -> None:
        """Remove the path and close the socket."""
        if self.fileno() != -1:
            Path(self.getsockname()).unlink(missing_ok=True)
        super().close()


def listen_at(path: Path) -> socket.socket:
    """Return a socket at a path, which only its owner can open; ValueError if that is impossible.

    It listens at once: another server that is given the same path can tell it from one that was
    left behind by a killed server, which it replaces.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise ValueError(f"cannot listen at {path}: Windows has no sockets at paths; use --port")
    bound, trial = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    try:
        with trial:
            if path.is_socket() and trial.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()
        bound.bind(str(path))
        path.chmod(0o600)
        bound.listen()
    except OSError as error:
        bound.close()
        problem = error.strerror or str(error)
        if error.errno == errno.EADDRINUSE:
            problem = "another server listens there" if path.is_socket() else "it is not a socket"
        raise ValueError(f"cannot listen at {path}: {problem}; choose another path") from error
    return UnixSocket(fileno=bound.detach())


def url(bound: socket.socket) -> str:
    """Return the URL of a socket, or its path."""
    if isinstance(bound.getsockname(), str):
        return f"unix:{bound.getsockname()}"
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """A connection that is closed if its client stalls in a request or in reading a response.

    Of uvicorn's two HTTP protocols, this is the one that limits the size of the headers and speaks
    HTTP/1.0. It costs a few microseconds more per event of a stream.
    """

    request_timer: asyncio.TimerHandle | None = None  # runs until the next request has arrived
    reading_timer: asyncio.TimerHandle | None = None  # runs while the client reads nothing

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start waiting for a request."""
        super().connection_made(transport)
        self.wait_for_request()

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request, or several parts."""
        super().data_received(data)
        self.wait_for_request()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no HTTP request, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # a response has begun
            return
        error = refused("this is not an HTTP/1.1 request: check its first line and its headers")
        body = error.body.model_dump_json().encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
            (REQUEST_ID, new_request_id()),
        ]
        start = h11.Response(status_code=error.status, headers=headers, reason=b"Bad Request")
        for part in (start, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part))
        self.transport.close()

    def on_response_complete(self) -> None:
        """Start waiting for the next request."""
        super().on_response_complete()
        self.wait_for_request()

    def wait_for_request(self) -> None:
        """Run the request timer while a request, or the rest of one, has yet to arrive."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            self.request_timer = stop(self.request_timer)
        elif self.request_timer is None:
            self.request_timer = self.loop.call_later(PATIENCE, self.transport.abort)

    def pause_writing(self) -> None:
        """Start the reading timer: the buffer is full, because the client does not read."""
        super().pause_writing()
        self.reading_timer = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the reading timer: the client reads again."""
        super().resume_writing()
        self.reading_timer = stop(self.reading_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, uvicorn's too: it would hold the closed connection until it has run."""
        super().connection_lost(exc)
        self.timeout_keep_alive_task = stop(self.timeout_keep_alive_task)
        self.request_timer, self.reading_timer = stop(self.request_timer), stop(self.reading_timer)


def stop(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Cancel a timer, if there is one; return None, to assign in its place."""
    if timer is not None:
        timer.cancel()
    return None


class UvicornServer(uvicorn.Server):
    """uvicorn with callbacks at its start and end, and a graceful shutdown at the first signal."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        drain: int,
        ready: Callable[[], None] = lambda: None,
        ending: Callable[[], None] = lambda: None,
    ) -> None:
        """`ready` and `ending` are called once each; open requests get `drain` seconds to end."""
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                lifespan="on",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=drain,
            )
        )
        self.ready, self.ending = ready, ending

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen; ValueError if another process has just taken the address."""
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            raise taken(*(sockets or [])[0].getsockname()[:2]) from error
        if self.started:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, finish open requests, and stop."""
        self.ending()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Treat a closed terminal as a signal to stop, unless it is ignored, as under nohup."""
        with super().capture_signals():
            main = threading.current_thread() is threading.main_thread()
            hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
            if main and hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:
                signal.signal(hang_up, self.handle_exit)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Shut down gracefully at the first signal, and exit at once at the second."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
