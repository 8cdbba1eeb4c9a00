"""Attention in blocks is PyTorch's attention: values, gradients, dropout, and in bfloat16."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.model.attention import attend
from tests.conftest import TINY, scrambled


def heads(T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and a gradient, (2, 3, T, 8), laid out as the model's are."""
    torch.manual_seed(T)
    return [torch.randn(2, T, 3, 8).to(dtype).transpose(1, 2) for _ in range(4)]


def with_gradients(inputs: list[Tensor], **how: Any) -> list[Tensor]:
    """What attention gives, and the gradients of query, key and value."""
    q, k, v = (part.clone().requires_grad_() for part in inputs[:3])
    y = attend(q, k, v, **how)
    return [y, *torch.autograd.grad(y, (q, k, v), inputs[3])]


@pytest.mark.parametrize("T", [2, 7, 127, 128, 129, 300])
def test_blocks_are_the_kernel_to_the_last_digits(T: int) -> None:
    inputs = heads(T)
    found, expected = with_gradients(inputs, in_blocks=True), with_gradients(inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("T", [5, 130])
def test_dropout_drops_weights_and_the_gradient_knows(T: int) -> None:
    """Against autograd through the plain formula, with the same draws."""
    q, k, v, dy = heads(T)
    inputs = [part.clone().requires_grad_() for part in (q, k, v)]
    torch.manual_seed(3)
    y = attend(*inputs, 0.4, in_blocks=True)
    found = torch.autograd.grad(y, inputs, dy)
    torch.manual_seed(3)
    rows = []
    for start in range(0, T, 128):
        end = min(start + 128, T)
        scores = inputs[0][:, :, start:end] @ inputs[1][:, :, :end].mT / 8**0.5
        hidden = torch.ones(end - start, end).triu(start + 1).bool()
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        kept = torch.empty(6, end - start, end).double().bernoulli_(0.6).div_(0.6)
        rows.append((p * kept.view_as(p)) @ inputs[2][:, :, :end])
    plain = torch.cat(rows, dim=2)
    torch.testing.assert_close(y, plain)
    for one, other in zip(found, torch.autograd.grad(plain, inputs, dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(y, attend(q, k, v, in_blocks=True))


def test_bfloat16_stays_within_its_rounding() -> None:
    exact = with_gradients(heads(200))
    rounded = with_gradients(heads(200, torch.bfloat16), in_blocks=True)
    for one, other in zip(rounded, exact, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 0.01  # eps is 0.008; the kernel itself is at 0.004 to 0.006


def test_the_model_says_the_same_either_way_and_only_for_whole_texts() -> None:
    config = GPTConfig(**TINY)
    model = scrambled(config)
    tokens = torch.randint(37, (2, 11))
    expected = model(tokens).logits
    model.attend_in_blocks(True)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(tokens[:, :1]).logits, expected[:, :1], rtol=1e-4, atol=1e-4)


def test_a_chunk_of_a_prefill_hangs_from_the_lower_right() -> None:
    q, k, v, _ = heads(9)
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q[:, :, 5:], k, v, in_blocks=True), whole[:, :, 5:])


def test_dropout_of_the_model_reaches_the_blocks() -> None:
    model = GPT(GPTConfig(**TINY, dropout=0.3)).train()
    model.attend_in_blocks(True)
    tokens = torch.randint(37, (2, 11))
    torch.manual_seed(0)
    one = model(tokens).logits
    torch.manual_seed(0)
    assert torch.equal(one, model(tokens).logits)
    assert not torch.equal(one, model(tokens).logits)
