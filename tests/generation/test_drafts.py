"""Drafts change how fast tokens come, and never which."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptsmith
from gptsmith import GPT, GPTConfig, SamplingSettings
from gptsmith.cli.main import main
from gptsmith.config.settings import GREEDY
from gptsmith.generation.drafts import Draft, FromModel, FromText
from gptsmith.generation.engine import MOST_GUESSED
from gptsmith.generation.writing import generate_tokens
from gptsmith.tokenizers import byte_tokenizer, char_tokenizer
from tests.conftest import TINY, scrambled

ROOMY = TINY | {"context_length": 40}
SAMPLINGS = {
    "greedy": GREEDY,
    "seeded": SamplingSettings(temperature=0.9, top_k=20),
    "penalised": SamplingSettings(temperature=0.7, repetition_penalty=1.5),
}


class Oracle:
    """Knows what is to come, and may lie about every n-th token."""

    def __init__(self, text: list[int], lies: int | None = None) -> None:
        self.text, self.lies = torch.tensor(text), lies
        self.asked = 0

    def guess(self, tokens: Tensor, most: int) -> Tensor:
        self.asked += 1
        guess = self.text[len(tokens) : len(tokens) + most].clone()
        if self.lies is not None:
            guess[self.lies - 1 :: self.lies] = (guess[self.lies - 1 :: self.lies] + 1) % 37
        return guess


def run(model: GPT, tokens: Tensor, count: int, **options: Any) -> list[int]:
    return [int(chosen) for chosen in generate_tokens(model, tokens, count, **options)]


def drafts(model: GPT, tokens: Tensor, expected: list[int]) -> dict[str, Draft]:
    whole = [*tokens[0].tolist(), *expected]
    small = scrambled(GPTConfig(**(TINY | {"n_layer": 1, "context_length": 17})), seed=4)
    return {
        "text": FromText(),
        "small model": FromModel(small),
        "the model itself": FromModel(model),
        "oracle": Oracle(whole),
        "liar": Oracle(whole, lies=1),
        "now and then a liar": Oracle(whole, lies=3),
    }


@pytest.mark.parametrize("name", drafts(GPT(GPTConfig(**TINY)), torch.zeros(1, 1), []))
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("count", [1, 23, 60])  # 60 goes beyond the context
def test_the_tokens_are_those_of_plain_decoding(name: str, sampling: str, count: int) -> None:
    model = scrambled(GPTConfig(**ROOMY))
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    options: dict[str, Any] = {"sampling": SAMPLINGS[sampling], "seed": 7}
    expected = run(model, tokens, count, **options)
    draft = drafts(model, tokens, expected)[name]
    assert run(model, tokens, count, **options, draft=draft) == expected


def test_right_guesses_save_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = scrambled(GPTConfig(**ROOMY))
    tokens = torch.tensor([[3, 1, 4]])
    expected = run(model, tokens, 27, sampling=GREEDY)
    passes = []
    features = GPT.features
    monkeypatch.setattr(
        GPT, "features", lambda *inputs: passes.append(inputs[1].shape) or features(*inputs)
    )
    oracle = Oracle([3, 1, 4, *expected])
    assert run(model, tokens, 27, sampling=GREEDY, draft=oracle) == expected
    assert len(passes) == 27 // (MOST_GUESSED + 1)
    assert passes[0] == (1, 3 + MOST_GUESSED)


@pytest.mark.parametrize(
    ("tokens", "most", "guess"),
    [
        ([1, 2, 3, 9, 8, 1, 2, 3], 4, [9, 8, 1, 2]),  # what followed the passage
        ([1, 2, 3, 9, 8, 1, 2, 3], 1, [9]),
        ([1, 2, 5, 1, 2, 6, 1, 2], 2, [6, 1]),  # the last time rather than the first
        ([7, 2, 5, 1, 2], 3, [5, 1, 2]),  # by one token where no longer passage is known
        ([1, 2, 3], 4, []),
        ([4, 4, 4], 2, [4]),
        ([4], 2, []),
    ],
)
def test_guesses_from_the_text(tokens: list[int], most: int, guess: list[int]) -> None:
    assert FromText().guess(torch.tensor(tokens), most).tolist() == guess


def test_a_model_guesses_its_own_greedy_text_however_the_text_went_on() -> None:
    model = scrambled(GPTConfig(**ROOMY))
    draft = FromModel(model)
    for text in ([1, 2, 3], [1, 2, 3, 30, 31], [1, 2, 9], [5], [5, 6, 7, 8], [5, 6, 7, 8]):
        expected = run(model, torch.tensor([text]), 6, sampling=GREEDY)
        assert draft.guess(torch.tensor(text), 6).tolist() == expected


def test_a_model_guesses_no_further_than_its_context() -> None:
    draft = FromModel(scrambled(GPTConfig(**TINY)))  # of 11 tokens
    assert len(draft.guess(torch.arange(9), 6)) == 2
    assert len(draft.guess(torch.arange(11), 6)) == 0
    assert len(draft.guess(torch.arange(20), 6)) == 0


def test_a_draft_needs_one_row() -> None:
    model = scrambled(GPTConfig(**ROOMY))
    with pytest.raises(ValueError, match="one row of tokens, not 2"):
        next(generate_tokens(model, torch.ones(2, 3, dtype=torch.long), 4, draft=FromText()))


# -- at the door


TEXT = "the cat sat on the mat; the dog sat on the log; " * 3


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = char_tokenizer(TEXT)
    size = {"vocab_size": tokenizer.vocab_size, "context_length": 64}
    gptsmith.save(scrambled(GPTConfig(**(TINY | size))), tokenizer, "large")
    small = GPTConfig(**(TINY | size | {"n_layer": 1}))
    gptsmith.save(scrambled(small, seed=2), tokenizer, "small")
    gptsmith.save(scrambled(GPTConfig(**(TINY | {"vocab_size": 257}))), byte_tokenizer(), "bytes")


@pytest.mark.slow
@pytest.mark.usefixtures("folders")
def test_sample_with_a_draft(capsys: pytest.CaptureFixture) -> None:
    words = ["sample", "large", "--prompt", "the cat", "--max-tokens", "30", "--seed", "3"]
    assert main(words) == 0
    plain = capsys.readouterr().out
    for draft in ("text", "small", "large"):
        assert main([*words, "--draft", draft]) == 0
        assert capsys.readouterr().out == plain


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--draft", "bytes"], "the draft bytes has another tokenizer than large"),
        (["--draft", "smal"], "no model at smal, did you mean 'small'?"),
        (["--draft", "text", "--num-samples", "2"], "--draft needs a single text"),
        (
            ["--draft", "text", "--prompt", "a", "--prompt", "b"],
            "a single text: leave out --json and --num-samples",
        ),
        (["--draft", "text", "--json"], "--draft needs a single text"),
    ],
)
def test_a_draft_that_cannot_be(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["sample", "large", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.splitlines()[-1].startswith("gptsmith: ")
