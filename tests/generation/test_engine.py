"""Many jobs at once: each gets what it would get alone, whoever else is there.

Alone is restated here as plainly as it can be: the whole text, read by the model without a cache,
one job at a time.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith import GPT, GPTConfig, SamplingSettings
from gptsmith.config.model import MODERN
from gptsmith.config.settings import GREEDY
from gptsmith.generation.compiled import open_decoder
from gptsmith.generation.engine import Engine
from gptsmith.generation.graphs import GraphDecoder
from gptsmith.generation.job import Job, News, Scored
from gptsmith.generation.sampling import next_token
from gptsmith.generation.slots import Slots, Span, common
from gptsmith.model.quantized import pack_model
from tests.conftest import TINY, processor_seconds, scrambled

pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")
SIZES = TINY | {"context_length": 150, "n_embd": 24}
LIMIT, V = SIZES["context_length"], SIZES["vocab_size"]
SETTINGS = [
    GREEDY,
    SamplingSettings(temperature=0.9, top_k=20, top_p=0.95),
    SamplingSettings(temperature=1.3, min_p=0.01, repetition_penalty=1.4),
    SamplingSettings(temperature=0, repetition_penalty=1.7),
]
# How an engine reads: the compiled step, PyTorch alone, a step for one token of every slot.
WAYS = ("compiled", "plain", "graph", "modern")


def engine_of(way: str, slots: int = 4, *, in_chunks: bool = True) -> tuple[GPT, Engine]:
    form = MODERN | {"n_head": 6, "n_kv_head": 2} if way == "modern" else {}
    model = scrambled(GPTConfig(**(SIZES | form)))
    decoder: Any = open_decoder(model, "yes") if way == "compiled" else None
    if way == "graph":
        decoder = GraphDecoder(model)
    return model, Engine(Slots(model, slots, decoder, in_chunks=in_chunks))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (length,), generator=generator).tolist()


def job_of(prompt: Sequence[int], max_tokens: int = 10, **choices: Any) -> Job:
    wanted: dict[str, Any] = {"sampling": GREEDY, "seed": 0} | choices
    return Job(prompt=prompt, max_tokens=max_tokens, **wanted)


def logits_of(model: GPT, text: Sequence[int]) -> Tensor:
    """(S, V), by the plain forward."""
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0]


def alone(model: GPT, job: Job) -> list[int]:
    """The new tokens of a job, by the rules themselves."""
    text, new = list(job.prompt), []
    generator = torch.Generator().manual_seed(job.seed)
    while len(new) < job.max_tokens and (job.beyond_context or len(text) <= LIMIT):
        logits = logits_of(model, text[-LIMIT:])[-1:].clone()
        for token, value in job.bias.items():
            logits[0, token] += value
        for token in set(new):
            times = new.count(token)
            logits[0, token] -= job.presence_penalty + times * job.frequency_penalty
        if len(new) < job.min_tokens:
            logits[0, [*job.ends]] = -math.inf
        chosen = int(next_token(logits, torch.tensor([text]), job.sampling, [generator]))
        text.append(chosen)
        new.append(chosen)
        if chosen in job.ends:
            break
    return new


def run(engine: Engine, jobs: Sequence[Job], after: dict[int, list[Job]] | None = None) -> Any:
    """News of each job, in order, when they all have ended; more jobs may join at some steps."""
    news: dict[Job, list[News]] = {job: [] for job in jobs}
    for job in jobs:
        engine.submit(job)
    for number in itertools.count():
        for job in (after or {}).get(number, []):
            news[job] = []
            engine.submit(job)
        if engine.idle and number > max(after or {0: None}):
            return news
        for item in engine.step(0.0):
            news[item.job].append(item)
    raise AssertionError


def tokens_of(news: Sequence[News]) -> list[int]:
    return [item.token.id for item in news if item.token is not None]


def some_jobs(count: int) -> list[Job]:
    """All different: short and long prompts, each with its own settings and seed."""
    lengths = itertools.cycle([3, 1, 70, 12, 130, 64, 65, 148])
    return [
        job_of(
            prompt_of(length, seed=number),
            max_tokens=5 + 3 * number,
            sampling=SETTINGS[number % len(SETTINGS)],
            seed=number,
            frequency_penalty=0.7 * (number % 3 == 2),
            bias={5: 2.5, 7: -100} if number % 5 == 4 else {},
            alternatives=None if number % 2 else number % 4,
        )
        for number, length in zip(range(count), lengths, strict=False)
    ]


@pytest.mark.parametrize("way", WAYS)
def test_a_job_gets_what_it_would_get_alone(way: str) -> None:
    model, engine = engine_of(way)
    jobs = some_jobs(11)
    news = run(engine, jobs[:3], after={2: jobs[3:8], 6: jobs[8:]})
    for job in jobs:
        assert tokens_of(news[job]) == alone(model, job)
        assert [item.finish for item in news[job]][-1] == "length"
    assert sorted(engine.free) == [0, 1, 2, 3]


def test_in_whatever_order_and_however_many_slots() -> None:
    jobs = some_jobs(9)
    model, _ = engine_of("compiled")
    expected = {job: alone(model, job) for job in jobs}
    for slots, seed in [(1, 0), (2, 1), (9, 2), (16, 3)]:
        mixed = random.Random(seed).sample(jobs, len(jobs))
        _, engine = engine_of("compiled", slots)
        news = run(engine, mixed[:4], after={3: mixed[4:]})
        assert {job: tokens_of(news[job]) for job in jobs} == expected


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_to_the_bit_beside_others_and_in_parts(
    dtype: torch.dtype, bits: int | None
) -> None:
    model = scrambled(GPTConfig(**SIZES)).to(dtype)
    if bits is not None:
        pack_model(model, bits)
    decoder = open_decoder(model, "yes")
    text = prompt_of(100)
    by_itself = Slots(model, 1, decoder, in_chunks=True)
    expected = by_itself.read([Span(0, text, 100)])
    slots = Slots(model, 7, decoder, in_chunks=True)
    found = []
    for number, part in enumerate([text[:1], text[1:40], text[40:99], text[99:]]):
        others = [Span(i, prompt_of(1 + 9 * i * (number == 1), seed=i), i % 2) for i in range(6)]
        logits = slots.read([*others[:4], Span(6, part, len(part)), *others[4:]])
        found.append(logits[2 : 2 + len(part)])  # after those of others 1 and 3
    assert torch.equal(torch.cat(found), expected)


def test_padding_never_leaves_the_cache() -> None:
    """Beside a slot that is nearly full, a longer span cannot be read in the same pass."""
    model = scrambled(GPTConfig(**SIZES))
    slots = Slots(model, 2)
    texts = [prompt_of(LIMIT), prompt_of(6, seed=1)]
    for parts in ((LIMIT - 1, 3), (LIMIT, 6)):
        starts = [len(text) for text in slots.texts]
        spans = [Span(i, texts[i][starts[i] : parts[i]], 1) for i in range(2)]
        logits = slots.read(spans)
        for i in range(2):
            expected = logits_of(model, texts[i][: parts[i]])[-1]
            assert (logits[i] - expected).norm() < 1e-5 * expected.norm()


def test_whatever_lies_in_the_cache() -> None:
    model, engine = engine_of("compiled", slots=2)
    job = job_of(prompt_of(70), 20)
    engine.slots.cache.keys.fill_(math.nan)
    engine.slots.cache.values.fill_(math.nan)
    assert tokens_of(run(engine, [job])[job]) == alone(model, job)


@pytest.mark.parametrize("way", WAYS)
def test_the_context_limit_ends_a_job(way: str) -> None:
    model, engine = engine_of(way, slots=2)
    jobs = [job_of(prompt_of(length), 1000) for length in (LIMIT, LIMIT - 1, 30)]
    news = run(engine, jobs)
    for job, count in zip(jobs, (1, 2, LIMIT - 29), strict=True):
        assert tokens_of(news[job]) == alone(model, job)
        assert len(tokens_of(news[job])) == count
        assert news[job][-1].finish == "length"


@pytest.mark.parametrize("in_chunks", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_some_texts_go_on_past_the_limit_and_some_do_not(way: str, in_chunks: bool) -> None:
    model, engine = engine_of(way, slots=3, in_chunks=in_chunks)
    lengths = [LIMIT - 3, 20, LIMIT + 9, LIMIT - 1, LIMIT]
    jobs = [
        job_of(
            prompt_of(length, seed=length),
            12,
            sampling=SETTINGS[number % 4],
            seed=number,
            beyond_context=length != LIMIT - 1,
        )
        for number, length in enumerate(lengths)
    ]
    news = run(engine, jobs[:3], after={4: jobs[3:]})
    for job in jobs:
        assert tokens_of(news[job]) == alone(model, job)
    assert [len(news[job]) for job in jobs] == [12, 12, 12, 2, 12]


class Knowing:
    """Knows a text, and lies about every third token."""

    def __init__(self, text: Sequence[int]) -> None:
        self.text = torch.tensor([(t + (i % 3 == 0)) % V for i, t in enumerate(text)])

    def guess(self, tokens: Tensor, most: int) -> Tensor:
        return self.text[len(tokens) : len(tokens) + most]


def drafted(model: GPT, job: Job) -> Job:
    """The same job with a draft that mostly knows its text."""
    return replace(job, draft=Knowing([*job.prompt, *alone(model, job)]))


@pytest.mark.parametrize("in_chunks", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_drafts_beside_others_change_nothing(way: str, in_chunks: bool) -> None:
    model, engine = engine_of(way, in_chunks=in_chunks)
    jobs = some_jobs(9)
    jobs[1] = replace(jobs[1], score_prompt=True, alternatives=2)
    jobs[4] = replace(jobs[4], prompt=jobs[4].prompt[:-10], beyond_context=True, max_tokens=40)
    expected = [alone(model, job) for job in jobs]
    drafts = [drafted(model, job) if number % 2 else job for number, job in enumerate(jobs)]
    drafts[4] = drafted(model, jobs[4])  # past the limit it guesses no more
    news = run(engine, drafts[:3], after={2: drafts[3:]})
    assert [tokens_of(news[job]) for job in drafts] == expected
    plain = run(engine_of(way, in_chunks=in_chunks)[1], [jobs[1]])[jobs[1]]
    for one, other in zip(scores_of(news[drafts[1]]), scores_of(plain), strict=True):
        assert one.id == other.id
        assert one.logprob == (other.logprob and pytest.approx(other.logprob, abs=2e-5))


def scores_of(news: Sequence[News]) -> list[Scored]:
    prompt = [score for item in news for score in item.prompt]
    return [*prompt, *(item.token for item in news if item.token)]


def test_a_step_brings_as_many_tokens_as_were_guessed_right() -> None:
    model, engine = engine_of("compiled")
    plain = job_of(prompt_of(4), 30)
    text = [*plain.prompt, *alone(model, plain)]
    job = replace(plain, draft=Knowing([(t - (i % 3 == 0)) % V for i, t in enumerate(text)]))
    engine.submit(job)
    engine.submit(plain)
    news = engine.step(0.0)
    assert [item.job for item in news] == [job, plain, *[job] * 8]
    news += engine.step(0.0)
    assert tokens_of([item for item in news if item.job is job]) == text[4 : 4 + 18]


def test_a_text_may_end_among_guesses_that_are_right() -> None:
    model, engine = engine_of("compiled", slots=1)
    free = job_of(prompt_of(40), 30, sampling=SETTINGS[1], seed=4)
    new = alone(model, free)
    end = next(token for token in new if new.index(token) > 3)
    job = drafted(model, free)
    ended = replace(job, ends=frozenset({end}))
    news = run(engine, [ended])[ended]
    assert tokens_of(news) == new[: new.index(end) + 1]
    assert [item.finish for item in news if item.finish] == ["stop"]
    # Whoever begins like this text finds nothing of what was guessed after its end.
    later = job_of([*free.prompt, *tokens_of(news), *prompt_of(5)], 20)
    assert tokens_of(run(engine, [later])[later]) == alone(model, later)


@pytest.mark.parametrize("way", WAYS)
def test_a_drafted_job_given_up_leaves_its_slot_to_the_next(way: str) -> None:
    model, engine = engine_of(way, slots=1, in_chunks=way == "compiled")
    first = drafted(model, job_of(prompt_of(30), 60))
    second = job_of([*first.prompt, *alone(model, first)[:7], *prompt_of(5)], 20)
    engine.submit(first)
    engine.submit(second)
    for _ in range(3):
        assert {item.job for item in engine.step(0.0)} == {first}
    engine.cancel(first)
    news = [item for _ in range(20) for item in engine.step(0.0)]
    assert {item.job for item in news} == {second}
    assert tokens_of(news) == alone(model, second)
    assert engine.idle


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_no_ending_token_comes_before_min_tokens(sampling: SamplingSettings) -> None:
    """And once that many are there, its bias is what the job says, or the model's own."""
    model, engine = engine_of("compiled")
    likely = dict.fromkeys(range(0, V, 2), 9.0)  # every other token is likely, and ends the text
    jobs = [
        job_of(
            prompt_of(5),
            40,
            sampling=sampling,
            ends=frozenset(likely),
            bias=likely,
            min_tokens=least,
            frequency_penalty=0.5,
        )
        for least in (0, 1, 7, 40)
    ]
    for job, news in run(engine, jobs).items():
        new = tokens_of(news)
        assert new == alone(model, job)
        assert not job.ends & {*new[: job.min_tokens]}
        assert news[-1].finish == ("length" if len(new) == 40 else "stop")
        assert job.min_tokens <= len(new) < job.min_tokens + 9


