"""Dropout whose masks are computed from seeds, so that a result does not depend on how a batch is
divided into micro-batches and processes.

Every row of the batch has a seed for each place where the model drops something, made from the
run's seed, the step, the row's number in the global batch and the place. Whether an element is kept
depends on that seed and the element's number in the row alone. So no generator has a state, and the
backward pass can compute a mask again instead of keeping it. On CPUs, dropout.cpp computes the same
masks in a fortieth of the time of PyTorch's generator. Knows nothing of the model.

Shapes:  B rows    T tokens    C channels    H heads    S keys    L layers    P places: 1 + 3 L
"""

import warnings
from ctypes import CDLL, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..machine.native import open_library

SOURCE = Path(__file__).with_name("dropout.cpp")
BYTES = {torch.float32: 4, torch.bfloat16: 2}  # the types of numbers that dropout.cpp can drop


class Dropout(nn.Dropout):
    """PyTorch's dropout, or by seeds (B,) if they are given.  (B, T, C) -> (B, T, C)"""

    def forward(self, input: Tensor, seeds: Tensor | None = None) -> Tensor:
        if seeds is None:
            return super().forward(input)
        return drop(input, self.p if self.training else 0.0, seeds)


class BlockSeeds(NamedTuple):
    """The seeds (B,) of a block's three places; None: PyTorch's generator draws the masks."""

    weights: Tensor | None = None  # of the attention weights
    attn: Tensor | None = None
    mlp: Tensor | None = None


UNSEEDED = BlockSeeds()


def dropout_seeds(seed: int, step: int, rows: Tensor, n_layer: int) -> Tensor:
    """Return the seeds of a step's masks for these rows of the global batch.  (B,) -> (B, P) int32

    The places are the embeddings, then three for each block.
    """
    places = torch.arange(1 + 3 * n_layer, device=rows.device)
    # PyTorch's integers are signed; taken modulo 2^64, they are the same bits.
    mixture = mixed(torch.tensor((seed + 2**63) % 2**64 - 2**63, device=rows.device))
    mixture = mixed(mixed(mixture + step) + rows[:, None])
    return (mixed(mixture + places) >> 32).to(torch.int32)


def seeds_by_place(seeds: Tensor | None, n_layer: int) -> tuple[Tensor | None, list[BlockSeeds]]:
    """Return the seeds (B,) of the embeddings and those of each block.  (B, P)"""
    if seeds is None:
        return None, [UNSEEDED] * n_layer
    embeddings, *rest = seeds.T.contiguous().unbind()
    return embeddings, [BlockSeeds(*rest[3 * layer :][:3]) for layer in range(n_layer)]


def drop(
    x: Tensor,
    p: float,
    seeds: Tensor | None = None,
    *,
    lines: int | None = None,
    width: int | None = None,
    start: int = 0,
) -> Tensor:
    """Set a share `p` of the elements to zero, and divide the others by 1 - p.

    (B, T, C) -> (B, T, C), or (B, H, T, S) -> (B, H, T, S)

    The seeds (B,) decide which; without them, PyTorch's generator does. Where `x` is only a part of
    the rows' elements, from line `start` on and from the left edge, `lines` and `width` are the
    whole T and S.
    """
    if seeds is None:
        return F.dropout(x, p)
    if p == 0:
        return x
    H = x.shape[1] if x.dim() == 4 else 1
    where = Window(H, lines or x.shape[-2], width or x.shape[-1], start)
    in_cpp = x.dtype in BYTES and x.device.type == "cpu" and not torch.compiler.is_compiling()
    if in_cpp and (native := library()) is not None:
        return _Drop.apply(x, p, seeds, where, native)
    kept = is_kept(p, seeds, where, x.shape[-2], x.shape[-1]).view(x.shape)
    return torch.where(kept, x * (1 / (1 - p)), 0.0)


