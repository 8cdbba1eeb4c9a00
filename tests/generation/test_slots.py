"""Prompts of different lengths in one batch: each row gives what it gives alone.

Alone is restated here as plainly as it can be: the whole text, cropped to the context, read by the
model without a cache, one row at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.config.model import MODERN
from gptsmith.config.settings import GREEDY, SamplingSettings
from gptsmith.generation.drafts import FromText
from gptsmith.generation.engine import Engine
from gptsmith.generation.sampling import next_token
from gptsmith.generation.slots import Span
from gptsmith.generation.writing import (
    checked_rows,
    complete,
    engine_for,
    generate_tokens,
    jobs_of,
    stream,
)
from gptsmith.model.cache import KVCache
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled

pytestmark = pytest.mark.usefixtures("one_thread")
LIMIT = TINY["context_length"]
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "modern": MODERN | {"n_head": 6, "n_embd": 24, "n_kv_head": 2},
}
SAMPLINGS = {
    "greedy": GREEDY,
    "greedy, penalised": SamplingSettings(temperature=0, repetition_penalty=1.7),
    "seeded": SamplingSettings(temperature=0.9, top_k=20, top_p=0.95),
    "penalised": SamplingSettings(temperature=1.3, min_p=0.01, repetition_penalty=1.4),
}
# Of prompts, against a context of 11: each crosses it at another step, or lies beyond it.
LENGTHS = [(3, 1, 7), (10, 15, 1, 11, 2), (12, 30), (11, 4)]
parametrize_forms = pytest.mark.parametrize("form", FORMS)


def model_of(form: str) -> GPT:
    return scrambled(GPTConfig(**(TINY | FORMS[form])))


def prompts_of(lengths: Sequence[int], width: int | None = None, padding: int = 0) -> Tensor:
    """Random prompts, padded on the right up to the longest, or further.  -> (B, T)"""
    width = max(lengths) if width is None else width
    tokens = torch.randint(
        37, (len(lengths), width), generator=torch.Generator().manual_seed(sum(lengths))
    )
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = padding
    return tokens


def alone(model: GPT, prompt: Tensor, count: int, sampling: SamplingSettings, seed: int) -> Any:
    """The new tokens after one prompt (T,), by the rule itself."""
    text, generator = prompt.unsqueeze(0), torch.Generator().manual_seed(seed)
    for _ in range(count):
        with torch.no_grad():
            logits = model(text[:, -LIMIT:]).logits[:, -1]
        chosen = next_token(logits, text, sampling, [generator])
        text = torch.cat([text, chosen.unsqueeze(1)], dim=1)
    return text[0, len(prompt) :].tolist()


def together(model: GPT, tokens: Tensor, count: int, **options: Any) -> list[list[int]]:
    return torch.stack(list(generate_tokens(model, tokens, count, **options)), dim=1).tolist()


@parametrize_forms
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_row_gives_what_it_gives_alone(
    form: str, sampling: str, lengths: tuple[int, ...], use_cache: bool
) -> None:
    model, tokens = model_of(form), prompts_of(lengths)
    options: dict[str, Any] = {"sampling": SAMPLINGS[sampling], "seed": 5}
    expected = [
        alone(model, row[:length], 13, SAMPLINGS[sampling], 5 + i)
        for i, (row, length) in enumerate(zip(tokens, lengths, strict=True))
    ]
    found = together(model, tokens, 13, lengths=lengths, use_cache=use_cache, **options)
    assert found == expected


def test_the_tokens_that_these_tests_compare_are_not_all_alike() -> None:
    model, tokens = model_of("gpt2"), prompts_of(LENGTHS[1])
    rows = together(model, tokens, 13, lengths=LENGTHS[1], sampling=SAMPLINGS["seeded"])
    assert len({tuple(row) for row in rows}) == 5
    assert all(len(set(row)) > 3 for row in rows)
    plain = together(model, tokens, 13, lengths=LENGTHS[1])
    penalised = together(
        model, tokens, 13, lengths=LENGTHS[1], sampling=SAMPLINGS["greedy, penalised"]
    )
    assert all(one != other for one, other in zip(plain, penalised, strict=True))


def begun(model: GPT, lengths: Sequence[int], count: int) -> Engine:
    """An engine that is about to continue prompts by nearly random tokens."""
    prompts = checked_rows(prompts_of(lengths), lengths)
    sampling = SamplingSettings(temperature=50)
    return engine_for(model, jobs_of(model, prompts, count, sampling=sampling, seed=8), None)


def every_step(engine: Engine, check: Callable[[Tensor], None]) -> int:
    """Run an engine to its end, and look at the logits (B, V) of each step; how many there were."""
    read, steps = engine.slots.read, 0

    def looked_at(spans: Sequence[Span]) -> Tensor:
        logits = read(spans)
        check(logits)
        return logits

    engine.slots.read = looked_at  # type: ignore[method-assign]
    while not engine.idle:
        engine.step(0.0)
        steps += 1
    return steps


@parametrize_forms
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_logits_of_prefill_and_decode_are_the_plain_forwards(
    form: str, lengths: tuple[int, ...]
) -> None:
    model = model_of(form)
    engine = begun(model, lengths, 13)
    errors, seen = [], []

    def check(logits: Tensor) -> None:
        texts = [turn.writer.text for turn in engine.turns]
        seen.append([len(text) for text in texts])
        for row, text in enumerate(texts):
            expected = model(torch.tensor([text[-LIMIT:]])).logits[0, -1]
            errors.append(((logits[row] - expected).norm() / expected.norm()).item())

    assert every_step(engine, check) == 13
    assert len(errors) == 13 * len(lengths)
    assert max(errors) < 1e-5
    assert seen == [[length + step for length in lengths] for step in range(13)]


@parametrize_forms
def test_what_the_padding_holds_changes_nothing(form: str) -> None:
    model, lengths, seen = model_of(form), (3, 1, 7), []
    for padding in (0, 36, -1, 10**9):
        options: dict[str, Any] = {"lengths": lengths, "sampling": SAMPLINGS["penalised"]}
        tokens = prompts_of(lengths, width=9, padding=padding)
        before = tokens.clone()
        seen.append(together(model, tokens, 13, **options))
        assert torch.equal(tokens, before)
    assert all(found == seen[0] for found in seen)


@parametrize_forms
def test_nothing_leaks_from_what_the_cache_held_before(form: str) -> None:
    model, lengths = model_of(form), (3, 1, 7, 10)
    found: list[list[Tensor]] = []
    for before in (0.0, 1e30):
        engine = begun(model, lengths, 10)
        engine.slots.cache.keys.fill_(before)
        engine.slots.cache.values.fill_(-before)
        found.append([])
        every_step(engine, found[-1].append)
    for clean, filled in zip(*found, strict=True):
        assert filled.isfinite().all()
        assert torch.equal(clean, filled)


def test_the_cache_is_allocated_once() -> None:
    engine, places, held = begun(model_of("modern"), (3, 9, 15, 7), 10), set(), []
    cache = engine.slots.cache
    shape = cache.keys.shape
    assert shape == (2, 4, LIMIT, 2, 4)

    def check(_: Tensor) -> None:
        assert cache.keys.shape == shape
        places.add((cache.keys.data_ptr(), cache.values.data_ptr()))
        held.append([len(text) for text in engine.slots.texts])

    every_step(engine, check)
    assert engine.slots.cache is cache
    assert len(places) == 1
    assert held[0] == [3, 9, 0, 7]
    assert held[8] == [11, 0, 0, 0]
    assert held[9] == [0, 0, 0, 0]  # the shortest row crosses the limit, and no row is cached


def test_the_cache_is_as_large_as_what_it_will_hold() -> None:
    model = model_of("gpt2")
    assert begun(model, (3, 15, 5), 4).slots.capacity == 9
    assert begun(model, (12, 15), 4).slots.capacity == 1  # no row is cached


def test_rows_past_the_limit_are_read_together_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, passes, features = model_of("gpt2"), [], GPT.features
    monkeypatch.setattr(
        GPT, "features", lambda *inputs: passes.append(inputs[1].shape) or features(*inputs)
    )
    together(model, prompts_of((9, 10, 4)), 5, lengths=(9, 10, 4))
    prefill, cached, one, two = (3, 10), (3, 1), (1, 11), (2, 11)
    assert passes == [prefill, cached, cached, one, cached, two, cached, two]


def test_equal_lengths_need_no_index() -> None:
    """Said or unsaid; they write slices, and causality is the kernel's own."""
    model = model_of("gpt2")
    engine = begun(model, (4, 4), 5)
    every_step(engine, lambda _: None)
    assert engine.slots.cache.ends is None
    said = together(model, prompts_of((4, 4), width=6), 13, lengths=[4, 4])
    assert said == together(model, prompts_of((4, 4), width=6)[:, :4], 13)


