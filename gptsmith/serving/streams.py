"""The texts of one request while they are written: streams of news, read together.

Knows nothing of JSON or HTTP, but for the errors that a client is told.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from ..generation.job import News
from ..generation.text import Piece, Text, joined
from .errors import ApiError, stopping
from .metrics import Metrics
from .worker import Stream

LOG = logging.getLogger(__name__)


class Writing:
    """One text while it is written."""

    def __init__(
        self, stream: Stream, text: Text, metrics: Metrics | None = None, *, begun: float
    ) -> None:
        """`begun` is when the request came, by time.monotonic."""
        self.stream, self.text, self.metrics = stream, text, metrics
        self.last = begun  # when the latest token came, or the request
        self.tokens = 0
        self.logprob = 0.0  # of all new tokens

    def push(self, news: News) -> Piece:
        """What the next step adds to the text; ApiError where it cannot be finished."""
        if news.finish in ("timeout", "failed"):
            raise failure(news)
        if news.token is not None:
            now = time.monotonic()
            if self.metrics is not None and self.tokens:
                self.metrics.next_token(now - self.last)
            elif self.metrics is not None:
                self.metrics.first_token(now - self.last)
            self.last = now
            self.tokens += 1
            self.logprob += news.token.logprob or 0.0
        return self.text.push(news)

    @property
    def mean_logprob(self) -> float:
        """The mean log-probability of its tokens, by which the best are chosen."""
        return self.logprob / max(self.tokens, 1)


def failure(news: News) -> ApiError:
    """What a client is told of a text that was given up."""
    if news.finish == "timeout":
        return ApiError(
            504,
            "the time for a request is over: ask for fewer tokens or texts, or again when the "
            "server is less busy",
            headers={"x-should-retry": "false"},
        )
    LOG.error("a text was given up: %s", news.reason)
    return ApiError(500, "the model failed at this request: whoever runs the server can read why")


async def together(writings: Sequence[Writing]) -> AsyncGenerator[list[tuple[int, Piece]], None]:
    """All pieces of all texts as they come, several at a time, each with its text's number.

    When the reader leaves, the texts that are not finished are given up.
    """
    arrived = asyncio.Queue[tuple[int, Piece] | Exception]()
    readers = [
        asyncio.create_task(read(number, writing, arrived))
        for number, writing in enumerate(writings)
    ]
    unfinished = len(writings)
    try:
        while unfinished:
            batch = [await arrived.get()]
            while not arrived.empty():
                batch.append(arrived.get_nowait())
            pieces = [item for item in batch if not isinstance(item, Exception)]
            if pieces:
                yield pieces
            for item in batch:
                if isinstance(item, Exception):
                    raise item
            unfinished -= sum(piece.finish is not None for _, piece in pieces)
    finally:
        for writing, reader in zip(writings, readers, strict=True):
            writing.stream.cancel()
            reader.cancel()


async def read(
    number: int, writing: Writing, arrived: asyncio.Queue[tuple[int, Piece] | Exception]
) -> None:
    """Put the pieces of one text where they are awaited, and stop the engine once it has ended."""
    try:
        async for news in writing.stream:
            if piece := writing.push(news):
                arrived.put_nowait((number, piece))
            if piece.finish is not None:
                writing.stream.cancel()  # a stop string is known here only
                return
        raise stopping()
    except Exception as error:
        arrived.put_nowait(error)


async def whole_texts(writings: Sequence[Writing]) -> list[Piece]:
    """The texts, once all are finished."""
    pieces: list[list[Piece]] = [[] for _ in writings]
    async with aclosing(together(writings)) as batches:
        async for batch in batches:
            for number, piece in batch:
                pieces[number].append(piece)
    return [joined(parts) for parts in pieces]


def best(texts: Sequence[Piece], writings: Sequence[Writing], n: int, of: int) -> list[Piece]:
    """Of every `of` texts the n of highest mean log-probability, best first; all where n is of."""
    chosen = list[int]()
    for start in range(0, len(texts), of):
        group = list(range(start, start + of))
        if n < of:
            group = sorted(group, key=lambda i: writings[i].mean_logprob, reverse=True)[:n]
        chosen += group
    return [texts[i] for i in chosen]
