"""The kernel and blocks of products are the formula: values, gradients, dropout, bfloat16."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.model.attention import WAYS, Attention, by_blocks
from gptsmith.model.gpt import attention
from tests.conftest import TINY, scrambled


def heads(T: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys, values and a gradient, (2, 3, T, 8), laid out as the model's are."""
    torch.manual_seed(T)
    return [torch.randn(2, T, 3, 8).to(dtype).transpose(1, 2) for _ in range(4)]


def with_gradients(inputs: list[Tensor], attend: Attention = attention) -> list[Tensor]:
    """What attention gives, and the gradients of query, key and value."""
    q, k, v = (part.clone().requires_grad_() for part in inputs[:3])
    y = attend(q, k, v, 0.0, None)
    return [y, *torch.autograd.grad(y, (q, k, v), inputs[3])]


@pytest.mark.parametrize("T", [2, 7, 127, 128, 129, 300])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_formula_to_the_last_digits(way: str, T: int) -> None:
    inputs = heads(T)
    found, expected = with_gradients(inputs, WAYS[way]), with_gradients(inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("way", [attention, *WAYS.values()])
def test_it_is_what_pytorchs_own_function_computes(way: Attention) -> None:
    q, k, v, _ = heads(9)
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(way(q, k, v, 0.0, None), whole)
    # A chunk of a prefill hangs from the lower right; one token sees everything.
    torch.testing.assert_close(way(q[:, :, 5:], k, v, 0.0, None), whole[:, :, 5:])
    torch.testing.assert_close(way(q[:, :, 8:], k, v, 0.0, None), whole[:, :, 8:])
    # Rows of different lengths: each sees the keys up to its own position.
    positions = torch.tensor([[3], [8]])
    rows = way(torch.stack((q[0, :, 3:4], q[1, :, 8:9])), k, v, 0.0, positions)
    torch.testing.assert_close(rows, torch.stack((whole[0, :, 3:4], whole[1, :, 8:9])))


@pytest.mark.parametrize("T", [5, 130])
def test_dropout_drops_weights_and_the_gradient_knows(T: int) -> None:
    """Against autograd through the plain formula, with the same draws."""
    q, k, v, dy = heads(T)
    inputs = [part.clone().requires_grad_() for part in (q, k, v)]
    torch.manual_seed(3)
    y = by_blocks(*inputs, 0.4)
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
    assert not torch.allclose(y, by_blocks(q, k, v))


def test_bfloat16_stays_within_its_rounding() -> None:
    exact = with_gradients(heads(200))
    rounded = with_gradients(heads(200, torch.bfloat16), by_blocks)
    for one, other in zip(rounded, exact, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 0.01  # eps is 0.008; the kernel itself is at 0.004 to 0.006


def test_the_model_says_the_same_every_way() -> None:
    config = GPTConfig(**TINY)
    model = scrambled(config)
    tokens = torch.randint(37, (2, 11))
    expected = model(tokens).logits
    for way in (attention, by_blocks):
        model.attend_by(way)
        found, first = model(tokens).logits, model(tokens[:, :1]).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(first, expected[:, :1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", [attention, *WAYS.values()])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("G", [6, 2])
def test_queries_see_no_key_beyond_their_position(way: Attention, T: int, G: int) -> None:
    torch.manual_seed(T)
    q, k, v = torch.randn(2, 6, T, 4), torch.randn(2, G, 8, 4), torch.randn(2, G, 8, 4)
    starts = (8 - T, 2)
    positions = torch.tensor([[start + t for t in range(T)] for start in starts])
    shared = (part.repeat_interleave(6 // G, dim=1) for part in (k, v))
    y = way(q, *shared, 0.0, positions)
    for row, start in enumerate(starts):
        for head in range(6):
            for t in range(T):
                seen, group = start + t + 1, head // (6 // G)
                weights = (k[row, group, :seen] @ q[row, head, t] / 2).softmax(0)  # / sqrt(4)
                torch.testing.assert_close(y[row, head, t], weights @ v[row, group, :seen])


def test_dropout_of_the_model_reaches_the_blocks() -> None:
    model = GPT(GPTConfig(**TINY, dropout=0.3)).train()
    model.attend_by(by_blocks)
    tokens = torch.randint(37, (2, 11))
    torch.manual_seed(0)
    one = model(tokens).logits
    torch.manual_seed(0)
    assert torch.equal(one, model(tokens).logits)
    assert not torch.equal(one, model(tokens).logits)
