"""The engine in its thread: streams, cancelling, a full queue, failures, ending."""

import asyncio
import threading
import time
from typing import Any

import pytest
import torch

from gptsmith import GPTConfig, SamplingSettings
from gptsmith.config.settings import GREEDY
from gptsmith.generation.compiled import open_decoder
from gptsmith.generation.job import Job, News
from gptsmith.generation.writing import generate_tokens
from gptsmith.serving.worker import Counts, QueueFull, Service, Stream, suitable_slots
from tests.conftest import TINY, scrambled

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLED = SamplingSettings(temperature=1.0)


def service_of(**options: Any) -> Service:
    wanted: dict[str, Any] = {"slots": 2, "waiting": 4} | options
    return Service(scrambled(GPTConfig(**(TINY | {"context_length": 60}))), **wanted)


def job_of(seed: int = 0, max_tokens: int = 8, **choices: Any) -> Job:
    wanted: dict[str, Any] = {"prompt": [1 + seed, 2, 3], "sampling": SAMPLED} | choices
    return Job(max_tokens=max_tokens, seed=seed, **wanted)


async def news_of(stream: Stream) -> list[News]:
    return [news async for news in stream]


def slowed(service: Service, seconds: float) -> None:
    """Make each step take so long at least."""
    step = service.engine.step

    def slow(now: float) -> list[News]:
        time.sleep(seconds)
        return step(now)

    service.engine.step = slow  # type: ignore[method-assign]


async def until_idle(service: Service) -> None:
    """Wait until the engine has nothing to do, for two minutes at most."""
    for _ in range(12_000):
        if service.engine.idle and service.inbox.empty():
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"still there: {service.engine.turns}, {service.engine.waiting}")


def test_many_jobs_at_once_each_as_if_alone() -> None:
    async def ask() -> None:
        async with service_of() as service:
            jobs = [job_of(seed) for seed in range(6)]
            found = await asyncio.gather(*map(news_of, service.submit(jobs)))
            for job, news in zip(jobs, found, strict=True):
                tokens = [item.token.id for item in news if item.token]
                model, prompt = service.engine.slots.model, torch.tensor([job.prompt])
                alone = generate_tokens(model, prompt, 8, sampling=SAMPLED, seed=job.seed)
                assert tokens == [int(row[0]) for row in alone]
                assert [item.finish for item in news] == [None] * 7 + ["length"]
            assert service.counts() == Counts(0, 0)

    asyncio.run(ask())


@pytest.mark.slow
def test_a_full_queue_says_when_to_come_again() -> None:
    async def ask() -> None:
        async with service_of() as service:
            slowed(service, 0.02)
            with pytest.raises(ValueError, match="7 jobs at once: at most 6 are possible"):
                service.submit([job_of() for _ in range(7)])
            streams = service.submit([job_of(max_tokens=50) for _ in range(5)])
            assert service.counts() == Counts(2, 3)
            with pytest.raises(QueueFull, match="the queue is full") as full:
                service.submit([job_of(), job_of()])
            assert full.value.retry_after == 1  # nothing is known yet
            streams += service.submit([job_of(max_tokens=50)])
            assert service.counts() == Counts(2, 4)
            service.ends.extend([time.monotonic() - 30, time.monotonic() - 20])
            with pytest.raises(QueueFull) as full:
                service.submit([job_of()])
            assert full.value.retry_after == 16  # two ended in 30 s
            found = await asyncio.gather(*map(news_of, streams))
            assert all(len(news) == 50 for news in found)

    asyncio.run(ask())


def test_a_stream_given_up_leaves_its_slot() -> None:
    async def ask() -> None:
        async with service_of(slots=1) as service:
            slowed(service, 0.005)
            first, second = service.submit([job_of(0, 50), job_of(1, 50)])
            async for _ in first:
                break
            first.cancel()
            second.cancel()
            second.cancel()
            assert service.counts() == Counts(0, 0)
            await until_idle(service)
            assert list(service.engine.free) == [0]
            third = service.submit([job_of(2, 3)])[0]
            assert len(await news_of(third)) == 3
            third.cancel()

    asyncio.run(ask())


def test_a_failing_step_fails_its_jobs_and_not_the_service(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def ask() -> None:
        async with service_of() as service:
            read = service.engine.slots.read

            def broken(spans: Any) -> Any:
                raise RuntimeError("out of luck")

            service.engine.slots.read = broken  # type: ignore[method-assign]
            found = await asyncio.gather(*map(news_of, service.submit([job_of(), job_of(1)])))
            assert [[item.finish for item in news] for news in found] == [["failed"]] * 2
            assert "out of luck" not in found[0][0].reason
            service.engine.slots.read = read  # type: ignore[method-assign]
            assert len(await news_of(service.submit([job_of()])[0])) == 8

    asyncio.run(ask())
    assert "out of luck" in caplog.text


def test_time_is_over_for_one_and_not_for_the_other() -> None:
    async def ask() -> None:
        async with service_of() as service:
            slowed(service, 0.01)
            soon = time.monotonic() + 0.05
            streams = service.submit([job_of(0, 50, deadline=soon), job_of(1, 20)])
            late, well = await asyncio.gather(*map(news_of, streams))
            assert late[-1].finish == "timeout"
            assert 1 <= len(late) < 20
            assert len(well) == 20

    asyncio.run(ask())


def test_the_thread_ends_with_the_service_whatever_is_left() -> None:
    async def ask() -> None:
        before = threading.active_count()
        async with service_of() as service:
            service.submit([job_of(max_tokens=50, sampling=GREEDY)])
            assert threading.active_count() == before + 1
        assert not service.thread.is_alive()

    asyncio.run(ask())


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_slots_fit_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scrambled(GPTConfig(**(TINY | {"context_length": 60})))
    one = 2 * 2 * 60 * 12 * 4  # keys and values, layers, tokens, channels, bytes
    for memory, count in [(one * 8 * 5, 5), (one * 8 * 1000, 8), (0, 1)]:
        monkeypatch.setattr("gptsmith.serving.worker.available_memory", lambda device, m=memory: m)
        assert suitable_slots(model, None) == count
    with pytest.raises(ValueError, match=r"^2 slots need 0.0 GB, but only 0.0 GB are free: "):
        suitable_slots(model, None, 2)
    monkeypatch.setattr("gptsmith.serving.worker.available_memory", lambda device: one * 8 * 1000)
    assert suitable_slots(model, open_decoder(model, "yes")) == 64
