"""An answer on its way: JSON or events, for as long as its client listens.

Knows nothing of models, requests or routes. Plain ASGI, so that an event costs what it must.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from .answers import encoded
from .errors import stopping

EVENTS = "text/event-stream; charset=utf-8"


class Watched(Response):
    """An answer that is worked out while its client is watched: who hangs up ends the work.

    An error before the work sends anything becomes an answer of its own, as in any route.
    """

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__()
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work until there is an answer, or nobody to hear it, or the server ends."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        working = asyncio.ensure_future(self.work(noted))
        leaving = asyncio.ensure_future(hung_up(receive))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the time to finish what is begun is over
            if begun:
                raise
            raise stopping() from None
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.wait((working, leaving))
        if not working.cancelled():
            working.result()


async def hung_up(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, value: Any) -> None:
    """A whole answer."""
    body = encoded(value)
    await begin(send, "application/json", (b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.body", "body": body})


async def begin(send: Send, media_type: str, *headers: tuple[bytes, bytes]) -> None:
    """The head of an answer."""
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-type", media_type.encode()), *headers],
        }
    )


async def send_part(send: Send, body: bytes, *, last: bool = False) -> None:
    """A part of an answer that comes in parts."""
    await send({"type": "http.response.body", "body": body, "more_body": not last})
