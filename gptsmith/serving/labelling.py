"""A classifier in a thread of its own, which labels the texts of many requests in one batch.

Everything here runs in the event loop's thread, except `LabelService.run`. Knows nothing of text or
HTTP.
"""

import asyncio
import logging
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread
from typing import NamedTuple, Self

from ..evaluation.labels import probabilities
from ..model.classifier import Classifier
from .worker import Counts, QueueFull

LOG = logging.getLogger(__name__)
SLOTS = 64  # texts that are labelled at once; more of them wait


class QueuedText(NamedTuple):
    """The tokens of a text, and where its probabilities go."""

    ids: Sequence[int]
    found: asyncio.Future[list[float]]


class LabelService:
    """A classifier that many clients share. Its thread runs inside `async with service`."""

    def __init__(self, model: Classifier, *, slots: int | None = None, waiting: int = 512) -> None:
        self.model, self.config = model, model.config
        self.slots, self.waiting = slots or SLOTS, waiting
        self.unfinished = 0  # texts
        self.inbox: SimpleQueue[QueuedText | None] = SimpleQueue()  # None ends the thread

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        self.thread = Thread(target=self.run, name="classifier", daemon=True)
        self.thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.inbox.put(None)
        await asyncio.to_thread(self.thread.join)

    async def label(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return the probability of each label for each row of tokens.

        Raises QueueFull if there is no room for all rows, RuntimeError if the model failed.
        """
        if self.unfinished + len(rows) > self.slots + self.waiting:
            raise QueueFull(retry_after=1)
        texts = [QueuedText(ids, self.loop.create_future()) for ids in rows]
        self.unfinished += len(texts)
        for text in texts:
            self.inbox.put(text)
        return await asyncio.gather(*(text.found for text in texts))

    def counts(self) -> Counts:
        """Count the running and the waiting texts."""
        running = min(self.unfinished, self.slots)
        return Counts(running, self.unfinished - running)

    def deliver(
        self, count: int, texts: Sequence[QueuedText], found: Sequence[list[float]]
    ) -> None:
        """Pass the probabilities of a batch to those who wait for them; none if it failed.

        `count` texts have left the queue, those included whose clients had left before.
        """
        self.unfinished -= count
        for number, text in enumerate(texts):
            if text.found.done():  # the client has left meanwhile
                continue
            if found:
                text.found.set_result(found[number])
            else:
                text.found.set_exception(RuntimeError("the model failed"))

    def run(self) -> None:
        """Label what has come in, a batch at a time, until the inbox says to end."""
        while (first := self.inbox.get()) is not None:
            texts = [first]
            while len(texts) < self.slots and not self.inbox.empty():
                if (text := self.inbox.get()) is None:
                    self.inbox.put(None)
                    break
                texts.append(text)
            count = len(texts)
            texts = [text for text in texts if not text.found.done()]  # their clients are there
            try:
                found = probabilities(self.model, [text.ids for text in texts])
            except Exception:  # one failed batch must not end the service
                LOG.exception("a batch failed")
                found = []
            self.loop.call_soon_threadsafe(self.deliver, count, texts, found)
