"""The loss without all the logits is cross entropy: values and gradients, however it is divided."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.config import cost
from gptsmith.model.loss import head_loss, mean_loss
from tests.conftest import TINY, scrambled


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features (2, 13, 6), a head (37, 6) and targets (2, 13), some of which count for nothing."""
    torch.manual_seed(0)
    features, head = torch.randn(2, 13, 6, dtype=dtype), torch.randn(37, 6, dtype=dtype)
    targets = torch.randint(37, (2, 13))
    targets[0, 3:6] = -1
    return features.requires_grad_(), head.requires_grad_(), targets


@pytest.mark.parametrize("logits_at_once", [1, 37, 100, 37 * 9, 1 << 24])
def test_it_is_cross_entropy_and_its_gradient(
    logits_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "LOGITS_AT_ONCE", logits_at_once)
    features, head, targets = problem()
    found = head_loss(features, head, targets)
    expected = F.cross_entropy(
        (features @ head.T).flatten(0, 1), targets.flatten(), ignore_index=-1
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(found * 3, (features, head))
    theirs = torch.autograd.grad(expected * 3, (features, head))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_nothing_to_learn_is_zero() -> None:
    features, head, targets = problem()
    found = head_loss(features, head, torch.full_like(targets, -1))
    assert found.item() == 0.0
    for gradient in torch.autograd.grad(found, (features, head)):
        assert not gradient.any()


def test_unlikely_targets_stay_finite() -> None:
    """As mean_loss: a target 200 nats down, where its probability is 0 in float32."""
    features, head = torch.tensor([[[1.0]]]), torch.tensor([[0.0], [200.0]], requires_grad=True)
    targets = torch.tensor([[0]])
    found = head_loss(features, head, targets)
    assert found.item() == pytest.approx(200.0)
    assert mean_loss(features @ head.T, targets).item() == pytest.approx(200.0)
    (gradient,) = torch.autograd.grad(found, head)
    assert gradient.flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("tie_weights", [True, False])
def test_the_model_loses_the_same(tie_weights: bool) -> None:
    model = scrambled(GPTConfig(**TINY, tie_weights=tie_weights)).double()
    tokens, targets = torch.randint(37, (3, 11)), torch.randint(-1, 37, (3, 11))
    expected = model(tokens, targets).loss
    assert expected is not None
    found = model.loss(tokens, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    expected.backward()
    theirs = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    found.backward()
    for one, parameter in zip(theirs, model.parameters(), strict=True):
        assert one is not None
        torch.testing.assert_close(parameter.grad, one, rtol=1e-9, atol=1e-12)


def test_autocast_multiplies_in_bfloat16_and_leaves_float32_gradients() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    tokens, targets = torch.randint(37, (3, 11)), torch.randint(37, (3, 11))
    exact = model.loss(tokens, targets)
    exact.backward()
    expected = model.lm_head.weight.grad
    assert expected is not None
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.loss(tokens, targets)
    rounded.backward()
    found = model.lm_head.weight.grad
    assert rounded.dtype == torch.float32
    assert found is not None
    assert found.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=2e-3)
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_without_gradients_none_are_found() -> None:
    features, head, targets = problem()
    with torch.no_grad():
        assert not head_loss(features, head, targets).requires_grad
