"""The filters against their definitions, and the draw against the distribution it should have."""

import pytest
import torch

from gptsmith.config.settings import GREEDY, SamplingSettings
from gptsmith.generation.sampling import (
    NotFiniteError,
    drawn,
    filtered,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_token,
)

SEEN = torch.zeros(2, 1, dtype=torch.long)


def logits_of(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_top_k_keeps_the_k_likeliest_of_each_row() -> None:
    logits = logits_of([0.1, 0.5, 0.1, 0.3], [0.4, 0.1, 0.3, 0.2])
    assert kept(keep_top_k(logits, 2)) == [[1, 3], [0, 2]]
    for k in (4, 5, 1 << 40):
        assert kept(keep_top_k(logits, k)) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(
    ("p", "expected"), [(0.01, [1]), (0.5, [1]), (0.51, [1, 3]), (0.8, [1, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_fewest_that_reach_p(p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(logits_of([0.125, 0.5, 0.0625, 0.3125]), p)) == [expected]


def test_min_p_is_relative_to_the_likeliest() -> None:
    logits = logits_of([0.06, 0.6, 0.04, 0.3], [0.25, 0.25, 0.25, 0.25])
    assert kept(keep_min_p(logits, 0.09)) == [[0, 1, 3], [0, 1, 2, 3]]


def test_repetition_penalty_lowers_seen_tokens_of_either_sign() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, -1.0]])
    settings = SamplingSettings(temperature=0, repetition_penalty=2.0)
    found = filtered(logits, torch.tensor([[0, 1, 1]]), settings)
    assert found.tolist() == [[1.0, -4.0, 1.0, -1.0]]


def test_temperature_zero_is_greedy_and_needs_no_generator() -> None:
    logits = logits_of([0.1, 0.5, 0.1, 0.3], [0.4, 0.1, 0.3, 0.2])
    assert next_token(logits, SEEN, GREEDY, []).tolist() == [1, 0]


def test_draws_follow_the_distribution() -> None:
    """20,000 draws; each frequency within five standard errors of its probability."""
    probabilities = [0.05, 0.6, 0.0, 0.35]
    count = 20_000
    logits = logits_of(probabilities).expand(count, -1)
    seen = torch.zeros(count, 1, dtype=torch.long)
    drawn = next_token(logits, seen, SamplingSettings(temperature=1.0), generators(*range(count)))
    for token, probability in enumerate(probabilities):
        error = (probability * (1 - probability) / count) ** 0.5
        frequency = (drawn == token).double().mean().item()
        assert abs(frequency - probability) <= 5 * error, token


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    logits, settings = torch.randn(3, 50), SamplingSettings(temperature=1.0, top_k=20, top_p=0.9)
    seen = torch.zeros(3, 1, dtype=torch.long)
    together = next_token(logits, seen, settings, generators(5, 6, 7))
    alone = [
        next_token(logits[i : i + 1], seen[:1], settings, generators(5 + i)).item()
        for i in range(3)
    ]
    assert together.tolist() == alone


def large(*exponents: float) -> torch.Tensor:
    """Logits of a vocabulary of 3,001 tokens in which each row falls off at another pace."""
    ranks = torch.arange(1, 3002).log()
    shuffled = [torch.randperm(3001, generator=g) for g in generators(*range(len(exponents)))]
    return torch.stack(
        [-power * ranks[order] for power, order in zip(exponents, shuffled, strict=True)]
    )


@pytest.mark.parametrize("p", [0.3, 0.9, 0.999, 1.0])
def test_top_p_of_a_large_vocabulary_is_that_of_a_whole_sort(p: float) -> None:
    logits = large(0.0, 0.5, 1.0, 3.0)  # the first has equals alone
    for row, found in zip(logits, kept(keep_top_p(logits, p)), strict=True):
        ordered, order = row.double().softmax(-1).sort(descending=True, stable=True)
        needed = int((ordered.cumsum(-1) - ordered < p - 1e-6).sum())
        assert set(order[:needed].tolist()) <= set(found)
        assert set(found) <= set(order[: needed + 1 + (p == 1.0) * 3001].tolist())
    assert keep_top_p(logits, p).equal(torch.cat([keep_top_p(row[None], p) for row in logits]))


def test_a_draw_from_a_large_vocabulary_inverts_the_distribution() -> None:
    probabilities = large(0.0, 1.0, 3.0).softmax(-1).index_fill(1, torch.arange(0, 3001, 7), 0.0)
    cumulative = probabilities.double().cumsum(-1)
    for number in (0.0, 1e-9, 0.1, 0.37, 0.5, 0.83, 0.9999, 1 - 2**-53):
        draws = torch.full((3, 1), number, dtype=torch.float64)
        tokens = drawn(probabilities, draws).unsqueeze(-1)  # (3, 1)
        assert (probabilities.gather(-1, tokens) > 0).all()
        height, ends = number * cumulative[:, -1:], cumulative.gather(-1, tokens)
        assert (ends > height - 1e-6).all()
        assert (ends - probabilities.gather(-1, tokens) <= height + 1e-6).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error_not_a_token(temperature: float) -> None:
    logits = torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])
    with pytest.raises(NotFiniteError, match="weights have diverged"):
        next_token(logits, SEEN, SamplingSettings(temperature=temperature), generators(1, 2))


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"top_k": 0}, "top_k is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_impossible_settings_are_refused(choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**choices)
