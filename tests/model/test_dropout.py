"""Masks from seeds: the stated hash, the same bits in C++, and random enough; places and ways."""

import copy
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.config.model import MODERN
from gptsmith.data import batches
from gptsmith.model import dropout
from gptsmith.model.attention import WAYS
from gptsmith.model.dropout import Dropout, Window, drop, dropout_seeds, is_kept
from gptsmith.model.gpt import attention
from tests.conftest import TINY, scrambled, some_tokens

BLOCKS: dict[str, dict[str, Any]] = {"gpt2": {}, "modern": MODERN}


def some_seeds(rows: int, first: int = 0) -> Tensor:
    """Those of the attention weights in the second block."""
    return dropout_seeds(7, 3, torch.arange(first, first + rows), n_layer=2)[:, 4]


def murmur(element: int, seed: int) -> int:
    """24 random bits, in Python's integers."""
    x = (element * 0x9E3779B9 + seed) & 0xFFFFFFFF
    for shift, factor, added in ((16, 0x85EBCA6B, seed), (13, 0xC2B2AE35, 0)):
        x = ((x ^ x >> shift) * factor + added) & 0xFFFFFFFF
    return (x ^ x >> 16) >> 8


def test_the_mask_is_the_stated_hash() -> None:
    seeds, H, T, S = some_seeds(3), 2, 5, 7
    found = is_kept(0.3, seeds, Window(H, T, S, 0), T, S)
    for b, h, t, s in product(range(3), range(H), range(T), range(S)):
        bits = murmur((h * T + t) * S + s, int(seeds[b]) & 0xFFFFFFFF)
        assert bool(found[b, h, t, s]) == (bits >= int(0.3 * 2**24))
    assert torch.equal(is_kept(0.3, seeds, Window(H, T, S, 2), 2, 4), found[:, :, 2:4, :4])


def test_masks_whose_elements_meet_are_not_the_same() -> None:
    """Two seeds whose sequences of numbers are the same but for a shift."""
    S, shift = 10_000, 7
    seeds = torch.tensor([1, 1 + shift * 0x9E3779B9 - 2**32 * 4], dtype=torch.int32)
    first, second = is_kept(0.5, seeds, Window(1, 1, S, 0), 1, S).flatten(1)
    same = (first[shift:] == second[:-shift]).double().mean()
    assert abs(same - 0.5) < 4 * 0.5 / S**0.5


@pytest.mark.parametrize("seed", [0, 1337, 2**63, 2**64 - 1])
def test_a_seed_mixes_all_that_it_depends_on(seed: int) -> None:
    """Against the hash that orders the data, in Python's integers."""
    found = dropout_seeds(seed, 12, torch.tensor([0, 5]), n_layer=2)
    assert found.dtype == torch.int32
    for row, place in product((0, 1), range(7)):
        x = batches.mixed(batches.mixed(seed) + 12)
        x = batches.mixed(batches.mixed(x + (0, 5)[row]) + place) >> 32
        assert int(found[row, place]) & 0xFFFFFFFF == x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 12), (2, 3, 7, 7), (4, 130, 33), (1, 1, 1)])
def test_cpp_gives_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dropout.library() is not None
    torch.manual_seed(0)
    x = (torch.randn(shape) * 100).to(dtype).transpose(-1, -2).contiguous().transpose(-1, -2)
    x.requires_grad_()
    dy, seeds = torch.randn(shape).to(dtype), some_seeds(shape[0])

    def both_ways() -> list[Tensor]:
        whole = drop(x, 0.3, seeds)
        part = drop(x[..., :4], 0.3, seeds, lines=200, width=50, start=9)
        return [whole, part, *torch.autograd.grad(whole, x, dy)]

    found = both_ways()
    monkeypatch.setattr(dropout, "library", lambda: None)
    expected = both_ways()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    kept = found[0] != 0
    torch.testing.assert_close(found[0][kept], (x / 0.7)[kept])
    torch.testing.assert_close(found[2], torch.where(kept, dy / 0.7, 0.0).to(dtype))


def test_threads_do_not_matter() -> None:
    x, before = torch.randn(3, 40, 50), torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(drop(x, 0.5, some_seeds(3)))
    torch.set_num_threads(before)
    assert torch.equal(*found)


# -- random enough


def chi_square(kept: Tensor, p: float) -> float:
    """Of how often each pattern of the 8 masks of (8, N) occurs, if each element is kept alone.

    With 255 degrees of freedom it has mean 255 and standard deviation 23.
    """
    patterns = (kept.long() << torch.arange(8)[:, None]).sum(0)
    counts = torch.bincount(patterns, minlength=256).double()
    ones = torch.tensor([i.bit_count() for i in range(256)])
    expected = (1 - p) ** ones * p ** (8 - ones) * kept.shape[1]
    return ((counts - expected) ** 2 / expected).sum().item()


def masks(p: float, of: str) -> Tensor:
    """Eight masks (8, N) that differ in one thing: what they are of."""
    size, rows = Window(1, 512, 768, 0), torch.arange(8)
    if of == "neighbours":  # every element with the next seven of its row
        row = is_kept(p, some_seeds(1), size, 512, 768).flatten()
        return torch.stack([row[i : len(row) - 8 + i] for i in range(8)])[:, ::8]
    if of == "lines":  # every element with those below it
        lines = is_kept(p, some_seeds(1), size, 512, 768).view(64, 8, 768)
        return lines.transpose(0, 1).flatten(1)
    if of == "rows":
        seeds = some_seeds(8)
    elif of == "places":
        seeds = dropout_seeds(7, 3, rows[:1], n_layer=3)[0, :8]
    elif of == "steps":
        seeds = torch.cat([dropout_seeds(7, step, rows[:1], 1)[:, 2] for step in range(8)])
    else:
        seeds = torch.cat([dropout_seeds(seed, 3, rows[:1], 1)[:, 2] for seed in range(8)])
    return is_kept(p, seeds, size, 512, 768).flatten(1)


