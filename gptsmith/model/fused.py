"""GPT-2's block and loss on a CPU with what lies between the matrix products in C++: fused.cpp.

In small models, the many small operations of a training step take longer than its products. Here
each of them is a piece that passes over its tensors once; the products stay PyTorch's. The results
are those of gpt.py but for rounding, in float32 and under bfloat16 autocast. Knows nothing of how
fused.cpp is compiled.

Shapes:  B batch    T tokens    N = B T    C channels    H heads    M channels inside the MLP
         V vocabulary
"""

from collections.abc import Sequence
from ctypes import CDLL, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cache import KVCache
from .dropout import UNSEEDED, BlockSeeds
from .gpt import GPT, Block
from .loss import cross_entropy, product_dtype
from .product import Adapter, Product, adapter_of

SOURCE = Path(__file__).with_name("fused.cpp")
SUPPORTED = (torch.float32, torch.bfloat16)
TYPES: dict[type, Any] = {int: c_int64, float: c_float, bool: c_int64}


class Pieces(NamedTuple):
    """The functions of fused.cpp."""

    library: CDLL

    def call(self, name: str, *arguments: Tensor | float | None) -> None:
        """Call a function with tensors, None for absent ones, and numbers, as it declares them."""
        function = getattr(self.library, name)
        if function.argtypes is None:  # the first time
            kinds = [TYPES.get(type(given), c_void_p) for given in arguments]
            function.argtypes, function.restype = [*kinds, c_int64], None
        given = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        function(*given, torch.get_num_threads())

    def cross_entropy(
        self, logits: Tensor, targets: Tensor, share: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Compute `loss.cross_entropy`, in the place of the logits.

        (R, V), (R,), () -> (), (R, V)
        """
        if logits.dtype not in SUPPORTED:
            return cross_entropy(logits, targets, share)
        nats, bits = torch.empty(len(logits)), logits.element_size() * 8
        self.call("cross_entropy", logits, targets, share, nats, *logits.shape, bits)
        return nats.sum(), None if share is None else logits


class Sizes(NamedTuple):
    """What a block's pieces need to know besides tensors."""

    B: int
    T: int
    H: int
    eps: float
    tanh: bool
    dtype: torch.dtype  # of products and what lies between them
    dropout: float

    @property
    def bits(self) -> int:
        """Bits of a number of that dtype."""
        return self.dtype.itemsize * 8

    def dropping(self, seeds: Tensor | None) -> tuple[Tensor | None, int, float]:
        """Return the arguments of a piece that drops by seeds (B,), or nothing without them."""
        return seeds, int(self.dropout * 2**24), 1 / (1 - self.dropout)


NO_DROPOUT = (None, 0, 1.0)


class _Block(torch.autograd.Function):
    """A block of gpt.py: x + attn(ln_1(x)), then that + mlp(ln_2(that)).  (N, C) -> (N, C)

    `weights` are weight and bias of the two norms and four layers, in the block's order; the rest
    are the adapters' two matrices for each layer, None where it has no adapter.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        pieces: Pieces,
        sizes: Sizes,
        seeds: BlockSeeds,
        adapters: tuple[Adapter, ...],
        *weights: Tensor,
    ) -> Tensor:
        ln_1, ln_1_bias, _, attn_bias, _, proj_bias, ln_2, ln_2_bias, _, fc_bias, _, mlp_bias = (
            weights[:12]
        )
        weights = cast_matrices(weights, sizes.dtype)  # once, and kept so for the backward pass
        attn, proj, fc, mlp_proj = products(weights, adapters)
        (N, C), M, dtype, bits = x.shape, len(fc.weight), sizes.dtype, sizes.bits
        of_weights, of_attn, of_mlp = map(sizes.dropping, seeds)
        in_stream = (sizes.T, N, C, sizes.eps, bits)

        def empty(columns: int) -> Tensor:
            return x.new_empty(N, columns, dtype=dtype)

        h_1, stats_1 = empty(C), x.new_empty(N, 2)
        pieces.call(
            "add_and_norm", x, None, None, *NO_DROPOUT, None, ln_1, ln_1_bias, h_1, stats_1,
            *in_stream,
        )  # fmt: skip
        qkv, attn_low = attn.forward(h_1)
        y, logs = empty(C), x.new_empty(sizes.B, sizes.H, sizes.T)
        heads = (sizes.B, sizes.T, sizes.H, C // sizes.H, bits)
        pieces.call("attention", qkv, attn_bias, *of_weights, y, logs, *heads)
        middle, h_2, stats_2 = torch.empty_like(x), empty(C), x.new_empty(N, 2)
        branch, proj_low = proj.forward(y)
        pieces.call(
            "add_and_norm", x, branch, proj_bias, *of_attn, middle, ln_2, ln_2_bias, h_2,
            stats_2, *in_stream,
        )  # fmt: skip
        hidden, (slope, fc_low) = empty(M), fc.forward(h_2)
        pieces.call("gelu", slope, fc_bias, hidden, N, M, sizes.tanh, bits)
        out, (branch, mlp_low) = torch.empty_like(x), mlp_proj.forward(hidden)
        pieces.call(
            "add_and_norm", middle, branch, mlp_bias, *of_mlp, out, None, None,
            None, None, *in_stream,
        )  # fmt: skip
        ctx.save_for_backward(
            x, stats_1, h_1, qkv, y, logs, middle, stats_2, h_2, slope, hidden,
            attn_low, proj_low, fc_low, mlp_low, *weights,
        )  # fmt: skip
        ctx.pieces, ctx.sizes, ctx.seeds, ctx.adapters = pieces, sizes, seeds, adapters
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, stats_1, h_1, qkv, y, logs, middle, stats_2, h_2, slope, hidden, *rest = (
            ctx.saved_tensors
        )
        (attn_low, proj_low, fc_low, mlp_low), weights = rest[:4], rest[4:]
        pieces, sizes, (N, C) = ctx.pieces, ctx.sizes, x.shape
        attn, proj, fc, mlp_proj = products(weights, ctx.adapters)
        M, learns = len(fc.weight), ctx.needs_input_grad[5:]
        ln_1, ln_2, attn_bias = weights[0], weights[6], weights[3]
        # The gradients of biases that learn, for the pieces to fill.
        d_ln_1_bias, d_proj_bias, d_ln_2_bias, d_fc_bias, d_mlp_bias = (
            torch.empty_like(weights[n]) if learns[n] else None for n in (1, 5, 7, 9, 11)
        )
        of_weights, of_attn, of_mlp = map(sizes.dropping, ctx.seeds)
        bits, d_out = sizes.bits, d_out.contiguous()

        def branch(
            d_stream: Tensor, dropping: tuple[Tensor | None, int, float], d_bias: Tensor | None
        ) -> Tensor:
            if bits == 32 and d_bias is None and dropping[0] is None:
                return d_stream
            d = torch.empty_like(h_1)
            pieces.call("branch_gradient", d_stream, *dropping, d, d_bias, sizes.T, N, C, bits)
            return d

        def through_norm(d: Tensor, of: Tensor, stats: Tensor, norm: Tensor, d_bias: Tensor | None,
                         around: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
            d_of, d_norm = torch.empty_like(of), torch.empty_like(norm)
            pieces.call(
                "norm_backward", d, of, stats, norm, around, d_of, d_norm, d_bias, N, C, bits
            )
            return d_of, d_norm

        d = branch(d_out, of_mlp, d_mlp_bias)
        d_hidden, d_mlp_proj = mlp_proj.backward(d, hidden, mlp_low, learns[10])
        pieces.call("gelu_backward", d_hidden, slope, d_fc_bias, N, M, bits)
        d_h_2, d_fc = fc.backward(d_hidden, h_2, fc_low, learns[8])
        d_middle, d_ln_2 = through_norm(d_h_2, middle, stats_2, ln_2, d_ln_2_bias, d_out)
        d = branch(d_middle, of_attn, d_proj_bias)
        d_y, d_proj = proj.backward(d, y, proj_low, learns[4])
        d_qkv, heads = torch.empty_like(qkv), (sizes.B, sizes.T, sizes.H, C // sizes.H, bits)
        pieces.call("attention_backward", qkv, attn_bias, *of_weights, y, d_y, logs, d_qkv, *heads)
        d_attn_bias = d_qkv.sum(0, dtype=torch.float32) if learns[3] else None
        further = ctx.needs_input_grad[0] or learns[0]  # else nothing before the layer learns
        d_h_1, d_attn = attn.backward(d_qkv, h_1, attn_low, learns[2], further=further)
        d_x, d_ln_1 = None, None
        if further:
            d_x, d_ln_1 = through_norm(d_h_1, x, stats_1, ln_1, d_ln_1_bias, d_middle)
        return (
            d_x, None, None, None, None,
            d_ln_1, d_ln_1_bias, d_attn[0], d_attn_bias, d_proj[0], d_proj_bias,
            d_ln_2, d_ln_2_bias, d_fc[0], d_fc_bias, d_mlp_proj[0], d_mlp_bias,
            *d_attn[1:], *d_proj[1:], *d_fc[1:], *d_mlp_proj[1:],
        )  # fmt: skip


MATRICES = (2, 4, 8, 10)  # their places in what _Block is given; adapters' follow from 12 on


def cast_matrices(weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return what _Block is given, of any shape, with the matrices in the dtype of products."""
    return tuple(
        each if each is None or not (place in MATRICES or place >= 12) else each.to(dtype)
        for place, each in enumerate(weights)
    )


def products(weights: Sequence[Tensor], adapters: Sequence[Adapter]) -> list[Product]:
    """Return the products with a block's four matrices, given what `cast_matrices` returns.

    A matrix has one row (C) or (M) for each output, as in gpt.py.
    """
    of_adapters = zip(weights[12::2], weights[13::2], adapters, strict=True)
    return [
        Product(weights[place], a, b, adapter)
        for place, (a, b, adapter) in zip(MATRICES, of_adapters, strict=True)
    ]


class FusedBlock(Block):
    """A block that is computed in pieces where it can be, else as gpt.py does."""

    pieces: Pieces

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        seeds: BlockSeeds = UNSEEDED,
    ) -> Tensor:
        attn, mlp, dtype = self.attn, self.mlp, product_dtype(x)
        layers = (attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj)
        adapters, pairs = zip(*(adapter_of(layer) for layer in layers), strict=True)
        dropout = attn.dropout if self.training else 0.0
        drawn = dropout > 0 and any(each is None for each in seeds)  # by PyTorch's generator
        drawn |= any(adapter.drawn for adapter in adapters)
        if cache is not None or drawn or x.dtype != torch.float32 or dtype not in SUPPORTED:
            return super().forward(x, cache, layer, seeds)
        (B, T, C), tanh = x.shape, mlp.activation.approximate == "tanh"
        sizes = Sizes(B, T, attn.n_head, self.ln_1.eps, tanh, dtype, dropout)
        parts = (self.ln_1, *layers[:2], self.ln_2, *layers[2:])
        weights = [each for part in parts for each in (part.weight, part.bias)]
        matrices = [matrix for pair in pairs for matrix in pair]
        stream = x.reshape(-1, C).contiguous()  # (N, C)
        seeds = seeds if dropout else UNSEEDED
        out = _Block.apply(stream, self.pieces, sizes, seeds, adapters, *weights, *matrices)
        return out.view(B, T, C)


def fuse(model: GPT, library: CDLL | None) -> None:
    """Compute a GPT-2's blocks and loss with the pieces of fused.cpp, or without for None."""
    pieces = None if library is None else Pieces(library)
    model.cross_entropy = cross_entropy if pieces is None else pieces.cross_entropy
    for block in model.h:
        if isinstance(block, Block):  # the same module, with its weights, gets another `forward`
            block.__class__ = Block if pieces is None else FusedBlock
            block.pieces = pieces  # type: ignore[assignment]
