"""The engine in a thread of its own, and the news of each job as an asynchronous stream.

While the model computes, the event loop stays free for clients. Everything here runs in the event
loop's thread, except `Service.run`, which is the engine's thread. Knows nothing of text or HTTP.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, NamedTuple, Self

from ..generation.compiled import CompiledDecoder, Decoder
from ..generation.engine import Engine
from ..generation.job import Job, News
from ..generation.slots import Slots
from ..machine.devices import available_memory
from ..model.cache import KVCache
from ..model.gpt import GPT

LOG = logging.getLogger(__name__)
REMEMBERED = 64  # finished jobs whose times estimate how soon there is room for another
MOST_SLOTS, MOST_SLOTS_PLAIN = 64, 8
SHARE_OF_MEMORY = 1 / 8  # of the free memory, for the KV cache
LONGEST_PAUSE = 60  # seconds in Retry-After; the last jobs may have ended long ago


class QueueFull(Exception):
    """The queue has no room for more jobs."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full: retry in {retry_after} s")
        self.retry_after = retry_after  # seconds


class Counts(NamedTuple):
    """How many jobs are running, and how many are waiting for a slot."""

    running: int
    waiting: int


class Stream:
    """The news of one job, in order; the last says how the job finished."""

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
        """Cancel the job: its slot is free at the next step. Harmless if the job has finished."""
        self.service.cancel(self)


class Turns:
    """Engines that share a machine compute in turns, as each step uses all of its cores."""

    def __init__(self) -> None:
        self.next, self.now = Lock(), Lock()

    def __enter__(self) -> None:
        # Whoever has just had its turn has to wait here for the one that is waiting already.
        with self.next:
            self.now.acquire()

    def __exit__(self, *error: object) -> None:
        self.now.release()


class Service:
    """A model that many clients share. The engine's thread runs inside `async with service`."""

    def __init__(
        self,
        model: GPT,
        *,
        decoder: Decoder | None = None,
        slots: int | None = None,
        waiting: int = 512,
        turns: Turns | None = None,
    ) -> None:
        self.turns = Turns() if turns is None else turns
        self.config = model.config
        count = suitable_slots(model, decoder, slots)
        self.engine = Engine(Slots(model, count, decoder, in_chunks=True))
        self.slots, self.waiting = len(self.engine.slots), waiting
        self.streams: dict[Job, Stream] = {}  # of unfinished jobs
        self.ends: deque[float] = deque(maxlen=REMEMBERED)  # times at which the last jobs finished
        # Calls for the engine's thread: a job to submit or to cancel. None ends the thread.
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
        """Queue all of the jobs or none, and return their streams.

        Raises QueueFull if there is no room now, ValueError if there never can be.
        """
        most = self.slots + self.waiting
        if len(jobs) > most:
            raise ValueError(f"{len(jobs)} jobs at once: at most {most} are possible")
        if len(self.streams) + len(jobs) > most:
            raise QueueFull(self.retry_after(len(self.streams) + len(jobs) - most))
        streams = [Stream(job, self) for job in jobs]
        for stream in streams:
            self.streams[stream.job] = stream
            self.inbox.put((self.engine.submit, stream.job))
        return streams

    def cancel(self, stream: Stream) -> None:
        """Cancel a stream's job, if it has not finished."""
        if self.streams.pop(stream.job, None) is not None:
            self.inbox.put((self.engine.cancel, stream.job))

    def counts(self) -> Counts:
        """Count the running and the waiting jobs."""
        running = min(len(self.streams), self.slots)
        return Counts(running, len(self.streams) - running)

    def retry_after(self, jobs: int) -> int:
        """Estimate in how many seconds `jobs` more jobs will have finished, at the rate of the
        last ones."""
        if len(self.ends) < 2:
            return 1
        each = (time.monotonic() - self.ends[0]) / len(self.ends)
        return min(max(1, math.ceil(jobs * each)), LONGEST_PAUSE)

    def deliver(self, news: Sequence[News]) -> None:
        """Pass the news of a step to the jobs' streams."""
        for item in news:
            stream = self.streams.get(item.job)
            if stream is None:  # cancelled while the step ran
                continue
            if item.finish:
                del self.streams[item.job]
                self.ends.append(time.monotonic())
            stream.news.put_nowait(item)

    # -- in the engine's thread

    def run(self) -> None:
        """Run the engine's steps while it has jobs; return when the inbox says so."""
        while True:
            try:
                # An idle engine waits for a call; a busy one only looks whether there is one.
                call = self.inbox.get(block=self.engine.idle)
                if call is None:
                    return
                method, job = call
                method(job)
                continue  # take all calls before the next step
            except Empty:
                pass
            try:
                with self.turns:
                    news = self.engine.step(time.monotonic())
            except Exception:  # one failed step must not end the service
                LOG.exception("a step failed")
                news = self.engine.abandon("the engine's step failed")
            if news:
                self.loop.call_soon_threadsafe(self.deliver, news)


def suitable_slots(model: GPT, decoder: Decoder | None, wanted: int | None = None) -> int:
    """Return the number of slots: `wanted`, or what suits the device and its free memory.

    Raises ValueError if the wanted slots do not fit into memory.
    """
    size = KVCache(model.config, 1, dtype=model.dtype, device="meta").size
    free = available_memory(model.device)
    if wanted is None:
        fast = isinstance(decoder, CompiledDecoder) or model.device.type == "cuda"
        suits = MOST_SLOTS if fast else MOST_SLOTS_PLAIN
        return max(1, min(suits, int(SHARE_OF_MEMORY * free / size)))
    if wanted * size > free:
        raise ValueError(
            f"{wanted:,} slots need {wanted * size / 1e9:.1f} GB, but only {free / 1e9:.1f} GB "
            "are free: choose fewer slots"
        )
    return wanted
