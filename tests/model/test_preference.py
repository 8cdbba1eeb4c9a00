"""Log-probabilities of answers and DPO's loss: as the definitions say, whatever the division."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.config import cost
from gptsmith.config.model import MODERN
from gptsmith.machine.native import open_library
from gptsmith.model.dropout import dropout_seeds
from gptsmith.model.fused import SOURCE, fuse
from gptsmith.model.preference import (
    PreferenceLoss,
    answer_logprobs,
    preference,
    preference_loss,
    target_logprobs,
)
from tests.conftest import TINY, scrambled

LN2 = math.log(2)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features (3, 13, 6), a head (37, 6) and targets (3, 13); of the second row none counts."""
    torch.manual_seed(0)
    features, head = torch.randn(3, 13, 6, dtype=dtype), torch.randn(37, 6, dtype=dtype)
    targets = torch.randint(37, (3, 13))
    targets[0, 3:6] = targets[1] = targets[2, :9] = -1
    return features.requires_grad_(), head.requires_grad_(), targets


def by_definition(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    logprobs = (features @ head.T).log_softmax(-1)
    chosen = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (chosen * (targets != -1)).sum(1)


@pytest.mark.parametrize("logits_at_once", [1, 37, 100, 37 * 9, 1 << 24])
def test_logprobs_and_their_gradient(logits_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "LOGITS_AT_ONCE", logits_at_once)
    features, head, targets = problem()
    found, expected = (way(features, head, targets) for way in (target_logprobs, by_definition))
    assert found[1] == 0.0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    weights = torch.tensor([0.3, 5.0, -2.0])  # a loss that is not linear weighs every row its way
    ours = torch.autograd.grad((found * weights).sum(), (features, head))
    theirs = torch.autograd.grad((expected * weights).sum(), (features, head))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_finite_differences_agree() -> None:
    features, head, targets = problem()
    torch.autograd.gradcheck(lambda *x: target_logprobs(*x, targets), (features, head))


def test_nothing_counted_is_zero() -> None:
    features, head, targets = problem()
    found = target_logprobs(features, head, torch.full_like(targets, -1))
    assert found.tolist() == [0.0, 0.0, 0.0]
    for gradient in torch.autograd.grad(found.sum(), (features, head)):
        assert not gradient.any()


def test_a_frozen_head_costs_no_gradient() -> None:
    features, head, targets = problem()
    expected = torch.autograd.grad(by_definition(features, head, targets).sum(), features)
    head.requires_grad_(False)
    found = torch.autograd.grad(target_logprobs(features, head, targets).sum(), features)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_unlikely_targets_stay_finite() -> None:
    features, head = torch.tensor([[[1.0]]]), torch.tensor([[0.0], [200.0]], requires_grad=True)
    found = target_logprobs(features, head, torch.tensor([[0]]))
    assert found.item() == pytest.approx(-200.0)
    (gradient,) = torch.autograd.grad(found.sum(), head)
    assert gradient.flatten().tolist() == [1.0, -1.0]


def test_autocast_multiplies_in_bfloat16_and_sums_in_more() -> None:
    features, head, targets = problem(torch.float32)
    exact = target_logprobs(features, head, targets)
    expected = torch.autograd.grad(exact.sum(), (features, head))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = target_logprobs(features, head, targets)
    found = torch.autograd.grad(rounded.sum(), (features, head))
    assert (exact.dtype, rounded.dtype) == (torch.float64, torch.float64)
    torch.testing.assert_close(rounded, exact, rtol=5e-3, atol=0)
    assert not rounded.equal(exact)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


def pairs(P: int = 5, T: int = 11, V: int = 37) -> tuple[Tensor, Tensor]:
    """Tokens and targets (P, 2, T): a common prompt, answers and padding of different lengths."""
    torch.manual_seed(1)
    tokens, targets = torch.randint(V, (P, 2, T)), torch.full((P, 2, T), -1)
    for pair in range(P):
        prompt = 1 + pair % 4
        tokens[pair, 1, :prompt] = tokens[pair, 0, :prompt]
        for answer in range(2):
            end = min(T - 1, prompt + 3 + 2 * answer + pair)
            targets[pair, answer, prompt - 1 : end] = tokens[pair, answer, prompt : end + 1]
            tokens[pair, answer, end + 1 :] = 0
    return tokens, targets


def test_the_loss_is_the_formula_and_margins_are_rewards() -> None:
    logprobs = torch.tensor([[-3.0, -5.0], [-4.0, -1.0], [-2.0, -2.0]], dtype=torch.float64)
    reference = torch.tensor([[-4.0, -4.0], [-4.0, -3.0], [-1.0, -1.0]], dtype=torch.float64)
    found = preference_loss(logprobs, reference, beta=0.5)
    expected = [0.5 * (1 + 1), 0.5 * (0 - 2), 0.5 * (-1 + 1)]
    assert found.margins.tolist() == expected
    assert found.loss.item() == pytest.approx(
        sum(math.log1p(math.exp(-margin)) for margin in expected) / 3
    )
    assert found.accuracy.item() == pytest.approx(1 / 3)  # a tie is no preference


@pytest.mark.parametrize("shape", [{}, {"tie_weights": False}, MODERN | {"n_embd": 24}])
def test_the_gradient_is_that_of_all_the_logits(shape: dict[str, Any]) -> None:
    model = scrambled(GPTConfig(**(TINY | shape))).double()
    other = scrambled(model.config, seed=1).double()
    tokens, targets = pairs()
    with torch.no_grad():
        reference = answer_logprobs(other, tokens, targets)
    found = preference(model, tokens, targets, reference, 0.3)
    logits = model(tokens.flatten(0, 1)).logits.log_softmax(-1).view(*tokens.shape, -1)
    nats = logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -1)
    chosen, rejected = (nats.sum(-1) - reference).unbind(1)
    expected = -F.logsigmoid(0.3 * (chosen - rejected)).mean()
    torch.testing.assert_close(found.loss, expected, rtol=1e-10, atol=0)
    ours = torch.autograd.grad(found.loss, list(model.parameters()))
    theirs = torch.autograd.grad(expected, list(model.parameters()))
    for one, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("reference_at_once", [1, 2, 5])
