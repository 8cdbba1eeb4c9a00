"""The engine in a thread of its own, and news of each job as an asynchronous stream.

While the model computes, the event loop goes on to talk to its clients. All of it is for the event
loop's thread; only `Service.run` is the other one. Knows nothing of characters or HTTP.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Self

from ..generation.compiled import CompiledDecoder, Decoder
from ..generation.engine import Engine
from ..generation.job import Job, News
from ..generation.slots import Slots
from ..machine.devices import available_memory
from ..model.cache import KVCache
from ..model.gpt import GPT

LOG = logging.getLogger(__name__)
REMEMBERED = 64  # jobs that ended last, which tell how soon there is room for another
MOST_SLOTS, MOST_SLOTS_PLAIN = 64, 8
SHARE_OF_MEMORY = 1 / 8  # that the cache may take, of what is free
LONGEST_PAUSE = 60  # seconds that a client is told to wait; what ended last may be long ago


class QueueFull(Exception):
    """As many jobs wait as may."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: try again in {retry_after} s")
        self.retry_after = retry_after  # seconds


class Counts(NamedTuple):
    """How many jobs have a slot, and how many wait for one."""

    running: int
    waiting: int


class Stream:
    """The news of one job, in order; it ends after those that say how the job finished."""

    def __init__(self, job: Job, service: "Service") -> None:
        self.job, self.service = job, service
        self.news: asyncio.Queue[News] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[News]:
        while True:
            news = await self.news.get()
            yield news
            if news.finish:
                return

    def cancel(self) -> None:
        """Give the job up: its slot is free at the next step. Harmless where it is over."""
        self.service.cancel(self)


class Service:
    """A model that many ask at once. Used as `async with service`, in which its thread runs."""

    def __init__(
        self,
        model: GPT,
        *,
        decoder: Decoder | None = None,
        slots: int | None = None,
        waiting: int = 512,
    ) -> None:
        self.config = model.config
        count = suitable_slots(model, decoder, slots)
        self.engine = Engine(Slots(model, count, decoder, in_chunks=True))
        self.slots, self.waiting = len(self.engine.slots), waiting
        self.streams: dict[Job, Stream] = {}  # of jobs that have not finished
        self.ends: deque[float] = deque(maxlen=REMEMBERED)  # when the last ones did
        # What the thread is told: a job to begin, or to give up, or (None) to end itself.
        self.inbox: SimpleQueue[tuple[Any, Job] | None] = SimpleQueue()

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        self.thread = Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.inbox.put(None)
        await asyncio.to_thread(self.thread.join)

    # -- in the event loop

    def submit(self, jobs: Sequence[Job]) -> list[Stream]:
        """Take in all of some jobs or none; QueueFull where there is no room now, ValueError where
        there never is."""
        most = self.slots + self.waiting
        if len(jobs) > most:
            raise ValueError(f"{len(jobs)} texts are asked for at once: at most {most} can be")
        if len(self.streams) + len(jobs) > most:
            raise QueueFull(self.retry_after(len(self.streams) + len(jobs) - most))
        streams = [Stream(job, self) for job in jobs]
        for stream in streams:
            self.streams[stream.job] = stream
            self.inbox.put((self.engine.submit, stream.job))
        return streams

    def cancel(self, stream: Stream) -> None:
        """Give a job up."""
        if self.streams.pop(stream.job, None) is not None:
            self.inbox.put((self.engine.cancel, stream.job))

    def counts(self) -> Counts:
        """How many jobs there are now."""
        running = min(len(self.streams), self.slots)
        return Counts(running, len(self.streams) - running)

    def retry_after(self, jobs: int) -> int:
        """In how many seconds so many jobs more will have ended, if they go on to end as the last
        ones did."""
        if len(self.ends) < 2:
            return 1
        each = (time.monotonic() - self.ends[0]) / len(self.ends)
        return min(max(1, math.ceil(jobs * each)), LONGEST_PAUSE)

    def deliver(self, news: Sequence[News]) -> None:
        """Hand out what a step brought."""
        for item in news:
            stream = self.streams.get(item.job)
            if stream is None:  # given up while the step ran
                continue
            if item.finish:
                del self.streams[item.job]
                self.ends.append(time.monotonic())
            stream.news.put_nowait(item)

    # -- in the engine's thread

    def run(self) -> None:
        """Step after step, as long as there is something to do, and until told to end."""
        while True:
            try:
                told = self.inbox.get(block=self.engine.idle)
                if told is None:
                    return
                do, job = told
                do(job)
                continue  # there may be more
            except Empty:
                pass
            try:
                news = self.engine.step(time.monotonic())
            except Exception:  # a failure of one step must not be the end of the service
                LOG.exception("a step failed")
                news = self.engine.abandon("the server failed at this: try again")
            if news:
                self.loop.call_soon_threadsafe(self.deliver, news)


def suitable_slots(model: GPT, decoder: Decoder | None, wanted: int | None = None) -> int:
    """How many slots suit a model on its device and leave it memory, or those that are wanted;
    ValueError where they do not fit."""
    size = KVCache(model.config, 1, dtype=model.dtype, device="meta").size
    free = available_memory(model.device)
    if wanted is None:
        fast = isinstance(decoder, CompiledDecoder) or model.device.type == "cuda"
        suits = MOST_SLOTS if fast else MOST_SLOTS_PLAIN
        return max(1, min(suits, int(SHARE_OF_MEMORY * free / size)))
    if wanted * size > free:
        raise ValueError(
            f"{wanted:,} slots take {wanted * size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            "free: take fewer"
        )
    return wanted
