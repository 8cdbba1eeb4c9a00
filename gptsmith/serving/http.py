"""From an application to a server: an address, uvicorn, patience, and an end in good order.

Knows nothing of what the application does.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

KEEP_ALIVE = 75  # seconds; longer than clients keep a connection that they do not use
PATIENCE = 60.0  # seconds in which a request has to be whole, and a reader has to read on


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; ValueError where that is not possible."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except socket.gaierror as error:
        raise ValueError(
            f"no host '{host}': a name or address of this machine is needed"
        ) from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise taken(host, port) from error
        raise ValueError(f"{host}, port {port}, cannot be used: {error.strerror}") from error
    return bound


def taken(host: str, port: int) -> ValueError:
    """The error of an address at which another listens."""
    return ValueError(f"port {port} of {host} is taken: choose another --port, or 0 for a free one")


def url(bound: socket.socket) -> str:
    """The address of a socket, as a browser takes it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """A connection that is cut when its client begins a request and does not end it, or does not
    read its answer.

    Of uvicorn's two protocols it is the one that bounds a request's head, and speaks HTTP/1.0 to
    those who do. An event of a stream takes it some microseconds longer.
    """

    asked: asyncio.TimerHandle | None = None  # when a request has to be whole
    read: asyncio.TimerHandle | None = None  # when something has to be read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self.wait_for_request()

    def data_received(self, data: bytes) -> None:
        """A part of a request, or several."""
        super().data_received(data)
        self.wait_for_request()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request."""
        super().on_response_complete()
        self.wait_for_request()

    def wait_for_request(self) -> None:
        """Set the clock while a request, or the rest of one, has yet to come."""
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY) or self.transport.is_closing():
            self.asked = stop(self.asked)
        elif self.asked is None:
            self.asked = self.loop.call_later(PATIENCE, self.transport.abort)

    def pause_writing(self) -> None:
        """What is written is not read."""
        super().pause_writing()
        self.read = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        """It is read on."""
        super().resume_writing()
        self.read = stop(self.read)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, whoever's doing."""
        super().connection_lost(exc)
        self.asked, self.read = stop(self.asked), stop(self.read)


def stop(clock: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """No clock, in place of one that runs, or of none."""
    if clock is not None:
        clock.cancel()
    return None


class UvicornServer(uvicorn.Server):
    """uvicorn, which says when it is ready; after the first signal it finishes what is begun."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        drain: int,
        ready: Callable[[], None] = lambda: None,
        ending: Callable[[], None] = lambda: None,
    ) -> None:
        """`ready` and `ending` are called once each; texts have `drain` seconds to be finished."""
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
        """Begin to listen; ValueError where another, bound at the same time, does so already."""
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            raise taken(*(sockets or [])[0].getsockname()[:2]) from error
        if self.started:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, finish what is begun, and end."""
        self.ending()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in good order at the first signal, and at once at the second: nothing is lost."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
