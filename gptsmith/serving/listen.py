"""From an application to a server: an address, uvicorn, and an end in good order.

Knows nothing of what the application does.
"""

import errno
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

KEEP_ALIVE = 75  # seconds; longer than clients keep a connection that they do not use


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
            raise ValueError(
                f"port {port} of {host} is taken: choose another --port, or 0 for a free one"
            ) from error
        raise ValueError(f"{host}, port {port}, cannot be used: {error.strerror}") from error
    return bound


def url(bound: socket.socket) -> str:
    """The address of a socket, as a browser takes it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
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
        """Begin to listen."""
        await super().startup(sockets)
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
