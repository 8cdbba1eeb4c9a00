"""Generation: what is refused, and text that ends where it should. test_slots.py has the rows."""

from typing import Any

import pytest
import torch

from gptsmith import GPT, GPTConfig, generate_greedy
from gptsmith.config.settings import GREEDY, SamplingSettings
from gptsmith.generation.slots import Slots, Span
from gptsmith.generation.text import StopStrings
from gptsmith.generation.writing import complete, generate_tokens, stream
from gptsmith.tokenizers import byte_tokenizer, char_tokenizer
from tests.conftest import TINY, scrambled


def byte_model() -> GPT:
    return scrambled(GPTConfig(**(TINY | {"vocab_size": 257, "context_length": 23})))


def test_past_the_limit_the_last_context_is_seen() -> None:
    """The rule of both systems, restated: crop to context_length, take the last logits."""
    model = scrambled(GPTConfig(**TINY))
    tokens = torch.randint(37, (1, 30), generator=torch.Generator().manual_seed(0))
    expected = tokens
    for _ in range(6):
        logits = model(expected[:, -11:]).logits[:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert generate_greedy(model, tokens, 6).tolist() == expected.tolist()


def test_nothing_to_generate() -> None:
    model, tokens = scrambled(GPTConfig(**TINY)), torch.tensor([[1, 2]])
    assert list(generate_tokens(model, tokens, 0)) == []
    assert generate_greedy(model, tokens, 0).tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("tokens", "sampling", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.long), GREEDY, "with a token is needed"),
        (torch.tensor([[37]]), GREEDY, "outside the vocabulary: 0 to 36"),
        (torch.tensor([[-1]]), GREEDY, "outside the vocabulary"),
        (torch.tensor([[1]]), SamplingSettings(top_k=38), "top_k is 38: at most the vocabulary"),
    ],
)
def test_impossible_requests_are_refused(
    tokens: torch.Tensor, sampling: SamplingSettings, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        next(generate_tokens(GPT(GPTConfig(**TINY)), tokens, 3, sampling=sampling))


@pytest.mark.slow
def test_stream_and_complete_agree() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    texts = complete(model, tokenizer, "ab", num_samples=3, max_tokens=40, seed=5)
    for i, text in enumerate(texts):
        assert "".join(stream(model, tokenizer, "ab", max_tokens=40, seed=5 + i)) == text
    assert len(set(texts)) == 3


def test_an_empty_prompt_begins_somewhere() -> None:
    model = byte_model()
    assert isinstance("".join(stream(model, byte_tokenizer(), max_tokens=5)), str)
    letters = char_tokenizer("abc")  # no end of text and no newline to begin with
    tiny = scrambled(GPTConfig(**(TINY | {"vocab_size": 3})))
    assert set("".join(stream(tiny, letters, max_tokens=5))) <= set("abc")


def test_end_of_text_ends_the_text() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    with torch.no_grad():  # every token is followed by <|endoftext|>
        model.lm_head.weight.zero_()
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.lm_head.weight[256] = 1.0
    assert "".join(stream(model, tokenizer, "ab", max_tokens=9, temperature=0)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [[], ["q"], ["\n", "\x00"]])
def test_a_row_that_has_ended_is_not_read_on(stop: list[str], monkeypatch) -> None:
    model, tokenizer, read = byte_model(), byte_tokenizer(), []
    plain = Slots.read

    def counted(slots: Slots, spans: list[Span]) -> torch.Tensor:
        read.append(len(spans))
        return plain(slots, spans)

    prompts = [f"{i}" for i in range(24)]
    how: dict[str, Any] = {"max_tokens": 40, "temperature": 1.5}
    texts = ["".join(stream(model, tokenizer, p, seed=i, **how)) for i, p in enumerate(prompts)]
    expected = [text[: min([text.find(s) for s in stop if s in text] or [None])] for text in texts]
    how = {"max_tokens": 40, "sampling": SamplingSettings(temperature=1.5)}
    monkeypatch.setattr(Slots, "read", counted)
    assert complete(model, tokenizer, prompts, stop=stop, **how) == expected
    assert read[0] == 24
    assert read == sorted(read, reverse=True)
    if stop:
        assert read[-1] < 24


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["one two", " three"], ["two"], "one "),
        (["one t", "w", "o three"], ["two"], "one "),
        (["one tw", "ice"], ["two"], "one twice"),
        (["aab"], ["ab", "aa"], ""),
        (["abc", "abd"], ["cabd", "zz"], "ab"),
        (["ab", "ab", "abc"], ["ababc"], "ab"),
        (["xy"], [], "xy"),
        (["ends with o"], ["one"], "ends with o"),
    ],
)
def test_stop_strings_may_span_pieces(pieces: list[str], stop: list[str], expected: str) -> None:
    stops, found = StopStrings(stop), ""
    for piece in pieces:
        found += stops.push(piece)
        if stops.found:
            break
    assert found + stops.flush() == expected


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="stop string is empty"):
        StopStrings([""])