def test_where_every_token_ends_a_text_it_still_has_its_minimum() -> None:
    _, engine = engine_of("plain")
    (news,) = run(engine, [job_of([1], 9, ends=frozenset(range(V)), min_tokens=4)]).values()
    assert (len(tokens_of(news)), news[-1].finish) == (5, "stop")


def test_an_ending_token_ends_a_job() -> None:
    model, engine = engine_of("compiled")
    wanted: dict[str, Any] = {"sampling": SamplingSettings(temperature=1.5), "seed": 2}
    free = alone(model, job_of(prompt_of(5), 30, **wanted))
    end = next(token for token in free if free.index(token) > 5)
    job = job_of(prompt_of(5), 30, ends=frozenset({end, V}), **wanted)
    news = run(engine, [job])[job]
    assert tokens_of(news) == free[: free.index(end) + 1]
    assert [item.finish for item in news][-2:] == [None, "stop"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_a_prompt_is_scored(way: str, max_tokens: int) -> None:
    model, engine = engine_of(way)
    jobs = [
        job_of(prompt_of(n, seed=n), max_tokens, alternatives=2, score_prompt=True)
        for n in (1, 2, 64, 65, 140)
    ]
    news = run(engine, [job_of(prompt_of(9), 40), *jobs])
    for job in jobs:
        text = [*job.prompt, *tokens_of(news[job])]
        assert len(text) == len(job.prompt) + max_tokens
        logprobs = logits_of(model, text).log_softmax(-1)
        prompt = [score for item in news[job] for score in item.prompt]
        scores = [*prompt, *(item.token for item in news[job] if item.token)]
        assert scores[0] == Scored(text[0])
        assert [score.id for score in scores] == text
        for place, score in enumerate(scores[1:]):
            assert score.logprob == pytest.approx(float(logprobs[place, score.id]), abs=2e-5)
            values, ids = logprobs[place].topk(2)
            assert [id for id, _ in score.alternatives] == ids.tolist()
            assert [p for _, p in score.alternatives] == pytest.approx(values.tolist(), abs=2e-5)


def test_logprobs_are_the_models_own_before_bias_and_temperature() -> None:
    model, engine = engine_of("compiled")
    job = job_of(
        prompt_of(4), 3, sampling=SamplingSettings(temperature=2), bias={3: 100}, alternatives=0
    )
    news = run(engine, [job])[job]
    assert tokens_of(news) == [3, 3, 3]
    expected = logits_of(model, [*job.prompt, 3, 3]).log_softmax(-1)[-3:, 3]
    assert [item.token.logprob for item in news] == pytest.approx(expected.tolist(), abs=2e-5)
    assert all(item.token.alternatives == () for item in news)


def test_penalties_count_what_is_written_and_not_the_prompt() -> None:
    model, engine = engine_of("compiled")
    prompt = [4] * 20
    free = job_of(prompt, 20)
    jobs = [replace(free, presence_penalty=3.0), replace(free, frequency_penalty=0.4), free]
    news = run(engine, jobs)
    for job in jobs:
        assert tokens_of(news[job]) == alone(model, job)
    assert len({tuple(tokens_of(news[job])) for job in jobs}) == 3


def test_a_prompt_that_is_known_is_not_read_again() -> None:
    model, engine = engine_of("compiled", slots=3)
    read: list[int] = []
    plain_read = engine.slots.read

    def counting(spans: Sequence[Span]) -> Tensor:
        read.append(sum(len(span.tokens) for span in spans))
        return plain_read(spans)

    engine.slots.read = counting  # type: ignore[method-assign]
    prompt = prompt_of(80)
    several = [job_of(prompt, 6, seed=n, sampling=SETTINGS[1]) for n in range(3)]
    news = run(engine, several)
    # A chunk once, the rest by each, for it is read in the same step; and what each wrote.
    assert sum(read) == 64 + 3 * 16 + 3 * 5
    read.clear()
    longer = job_of([*prompt, *tokens_of(news[several[1]]), 1, 2], 6)
    news |= run(engine, [longer])
    assert sum(read) == 3 + 5  # what was written last was never read
    for job in [*several, longer]:
        assert tokens_of(news[job]) == alone(model, job)


def test_no_chunk_keeps_others_waiting() -> None:
    _, engine = engine_of("compiled", slots=3)
    writing = job_of([1], 100)
    engine.submit(writing)
    assert len(engine.step(0.0)) == 1
    for length in (140, 90):
        engine.submit(job_of(prompt_of(length, seed=length), 1))
    for _ in range(4):
        spans = [len(reading.span.tokens) for reading in engine.plan()]
        assert sum(spans) <= 1 + engine.slots.chunk
        assert writing in [item.job for item in engine.step(0.0)]


@pytest.mark.parametrize("way", WAYS)
def test_a_job_given_up_leaves_its_slot_to_the_next(way: str) -> None:
    model, engine = engine_of(way, slots=1)
    first, second, third = (job_of(prompt_of(90, seed=n), 20) for n in range(3))
    for job in (first, second, third):
        engine.submit(job)
    engine.step(0.0)  # in the midst of its prompt
    engine.cancel(first)
    engine.cancel(second)
    engine.cancel(second)
    news = [item for _ in range(21) for item in engine.step(0.0)]
    assert {item.job for item in news} == {third}
    assert tokens_of(news) == alone(model, third)
    assert engine.idle


def test_time_ends_a_job_that_runs_and_one_that_waits() -> None:
    _, engine = engine_of("compiled", slots=1)
    running = job_of(prompt_of(5), 100, deadline=10.0)
    waiting = job_of(prompt_of(5), 100, deadline=5.0)
    patient = job_of(prompt_of(5), 2)
    for job in (running, waiting, patient):
        engine.submit(job)
    assert [item.job for item in engine.step(4.0)] == [running]
    late = [item for item in engine.step(6.0) if item.finish]
    assert [(item.job, item.finish) for item in late] == [(waiting, "timeout")]
    found = engine.step(11.0)
    assert [(item.job, item.finish) for item in found] == [(running, "timeout"), (patient, None)]


def test_logits_that_are_not_finite_fail_their_job_alone() -> None:
    model, engine = engine_of("plain", slots=4)
    with torch.no_grad():
        model.wte.weight[9] = math.nan
        model.lm_head.weight = torch.nn.Parameter(torch.randn(V, 24))
    sick, well = job_of([1, 9, *[1] * 20], 4), job_of([1, 2], 4, bias={9: -1000})
    news = run(engine, [sick, well])
    assert [item.finish for item in news[sick]] == ["failed"]
    assert "not finite" in news[sick][0].reason
    assert tokens_of(news[well]) == alone(model, well)
    later = job_of([2, 3], 8, bias={9: -1000})  # in every slot, what was no number is gone
    for _ in range(4):
        assert tokens_of(run(engine, [later])[later]) == alone(model, later)


def test_all_can_be_given_up_and_the_engine_goes_on() -> None:
    model, engine = engine_of("compiled", slots=2)
    jobs = some_jobs(5)
    for job in jobs:
        engine.submit(job)
    engine.step(0.0)
    news = engine.abandon("why")
    assert {item.job for item in news} == set(jobs)
    assert {(item.finish, item.reason) for item in news} == {("failed", "why")}
    assert engine.idle
    assert tokens_of(run(engine, [jobs[2]])[jobs[2]]) == alone(model, jobs[2])


def test_how_two_texts_begin() -> None:
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([1, 2], [1, 2, 4]) == 2
    assert common([], [1]) == common([2], [1]) == 0


def test_a_step_costs_little_beside_the_model() -> None:
    """What is done in Python for 64 writers, in a time that a larger model would not notice."""
    _, engine = engine_of("compiled", slots=64)
    for number in range(64):
        engine.submit(job_of([number % V], 1000, seed=number))
    for _ in range(2):
        engine.step(0.0)
    times = []
    for _ in range(10):
        start = processor_seconds()
        engine.step(0.0)
        times.append(processor_seconds() - start)
    assert min(times) < 0.05
