"""The choices of one response while they are generated: merged, whole or as events, and cancelled
when the client disconnects.

Knows nothing of requests, or of the JSON of a response (answers.py).
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ..generation.job import News
from ..generation.text import Piece, Text, joined
from .answers import DONE, Builder, Usage, event
from .errors import HUNG_UP, ApiError, failed, stopping
from .metrics import Metrics
from .worker import Stream

LOG = logging.getLogger(__name__)

Batch = list[tuple[int, Piece]]  # with the index of each piece's choice
Arrived = asyncio.Queue[tuple[int, Piece] | Exception]


class PendingChoice:
    """One choice while its text is generated."""

    def __init__(self, stream: Stream, text: Text, metrics: Metrics, *, begun: float) -> None:
        """`begun` is the time of the request's arrival, by time.monotonic."""
        self.stream, self.text, self.metrics = stream, text, metrics
        self.last = begun  # time of the latest token; before the first, of the request
        self.tokens = 0
        self.logprob = 0.0  # of all new tokens

    def push(self, news: News) -> Piece:
        """Return what a step adds to the text; ApiError if the job has failed or timed out."""
        if news.finish in ("timeout", "failed"):
            raise failure(news)
        if news.token is not None:
            now = time.monotonic()
            record = self.metrics.next_token if self.tokens else self.metrics.first_token
            record(now - self.last)
            self.last = now
            self.tokens += 1
            self.logprob += news.token.logprob or 0.0
        return self.text.push(news)

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of its tokens, by which best_of chooses."""
        return self.logprob / max(self.tokens, 1)

    async def read(self, index: int, pieces: Arrived) -> None:
        """Put the pieces of the text into a queue, and cancel the job when the text has ended."""
        try:
            async for news in self.stream:
                if piece := self.push(news):
                    pieces.put_nowait((index, piece))
                if piece.finish is not None:
                    return
            raise stopping()
        except Exception as error:
            pieces.put_nowait(error)
        finally:
            self.stream.cancel()  # the engine does not know stop strings
            self.metrics.tokens("generated", self.tokens)


def failure(news: News) -> ApiError:
    """Return the error for a job that failed or timed out."""
    if news.finish == "timeout":
        return timed_out()
    LOG.error("a job failed: %s", news.reason)
    return ApiError(500, "the model failed at this request: the server's log says why")


def timed_out() -> ApiError:
    """Return the error for a request that took too long."""
    return ApiError(
        504,
        "the request timed out: ask for fewer tokens or texts, or retry when the server is less "
        "busy",
        headers={"x-should-retry": "false"},
    )


async def merged(choices: Sequence[PendingChoice]) -> AsyncGenerator[Batch, None]:
    """Yield the pieces of all choices as they arrive, in batches, each with its choice's index.

    When the caller stops reading, unfinished jobs are cancelled.
    """
    pieces = Arrived()
    readers = [asyncio.create_task(each.read(index, pieces)) for index, each in enumerate(choices)]
    unfinished = len(choices)
    try:
        while unfinished:
            batch = [await pieces.get()]
            while not pieces.empty():
                batch.append(pieces.get_nowait())
            good = [item for item in batch if not isinstance(item, Exception)]
            if good:
                yield good
            for item in batch:
                if isinstance(item, Exception):
                    raise item
            unfinished -= sum(piece.finish is not None for _, piece in good)
    finally:
        for choice, reader in zip(choices, readers, strict=True):
            choice.stream.cancel()
            reader.cancel()


async def whole_texts(choices: Sequence[PendingChoice]) -> list[Piece]:
    """Return all texts once they are finished."""
    pieces: list[list[Piece]] = [[] for _ in choices]
    async with aclosing(merged(choices)) as batches:
        async for batch in batches:
            for index, piece in batch:
                pieces[index].append(piece)
    return [joined(parts) for parts in pieces]


def best(texts: Sequence[Piece], choices: Sequence[PendingChoice], n: int, of: int) -> list[Piece]:
    """Return the best n of every `of` texts, by mean log-probability, best first; if n equals
    `of`, return all in their order."""
    chosen = list[int]()
    for start in range(0, len(texts), of):
        group = list(range(start, start + of))
        if n < of:
            group = sorted(group, key=lambda i: choices[i].mean_logprob, reverse=True)[:n]
        chosen += group
    return [texts[i] for i in chosen]


# -- into a response


def usage(read: int, choices: Sequence[PendingChoice]) -> Usage:
    """Count the tokens of a request's prompts and texts."""
    generated = sum(choice.tokens for choice in choices)
    return Usage(prompt_tokens=read, completion_tokens=generated, total_tokens=read + generated)


async def events(
    builder: Builder,
    first: Batch,
    rest: AsyncGenerator[Batch, None],
    usage: Callable[[], Usage],
) -> AsyncGenerator[bytes, None]:
    """Yield the pieces of all choices as server-sent events; an error becomes an event too."""
    begun = set[int]()

    def encoded(batch: Batch) -> bytes:
        chunks = []
        for index, piece in batch:
            chunk = builder.chunk(index, piece, first=index not in begun)
            if builder.continuous_usage:
                chunk["usage"] = usage()
            chunks.append(event(chunk))
            begun.add(index)
        return b"".join(chunks)

    async with aclosing(rest):
        yield encoded(first)
        try:
            async for batch in rest:
                yield encoded(batch)
        except (Exception, asyncio.CancelledError) as error:
            # Cancelled means that the server is stopping, or that the client has left.
            reported = failed(error) if isinstance(error, Exception) else stopping()
            yield event(reported.body)
            return
    yield (event(builder.last_chunk(usage())) if builder.include_usage else b"") + DONE


# -- disconnected clients


@contextmanager
def while_connected(receive: Receive) -> Iterator[None]:
    """Cancel what is awaited inside when the client disconnects, and raise ApiError.

    The request's own task does the work, and only the watch is another task: a result that is
    handed from task to task needs turns of the event loop, each of which may wait for the engine's
    thread.
    """
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = task.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:  # if not gone, the server is stopping, and its drain time over
        raise (ApiError(HUNG_UP, "the client has disconnected") if gone else stopping()) from None
    finally:
        watching.cancel()
        if gone:
            task.uncancel()


class EventStream(StreamingResponse):
    """Server-sent events from a generator that is closed however the response ends.

    Starlette's own watch of the client is a task group, which costs 150 us for each stream.
    """

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events as they arrive, until they end or the client disconnects."""
        async with aclosing(self.events):
            # The response has begun, so what ends it early cannot be an error of its own.
            with suppress(ApiError), while_connected(receive):
                await self.stream_response(send)