@pytest.mark.parametrize("p", [0.5, 0.3])
@pytest.mark.parametrize("of", ["neighbours", "lines", "rows", "places", "steps", "seeds"])
def test_masks_are_independent(of: str, p: float) -> None:
    found = masks(p, of)
    assert chi_square(found, p) == pytest.approx(255, abs=4 * 23)
    assert chi_square(found.roll(1, 1) & found, p * p) > 1000  # it would be noticed


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_kept(p: float) -> None:
    kept = is_kept(p, some_seeds(8), Window(1, 512, 768, 0), 512, 768).double()
    deviation = (p * (1 - p) / kept[0].numel()) ** 0.5
    for mask in kept:  # of each row
        assert mask.mean().item() == pytest.approx(1 - p, abs=4 * deviation)


def test_rows_of_many_steps_have_seeds_of_their_own() -> None:
    """Of 80,000 seeds of 32 bits, less than one pair is expected to be equal."""
    each = [dropout_seeds(1, step, torch.arange(32), 4) for step in range(192)]
    assert len(torch.stack(each).unique()) >= 192 * 32 * 13 - 4


# -- in the model


@pytest.mark.parametrize("T", [1, 5, 130])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_attention_drops_the_same_weights(way: str, T: int) -> None:
    torch.manual_seed(T)
    q, k, v, dy = (torch.randn(2, T, 3, 8).double().transpose(1, 2) for _ in range(4))
    found = []
    for attend in (attention, WAYS[way]):
        inputs = [part.clone().requires_grad_() for part in (q, k, v)]
        y = attend(*inputs, 0.4, None, some_seeds(2))
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    # The formula itself, with the mask from above.
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    kept = is_kept(0.4, some_seeds(2), Window(3, T, T, 0), T, T)
    torch.testing.assert_close(found[0][0], (scores.softmax(-1) * kept / 0.6) @ v)


@pytest.mark.parametrize("block", ["gpt2", "modern"])
def test_a_row_does_not_depend_on_its_neighbours(block: str) -> None:
    config = GPTConfig(**TINY, **BLOCKS[block], dropout=0.3)
    model = scrambled(config).train()
    tokens, targets = some_tokens(6), some_tokens(6).roll(1, dims=1)
    seeds = dropout_seeds(1, 2, torch.arange(6), config.n_layer)
    whole = model(tokens, targets, seeds=seeds)
    parts = [model(tokens[i : i + 2], seeds=seeds[i : i + 2]).logits for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.loss(tokens, targets, seeds), whole.loss)
    assert not torch.allclose(model(tokens, seeds=seeds.roll(1, 0)).logits, whole.logits)
    model.eval()
    assert torch.equal(model(tokens, seeds=seeds).logits, model(tokens).logits)


@pytest.mark.parametrize("block", ["gpt2", "modern"])
def test_every_place_has_its_own_mask(block: str) -> None:
    """Each of the 1 + 3 L columns of seeds changes the result."""
    config = GPTConfig(**TINY, **BLOCKS[block], dropout=0.3)
    model = scrambled(config).train()
    seeds = dropout_seeds(1, 2, torch.arange(2), config.n_layer)
    before = model(some_tokens(), seeds=seeds).logits
    assert seeds.shape[1] == 1 + 3 * config.n_layer
    for place in range(seeds.shape[1]):
        other = seeds.clone()
        other[:, place] += 1
        assert not torch.allclose(model(some_tokens(), seeds=other).logits, before), place


def test_without_seeds_pytorchs_generator_draws_as_ever() -> None:
    """The book's model, whose parts are PyTorch's dropout, layer by layer."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, dropout=0.2, init="book")).train()
    plain = copy.deepcopy(model)
    for block in plain.h:
        block.attn.drop, block.mlp.drop = torch.nn.Dropout(0.2), torch.nn.Dropout(0.2)
    assert isinstance(model.drop, Dropout)
    x = torch.randn(2, 5, 12)
    torch.manual_seed(1)
    found = [model.drop(x), drop(x, 0.2)]
    torch.manual_seed(1)
    assert all(torch.equal(each, F.dropout(x, 0.2)) for each in found)
    torch.manual_seed(1)
    one = model(some_tokens()).logits
    torch.manual_seed(1)
    assert torch.equal(one, model(some_tokens()).logits)


@pytest.mark.slow
def test_a_compiled_loss_has_the_same_masks_and_is_compiled_once() -> None:
    model = scrambled(GPTConfig(**TINY, dropout=0.3)).train()
    tokens, targets = some_tokens(3, 11), some_tokens(3, 11).roll(1, dims=1)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    compiled = torch.compile(model.loss, backend=count)
    made = 0
    for step in range(4):
        seeds = dropout_seeds(1, step, torch.arange(step, step + 3), 2)
        torch.testing.assert_close(
            compiled(tokens, targets, seeds), model.loss(tokens, targets, seeds), rtol=1e-5, atol=0
        )
        made = made or len(graphs)
    assert len(graphs) == made