class Window(NamedTuple):
    """Where elements are among those of a row, which are numbered as in (H, T, S)."""

    H: int
    T: int
    S: int
    start: int  # the first line, of T


def is_kept(p: float, seeds: Tensor, where: Window, R: int, E: int) -> Tensor:
    """Return which of R lines of E elements are kept.  (B,) -> (B, H, R, E)

    This is the definition, which dropout.cpp and fused.cpp are held to: the element's number times
    an odd constant, plus the seed, is mixed as by MurmurHash3's finalizer. The seed is added again
    on the way, or all masks would be windows of one sequence, of which some overlap.
    """
    h, t, s = (torch.arange(n, dtype=torch.int32, device=seeds.device) for n in (where.H, R, E))
    elements = (h[:, None, None] * where.T + where.start + t[:, None]) * where.S + s  # (H, R, E)
    if torch.compiler.is_compiling():
        # Changes nothing, but Inductor would multiply numbers that it knows as C++'s signed ones,
        # whose overflow is undefined there: GCC 16 then computes something else.
        elements &= 0x7FFFFFFF
    elements *= signed(0x9E3779B9)

    def kept(x: Tensor, seed: Tensor) -> Tensor:
        x ^= shifted(x, 16)
        x *= signed(0x85EBCA6B)
        x += seed
        x ^= shifted(x, 13)
        x *= signed(0xC2B2AE35)
        x ^= shifted(x, 16)
        return shifted(x, 8) >= int(p * 2**24)

    if seeds.device.type != "cpu" or torch.compiler.is_compiling():
        seeds = seeds[:, None, None, None]
        return kept(elements + seeds, seeds)
    return torch.stack([kept(elements + seed, seed) for seed in seeds])  # a row fits a CPU's cache


def mixed(x: Tensor) -> Tensor:
    """Return a 64-bit hash, the finalizer of SplitMix64, of integers of any shape."""
    x = x + signed(0x9E3779B97F4A7C15, 64)
    x = (x ^ shifted(x, 30)) * signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ shifted(x, 27)) * signed(0x94D049BB133111EB, 64)
    return x ^ shifted(x, 31)


def shifted(x: Tensor, count: int) -> Tensor:
    """Shift integers of any shape to the right, with zeros on the left as for unsigned ones."""
    return (x >> count).bitwise_and_((1 << x.element_size() * 8 - count) - 1)


def signed(x: int, bits: int = 32) -> int:
    """Return the signed integer with the same bits as an unsigned one."""
    return x - (1 << bits) if x >> bits - 1 else x


@cache
def library() -> CDLL | None:
    """Return dropout.cpp as a library; None, with a warning, where it cannot be compiled."""
    try:
        return open_library(SOURCE)
    except (ValueError, OSError) as error:
        warnings.warn(f"dropout is computed without C++, which takes longer: {error}", stacklevel=2)
        return None


class _Drop(torch.autograd.Function):
    """Dropout by dropout.cpp; the gradient is dropped likewise."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: float, seeds: Tensor, where: Window, native: CDLL
    ) -> Tensor:
        ctx.save_for_backward(seeds)
        ctx.arguments = p, where, native
        return _dropped(x, p, seeds, where, native)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seeds,), (p, *others) = ctx.saved_tensors, ctx.arguments
        return _dropped(grad, p, seeds, *others), None, None, None, None


def _dropped(x: Tensor, p: float, seeds: Tensor, where: Window, native: CDLL) -> Tensor:
    x, seeds = x.contiguous(), seeds.contiguous()
    y = torch.empty_like(x)
    native.drop_numbers(
        c_int(BYTES[x.dtype]),
        *(c_void_p(tensor.data_ptr()) for tensor in (x, y, seeds)),
        *map(c_int64, (len(seeds), *where, *x.shape[-2:])),
        c_int32(int(p * 2**24)),
        c_float(1 / (1 - p)),
        c_int(torch.get_num_threads()),
    )
    return y