def test_a_draft_takes_the_length_of_its_row() -> None:
    model = scrambled(GPTConfig(**(TINY | {"context_length": 40})))
    tokens = torch.tensor([[3, 1, 4, 1, 0, 0]])
    options: dict[str, Any] = {"sampling": SAMPLINGS["seeded"], "draft": FromText()}
    found = together(model, tokens, 45, lengths=[4], **options)
    assert found == together(model, tokens[:, :4], 45, sampling=SAMPLINGS["seeded"])


@pytest.mark.parametrize("lengths", [(0, 3), (6, 1), (2,), (2, 2, 2), ()])
def test_lengths_that_cannot_be_are_refused(lengths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"lengths is \[.*\]: for each of 2 rows 1 to 5 is needed"):
        next(
            generate_tokens(
                model_of("gpt2"), torch.ones(2, 5, dtype=torch.long), 3, lengths=lengths
            )
        )


def test_ids_outside_the_vocabulary_count_where_they_are_text() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 37, 0]])
    assert len(list(generate_tokens(model_of("gpt2"), tokens, 2, lengths=[3, 1]))) == 2
    with pytest.raises(ValueError, match="outside the vocabulary"):
        next(generate_tokens(model_of("gpt2"), tokens, 2, lengths=[3, 2]))


# -- the cache and attention by themselves