@pytest.mark.parametrize("pairs_at_once", [1, 3, 5])
def test_the_first_loss_is_ln_2(pairs_at_once: int, reference_at_once: int) -> None:
    """In float32, however the pairs are divided, and padded to the longest of their micro-batch."""
    model = GPT(GPTConfig(vocab_size=500, context_length=128, n_layer=3, n_head=4, n_embd=64))
    tokens, targets = pairs(5, 128, 500)

    def micro(count: int) -> list[tuple[Tensor, Tensor]]:
        """Parts of so many pairs, without the padding that none of them needs."""
        split = zip(tokens.split(count), targets.split(count), strict=True)
        ends = [int((part != -1).nonzero()[:, -1].max()) + 1 for part in targets.split(count)]
        return [(x[..., :end], y[..., :end]) for (x, y), end in zip(split, ends, strict=True)]

    with torch.no_grad():
        parts = [answer_logprobs(model, *part) for part in micro(reference_at_once)]
    references = torch.cat(parts).split(pairs_at_once)
    model.train()
    for part, reference in zip(micro(pairs_at_once), references, strict=True):
        found = preference(model, *part, reference, 0.1)
        assert found.loss.item() == pytest.approx(LN2, abs=1e-6)
        assert found.margins.abs().max() < 1e-5


def test_both_answers_of_a_pair_lose_the_same_to_dropout() -> None:
    config = GPTConfig(**(TINY | {"dropout": 0.3}))
    model = scrambled(config).train()
    tokens, targets = pairs()
    tokens[:, 1], targets[:, 1] = tokens[:, 0], targets[:, 0]
    seeds = dropout_seeds(0, 1, torch.arange(5), config.n_layer)
    found = answer_logprobs(model, tokens, targets, seeds)
    assert found[:, 0].equal(found[:, 1])
    assert not found.equal(answer_logprobs(model, tokens, targets, seeds + 1))
    # Pairs do not depend on their micro-batch.
    alone = torch.cat(
        [
            answer_logprobs(model, *part)
            for part in zip(tokens.split(2), targets.split(2), seeds.split(2), strict=True)
        ]
    )
    torch.testing.assert_close(alone, found, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("own_cache")
def test_the_fused_block_prefers_the_same() -> None:
    tokens, targets = pairs()
    model = scrambled(GPTConfig(**TINY))
    expected = answer_logprobs(model, tokens, targets)
    fuse(model, open_library(SOURCE))
    torch.testing.assert_close(answer_logprobs(model, tokens, targets), expected)


@pytest.mark.parametrize("pairs_at_once", [1, 2, 4])
def test_a_batch_may_be_divided(pairs_at_once: int) -> None:
    """As the loop weighs micro-batches: the gradient is that of the whole batch, dropout too."""
    config = GPTConfig(**(TINY | {"dropout": 0.2}))
    model, objective = scrambled(config).double().train(), PreferenceLoss(beta=0.3)
    tokens, targets = pairs()
    reference = torch.randn(5, 2, dtype=torch.float64)
    whole = tokens, targets, reference, dropout_seeds(0, 1, torch.arange(5), config.n_layer)
    expected = torch.autograd.grad(objective.loss(model, *whole), list(model.parameters()))
    for part in zip(*(each.split(pairs_at_once) for each in whole), strict=True):
        share = objective.counted(*part) / objective.counted(*whole)
        (objective.loss(model, *part) * share).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which the compiler looks at
def test_a_compiled_loss_is_the_same_and_compiled_once() -> None:
    """However many tokens count, which no graph knows: the product with the head is in none."""
    model, objective = scrambled(GPTConfig(**TINY)).train(), PreferenceLoss(beta=0.3)
    tokens, targets = pairs()
    reference = torch.randn(5, 2, dtype=torch.float64)
    graphs: list[torch.fx.GraphModule] = []

    def kept(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(partial(objective.loss, model), backend=kept)
    made = 0
    for left_out in range(4):
        targets[:, :, :left_out] = -1
        batch = tokens, targets, reference
        found, expected = compiled(*batch), objective.loss(model, *batch)
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(x, [*model.parameters()]) for x in (found, expected)]
        torch.testing.assert_close(*gradients)
        made = made or len(graphs)
    assert len(graphs) == made
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("layer_norm" in name for name in called)
    assert not any("nonzero" in name or "Logprobs" in name for name in called)
