"""Quantized matrices in 8 or 4 bits: packing, unpacking, and modules that compute with them.

A word holds k = 32 / bits numbers. Number i = (n k + j) W + w of a row is in bits
[bits j, bits (j + 1)) of word (n, w), as the unsigned field code + 2^(bits - 1); its value is code
times the scale of lane w. Neighbouring numbers are thus in neighbouring words, which suits vector
registers. Knows nothing of files, or of which device is fast.

Shapes:  M rows (outputs)    C columns (inputs)    N words of a row in one lane    W lanes
         G = N k numbers of a row that share a scale    R rows at once    B batch    T tokens
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.quantization import WORD_BITS, check_bits, lanes, packed_matrices
from .gpt import GPT

# Numbers packed at once: few enough to stay in the cache, and for PyTorch to use one thread. On a
# busy machine, several threads would wait for one another.
NUMBERS_PACKED = 2**15
NUMBERS_UNPACKED = 2**22  # at once
# float32 has no fraction bits near this number, so adding and subtracting it rounds. `torch.round`
# would use several threads even for small tensors.
NO_FRACTION = 1.5 * 2**23
# Candidates for the 4-bit scale, relative to the one that maps a group's extreme number to the last
# code. Smaller ones clip it but have finer steps. For normally distributed numbers, more or closer
# candidates lower the error by at most 0.2%.
FACTORS = tuple(1.0 + step / 30 for step in range(-10, 6))


# -- packing


def pack(matrix: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Pack a matrix into words and bfloat16 scales.  (M, C) -> (M, N, W), (M, W)

    Converts only some rows at a time to float32. ValueError if a number is not finite.
    """
    check_bits(bits)
    (M, C), W, k = matrix.shape, lanes(matrix.shape[1]), WORD_BITS // bits
    words = torch.empty(M, C // (k * W), W, dtype=torch.int32, device=matrix.device)
    scales = torch.empty(M, W, dtype=torch.bfloat16, device=matrix.device)
    choose = _scale_of_8 if bits == 8 else _scale_of_4
    rows = max(1, NUMBERS_PACKED // max(1, C))
    parts = zip(matrix.split(rows), words.split(rows), scales.split(rows), strict=True)
    for numbers, its_words, its_scales in parts:  # the last two are views
        groups = numbers.detach().float().view(-1, C // W, W)
        groups = groups.transpose(1, 2).contiguous()  # (R, W, G): sums over the last axis are fast
        its_scales.copy_(choose(groups))
        its_words.copy_(_fields(_codes(groups, its_scales, bits).transpose(1, 2), bits))
    if not scales.isfinite().all():
        raise ValueError("some weights are not finite: the model cannot be quantized")
    return words, scales


def _divisor(scales: Tensor) -> Tensor:
    """Return the scales as divisors, with 1 for scales of 0, whose numbers are all 0.

    (R, W) -> (R, W, 1)
    """
    wide = scales.float().unsqueeze(2)
    return torch.where(wide == 0, 1.0, wide)


def _codes(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the nearest codes, in float32; with 8 bits they are symmetric.

    (R, W, G), (R, W) -> (R, W, G)
    """
    least = -127 if bits == 8 else -8
    codes = (groups / _divisor(scales)).add_(NO_FRACTION).sub_(NO_FRACTION)
    return codes.clamp_(least, 2 ** (bits - 1) - 1)


def _scale_of_8(groups: Tensor) -> Tensor:
    """Return scales that map the largest number to code 127 or -127.  (R, W, G) -> (R, W)"""
    return groups.abs().amax(2).div_(127).bfloat16()


def _scale_of_4(groups: Tensor) -> Tensor:
    """Return the scales with the least squared error among the `FACTORS`.  (R, W, G) -> (R, W)

    The number farthest from 0 is mapped near code -8, which has no positive counterpart, so that
    no code is wasted. The scale therefore has the opposite sign.
    """
    high, low = groups.amax(2), groups.amin(2)
    extreme = torch.where(high > -low, high, low) / -8
    units = groups / _divisor(extreme)  # so that squares neither underflow nor overflow
    best, least = extreme.bfloat16(), torch.full_like(extreme, torch.inf)
    for factor in FACTORS:
        scale = (extreme * factor).bfloat16()
        step = scale / extreme  # the scale, in these units
        rest = _codes(units, step, 4).mul_(_divisor(step)).sub_(units)
        error = torch.linalg.vector_norm(rest, dim=2)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(least, error)
    return best


def _fields(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, in float32, into the fields of words.  (R, G, W) -> (R, N, W)"""
    fields = (codes + 2 ** (bits - 1)).int().unflatten(1, (-1, WORD_BITS // bits))  # (R, N, k, W)
    words = fields[:, :, 0].clone()
    for j in range(1, fields.shape[2]):
        words |= fields[:, :, j] << bits * j  # the last one may set the sign bit, as intended
    return words


def unpack(words: Tensor, scales: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack a matrix.  (M, N, W), (M, W) -> (M, C)

    In float32, the product of code and scale is exact; another `dtype` rounds it once more.
    """
    (M, N, W), k = words.shape, WORD_BITS // bits
    matrix = torch.empty(M, N, k, W, dtype=dtype, device=words.device)
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)
    rows = max(1, NUMBERS_UNPACKED // max(1, N * k * W))
    parts = zip(words.split(rows), scales.split(rows), matrix.split(rows), strict=True)
    for its_words, its_scales, numbers in parts:  # the last is a view
        fields = its_words.unsqueeze(2) >> shifts.unsqueeze(1)  # (R, N, k, W)
        fields.bitwise_and_(2**bits - 1).sub_(2 ** (bits - 1))
        numbers.copy_(fields * its_scales.float()[:, None, None])
    return matrix.view(M, N * k * W)


# -- modules


class _Packed(nn.Module):
    """A module whose weight (M, C) is packed into words (M, N, W) and scales (M, W)."""

    words: Tensor
    scales: Tensor
    bits: int

    def __init__(self, words: Tensor, scales: Tensor, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits)
        self.register_buffer("words", words)
        self.register_buffer("scales", scales)

    def _apply(self, *how: Any, **more: Any) -> "_Packed":
        """Move to another device as any module does, but keep the dtype of the scales: a cast is
        for the activations."""
        scales = self.scales
        super()._apply(*how, **more)
        self.scales = scales.to(self.scales.device)
        return self


class PackedLinear(_Packed):
    """A linear layer whose weight is unpacked for each product.  (..., C) -> (..., M)"""

    unpack = staticmethod(unpack)  # `generation/compiled.py` replaces it by C++

    def __init__(
        self, words: Tensor, scales: Tensor, bits: int, bias: nn.Parameter | None = None
    ) -> None:
        super().__init__(words, scales, bits)
        self.out_features, N, W = words.shape
        self.in_features = N * W * WORD_BITS // bits
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.unpack(self.words, self.scales, self.bits, x.dtype)
        return F.linear(x, weight, self.bias)


class PackedEmbedding(_Packed):
    """An embedding that unpacks only the rows it needs.  (B, T) -> (B, T, C) of `dtype`"""

    like: Tensor

    def __init__(self, words: Tensor, scales: Tensor, bits: int, dtype: torch.dtype) -> None:
        super().__init__(words, scales, bits)
        # An empty tensor whose dtype follows the model's casts.
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        ids = tokens.flatten()
        rows = unpack(self.words[ids], self.scales[ids], self.bits, self.like.dtype)
        return rows.view(*tokens.shape, rows.shape[1])


def packed_bits(model: GPT) -> int | None:
    """Return the bits of a packed model's blocks; None if it is not packed."""
    return next((part.bits for part in model.h.modules() if isinstance(part, PackedLinear)), None)


def pack_model(model: GPT, bits: int) -> None:
    """Replace a model's matrices by packed ones in place, freeing each before the next."""
    for name, its_bits in packed_matrices(model.config, bits).items():
        words, scales = pack(model.get_parameter(f"{name}.weight"), its_bits)
        put_packed(model, name, words, scales, its_bits)


def put_packed(model: GPT, name: str, words: Tensor, scales: Tensor, bits: int) -> None:
    """Replace a module, and a head that is tied to it, by a packed one.  (M, N, W), (M, W)"""
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear):
        packed: nn.Module = PackedLinear(words, scales, bits, old.bias)
    else:
        dtype = model.get_parameter(f"{name}.weight").dtype
        packed = PackedEmbedding(words, scales, bits, dtype)
    setattr(model.get_submodule(parent), leaf, packed.train(old.training))
    if name == "wte" and model.config.tie_weights:
        model.add_module("lm_head", PackedLinear(words, scales, bits).train(old.training))