@parametrize_forms
def test_chunks_continue_rows_of_different_lengths(form: str) -> None:
    model, lengths = model_of(form), [2, 6, 1]
    tokens, more = prompts_of(lengths), prompts_of((3, 3, 3))
    cache = KVCache(model.config, 3, capacity=9)
    with torch.no_grad():
        model(tokens, cache=cache)
        cache.rewind(lengths)
        logits = model(more, cache=cache).logits  # (3, 3, V)
        assert cache.lengths == [5, 9, 4]
        assert cache.length == 9
        for row, length in enumerate(lengths):
            text = torch.cat([tokens[row, :length], more[row]]).unsqueeze(0)
            expected = model(text).logits[0, -3:]
            assert (logits[row] - expected).norm() / expected.norm() < 1e-5
        with pytest.raises(ValueError, match="10 tokens do not fit a cache of 9"):
            model(more[:, :1], cache=cache)
        with pytest.raises(ValueError, match="12 tokens are more than the context_length of 11"):
            model(more, cache=cache)


def test_a_cache_goes_back_row_by_row() -> None:
    cache = KVCache(GPTConfig(**TINY), 3, capacity=8)
    cache.advance(6)
    assert cache.row_positions(2) is None
    cache.rewind([2, 6, 0])
    positions = cache.row_positions(2)
    assert positions is not None
    assert positions.tolist() == [[2, 3], [6, 7], [0, 1]]
    cache.advance(2)
    assert cache.lengths == [4, 8, 2]
    positions = cache.row_positions(1)
    assert positions is not None
    assert positions.tolist() == [[4], [8], [2]]
    wrong: list[tuple[int | list[int], str]] = [
        ([4, 8], "of 3 rows cannot go back to 2 lengths"),
        ([5, 8, 2], "of 4 tokens cannot go back to 5"),
        ([4, -1, 2], "of 8 tokens cannot go back to -1"),
        (3, "of 2 tokens cannot go back to 3"),
    ]
    for lengths, message in wrong:
        with pytest.raises(ValueError, match=message):
            cache.rewind(lengths)
    assert cache.lengths == [4, 8, 2]
    cache.rewind(2)
    assert cache.row_positions(1) is None


# -- as text


def test_prompts_complete_as_each_streams() -> None:
    config = GPTConfig(**(TINY | {"vocab_size": 257, "context_length": 23}))
    model, tokenizer = scrambled(config), byte_tokenizer()
    prompts = ["ab", "", "a prompt that is longer than the context", "abcdefg"]
    texts = complete(model, tokenizer, prompts, num_samples=2, max_tokens=30, seed=5)
    expected = [
        "".join(stream(model, tokenizer, prompt, max_tokens=30, seed=5 + 2 * j + k))
        for j, prompt in enumerate(prompts)
        for k in range(2)
    ]
    assert texts == expected
    assert len(set(texts)) == 8
    assert complete(model, tokenizer, prompts, max_tokens=0) == [""] * 4
    with pytest.raises(ValueError, match="with a token is needed"):
        complete(model, tokenizer, [])
