"""Packed matrices: every field, against arithmetic on Python's integers; and the modules."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptsmith import GPT, GPTConfig, generate_greedy
from gptsmith.config.model import MODERN
from gptsmith.config.quantization import packed_matrices
from gptsmith.model.cache import KVCache
from gptsmith.model.quantized import (
    FACTORS,
    PackedEmbedding,
    PackedLinear,
    lanes,
    pack,
    pack_model,
    packed_bits,
    unpack,
)
from tests.conftest import TINY, scrambled, some_tokens

SIZES: dict[str, Any] = TINY | {"n_embd": 24}
MODELS = {
    "tied": GPTConfig(**SIZES),
    "untied": GPTConfig(**SIZES, tie_weights=False, qkv_bias=False),
    "no bias": GPTConfig(**SIZES, bias=False, n_inner=40),
    "modern": GPTConfig(**SIZES | {"n_head": 6}, n_kv_head=2, **MODERN),
}


def slow_unpack(words: Tensor, scales: Tensor, bits: int) -> list[list[float]]:
    """By the definition of the layout, number by number."""
    k, (M, N, W) = 32 // bits, words.shape
    rows = []
    for m in range(M):
        row = [0.0] * (N * k * W)
        for n in range(N):
            for w in range(W):
                word = int(words[m, n, w]) % 2**32
                for j in range(k):
                    field = (word >> (bits * j)) % 2**bits
                    code = field - 2 ** (bits - 1)
                    row[(n * k + j) * W + w] = code * float(scales[m, w])
        rows.append(row)
    return rows


def some_matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.3


def test_the_lanes_are_those_that_were_agreed_on() -> None:
    agreed = {768: 16, 3072: 48, 1024: 16, 1280: 32, 1600: 40, 6400: 160, 192: 8, 384: 16}
    assert {columns: lanes(columns) for columns in agreed} == agreed
    for columns in range(8, 2000, 8):
        W = lanes(columns)
        assert columns % (8 * W) == 0
        assert 8 <= columns // W <= 64


def test_columns_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^a matrix has 36 columns: a multiple of 8 is needed"):
        pack(some_matrix(3, 36), 8)


@pytest.mark.parametrize("bits", [8, 4])
def test_every_field_of_every_word_is_found(bits: int) -> None:
    """Random words: all fields occur, with the sign bit and without."""
    generator = torch.Generator().manual_seed(2)
    shape = (5, 3, 6)
    words = torch.randint(-(2**31), 2**31, shape, generator=generator).int()
    words[0, 0, :2] = torch.tensor([-1, -(2**31)])
    scales = torch.randn(5, 6, generator=generator).bfloat16()
    assert torch.equal(unpack(words, scales, bits), torch.tensor(slow_unpack(words, scales, bits)))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(1, 8), (3, 24), (7, 40), (2, 192), (50, 768)])
def test_packed_numbers_are_where_the_layout_says(bits: int, shape: tuple[int, int]) -> None:
    matrix = some_matrix(*shape)
    words, scales = pack(matrix, bits)
    W = lanes(shape[1])
    assert (words.dtype, scales.dtype) == (torch.int32, torch.bfloat16)
    assert words.shape == (shape[0], shape[1] * bits // 32 // W, W)
    assert scales.shape == (shape[0], W)
    again = unpack(words, scales, bits)
    assert torch.equal(again, torch.tensor(slow_unpack(words, scales, bits)))
    each = scales.float().abs().repeat(1, shape[1] // W)  # number i is in lane i % W
    assert ((matrix - again).abs() <= each * (0.5 if bits == 8 else 2.7)).all()


def test_eight_bits_round_to_the_nearest_code() -> None:
    matrix = some_matrix(6, 48)
    words, scales = pack(matrix, 8)
    for m in range(6):
        for w in range(lanes(48)):
            group = matrix[m, w :: lanes(48)]
            scale = (group.abs().max() / 127).bfloat16()
            assert scale == scales[m, w]
            codes = (group.double() / float(scale)).round().clamp(-127, 127)
            assert torch.equal(
                unpack(words, scales, 8)[m, w :: lanes(48)], (codes * float(scale)).float()
            )


def error_of_four(group: Tensor, scale: float) -> float:
    codes = (group.double() / scale).round().clamp(-8, 7)
    return float((codes * scale - group.double()).square().sum())


def test_four_bits_take_the_best_candidate_and_are_never_worse_than_the_largest_number() -> None:
    matrix = some_matrix(9, 96, seed=3)
    words, scales = pack(matrix, 4)
    W, again = lanes(96), unpack(words, scales, 4)
    better = 0
    for m in range(9):
        for w in range(W):
            group = matrix[m, w::W]
            error = float((again[m, w::W].double() - group.double()).square().sum())
            extreme = float(group[group.abs().argmax()])
            candidates = [
                error_of_four(group, float(torch.tensor(extreme / -8 * f).bfloat16()))
                for f in FACTORS
            ]
            plain = error_of_four(group, float(torch.tensor(extreme / -8).bfloat16()))
            assert error <= min(candidates) * (1 + 1e-5)
            assert error <= plain * (1 + 1e-5)
            better += error < plain * 0.99
    assert better > 9 * W / 4  # the search is worth something
    assert (scales < 0).any()
    assert (scales > 0).any()


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_zeros_stay_zero_and_tiny_and_huge_numbers_stay_finite(bits: int) -> None:
    matrix = some_matrix(4, 16)
    matrix[0] = 0.0
    matrix[1] *= 1e-30
    matrix[2] *= 1e35
    again = unpack(*pack(matrix, bits), bits)
    assert (again[0] == 0).all()
    for row in (1, 2, 3):
        distance = (again[row] - matrix[row]).double().norm() / matrix[row].double().norm()
        assert distance < (0.01 if bits == 8 else 0.2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(bits: int, wrong: float) -> None:
    matrix = some_matrix(4, 16)
    matrix[2, 5] = wrong
    with pytest.raises(ValueError, match="not finite"):
        pack(matrix, bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_are_packed_and_unpacked_in_parts(bits: int, monkeypatch: Any) -> None:
    matrix = some_matrix(11, 48)
    whole = pack(matrix, bits)
    numbers = unpack(*whole, bits)
    monkeypatch.setattr("gptsmith.model.quantized.NUMBERS_PACKED", 100)
    monkeypatch.setattr("gptsmith.model.quantized.NUMBERS_UNPACKED", 100)
    parts = pack(matrix, bits)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert torch.equal(unpack(*parts, bits), numbers)
    assert torch.equal(unpack(*parts, bits, torch.bfloat16), numbers.bfloat16())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_modules_compute_with_the_unpacked_weight(bits: int) -> None:
    words, scales = pack(some_matrix(10, 24), bits)
    weight = torch.tensor(slow_unpack(words, scales, bits))
    linear = PackedLinear(words, scales, bits, nn.Parameter(some_matrix(1, 10)[0]))
    x = some_matrix(6, 24, seed=4).view(2, 3, 24)
    assert (linear.in_features, linear.out_features) == (24, 10)
    assert torch.allclose(linear(x), x @ weight.T + linear.bias, atol=1e-6)
    embedding = PackedEmbedding(words, scales, bits, torch.bfloat16)
    ids = torch.tensor([[3, 9, 3], [0, 1, 2]])
    assert torch.equal(embedding(ids), weight[ids].bfloat16())


def plain_copy(model: GPT, packed: GPT) -> GPT:
    """The plain model with the weights that the packed one stands for."""
    plain = copy.deepcopy(model)
    state = plain.state_dict()
    for name, bits in packed_matrices(model.config, packed_bits(packed) or 0).items():
        module = packed.get_submodule(name)
        numbers = slow_unpack(module.words, module.scales, bits)  # type: ignore[arg-type]
        state[f"{name}.weight"].copy_(torch.tensor(numbers))
    return plain


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
@pytest.mark.slow
def test_a_packed_model_is_the_plain_one_with_rounded_weights(name: str, bits: int) -> None:
    model = scrambled(MODELS[name])
    packed = copy.deepcopy(model)
    pack_model(packed, bits)
    plain, tokens = plain_copy(model, packed), some_tokens(batch=3, length=7)
    assert torch.allclose(packed(tokens).logits, plain(tokens).logits, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(packed(tokens).logits, model(tokens).logits, atol=1e-4)
    assert torch.equal(generate_greedy(packed, tokens, 9), generate_greedy(plain, tokens, 9))
    cache = KVCache(packed.config, 3)
    pieces = [packed(part, cache=cache).logits for part in tokens.split([4, 1, 2], dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), plain(tokens).logits, atol=1e-5)


def test_every_matrix_is_packed_and_nothing_else() -> None:
    model = scrambled(MODELS["untied"])
    pack_model(model, 4)
    kinds = {name: type(module) for name, module in model.named_modules()}
    linear = [name for name, kind in kinds.items() if kind is PackedLinear]
    assert len(linear) == 4 * model.config.n_layer + 1
    assert nn.Linear not in kinds.values()
    assert kinds["wte"] is PackedEmbedding
    assert kinds["wpe"] is nn.Embedding
    bits = {name: model.get_submodule(name).bits for name in [*linear, "wte"]}
    assert {name for name, number in bits.items() if number == 8} == {"wte", "lm_head"}
    assert packed_bits(model) == 4
    assert packed_bits(scrambled(MODELS["untied"])) is None


def test_a_tied_head_shares_the_embeddings_memory() -> None:
    model = scrambled(MODELS["tied"])
    pack_model(model, 8)
    head, embedding = model.get_submodule("lm_head"), model.get_submodule("wte")
    assert head.words is embedding.words
    assert head.scales is embedding.scales


@torch.no_grad()
def test_a_cast_is_of_the_activations() -> None:
    model = scrambled(MODELS["tied"])
    pack_model(model, 8)
    tokens = some_tokens()
    before = model(tokens).logits
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    model.to(torch.bfloat16)
    assert model.dtype == model(tokens).logits.dtype == torch.bfloat16
    assert model.get_submodule("wte").scales.dtype == torch.bfloat16
    assert torch.allclose(model(tokens).logits.float(), before, atol=0.2, rtol=0.05)
    model.to(torch.float64)
    assert model.get_submodule("h.0.attn.c_attn").scales.dtype == torch.bfloat16


def test_sizes_that_do_not_divide_are_said() -> None:
    with pytest.raises(ValueError, match=r"^n_embd is 36: a multiple of 8 is needed to quantize"):
        pack_model(GPT(GPTConfig(**TINY | {"n_embd": 36})), 8)
    with pytest.raises(ValueError, match=r"^n_inner is 50: a multiple of 8 is needed"):
        pack_model(GPT(GPTConfig(**SIZES, n_inner=50)), 8)
    with pytest.raises(ValueError, match=r"^bits is 5: 8 or 4 is needed$"):
        pack_model(GPT(GPTConfig(**SIZES)), 5)
