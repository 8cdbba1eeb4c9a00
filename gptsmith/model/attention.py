"""Faster implementations of causal attention; `gpt.py` has the definition.

PyTorch's fused kernel handles every case. On CPUs it is slow in bfloat16, where matrix products
over blocks of queries are up to four times as fast. Each block is multiplied only with the keys up
to its end, so that little more than the causal triangle is computed. Knows nothing of weights or
caches.

Shapes:  B batch    H heads    T queries    S positions so far    D channels per head
         R queries in a block    E keys up to the block's end
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config.cost import BLOCK_QUERIES
from .dropout import drop


def by_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    positions: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Compute attention with PyTorch's fused kernel.

    (B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D)

    The queries are at the last T of the S positions or, where rows have different lengths, at
    `positions` (B, T). No query sees a later key. `dropout` is the probability of dropping an
    attention weight. The kernel cannot be told which to drop, so with `seeds` (B,), which say it,
    this is `by_blocks`.
    """
    if dropout and seeds is not None:
        return by_blocks(q, k, v, dropout, positions, seeds)
    T, S = q.shape[2], k.shape[2]
    # A single query sees every key, and T = S is the kernel's own causal case. In between (a chunk
    # of a prefill) the causal triangle must end at the last key, which the kernel does not do.
    mask = None
    if positions is not None:
        mask = torch.arange(S, device=q.device) <= positions[:, None, :, None]  # (B, 1, T, S)
    elif 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    causal = mask is None and 1 < T == S
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)


def by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    positions: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Compute attention over whole sequences (T = S) in blocks of queries; else by the kernel.

    (B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D)
    """
    seeded = bool(dropout) and seeds is not None
    assert not seeded or positions is None, "seeds are for whole sequences, as in training"
    if seeded or (positions is None and 1 < q.shape[2] == k.shape[2]):
        # Autocast would change types within the forward pass, but not within the backward pass.
        with torch.autocast(q.device.type, enabled=False):
            return _Blocks.apply(q, k, v, dropout, seeds)
    return by_kernel(q, k, v, dropout, positions)


# A function that computes attention: (q, k, v, dropout, positions, seeds) -> (B, H, T, D).
Attention = Callable[[Tensor, Tensor, Tensor, float, Tensor | None, Tensor | None], Tensor]
WAYS: dict[str, Attention] = {"kernel": by_kernel, "blocks": by_blocks}


class _Blocks(torch.autograd.Function):
    """Attention in blocks of queries; the backward pass reuses the attention weights."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float, seeds: Tensor | None
    ) -> Tensor:
        shape = q.shape
        q, k, v = (heads.reshape(-1, *shape[2:]) for heads in (q, k, v))  # (B H, T, D)
        scale = q.shape[-1] ** -0.5  # 1 / sqrt(D), which keeps the scores' variance at one
        y = torch.empty_like(q)
        weights, dropout_masks = [], []
        for start, end in blocks(len(q[0])):
            mask = torch.full((end - start, end), -torch.inf, dtype=q.dtype, device=q.device)
            mask = mask.triu(start + 1)  # -inf at the keys after each query
            scores = torch.baddbmm(mask, q[:, start:end], k[:, :end].mT, alpha=scale)  # (B H, R, E)
            p = scores.softmax(-1)
            weights.append(p)
            if dropout and seeds is not None:
                p = _drop_part(p, dropout, seeds, start, len(q[0]))
            elif dropout:
                # A dropout mask, scaled so that the expected weights stay the same.
                dropout_masks.append(torch.empty_like(p).bernoulli_(1 - dropout).div_(1 - dropout))
                p = p * dropout_masks[-1]
            y[:, start:end] = p @ v[:, :end]
        ctx.dropout = dropout
        ctx.save_for_backward(q, k, v, seeds, *weights, *dropout_masks)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, seeds, *saved = ctx.saved_tensors
        T, scale, dy = q.shape[1], q.shape[-1] ** -0.5, grad.reshape(q.shape)
        spans = blocks(T)
        weights, dropout_masks = saved[: len(spans)], saved[len(spans) :]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # The last block sees every key, so it runs first and writes dk and dv; others add to them.
        for number in reversed(range(len(spans))):
            (start, end), p = spans[number], weights[number]
            queries, keys, add = slice(start, end), slice(end), 0 if end == T else 1
            dp = dy[:, queries] @ v[:, keys].mT  # (B H, R, E)
            dropped = p
            if ctx.dropout and seeds is not None:
                dropped = _drop_part(p, ctx.dropout, seeds, start, T)
                dp = _drop_part(dp, ctx.dropout, seeds, start, T)
            elif dropout_masks:
                dropped = p * dropout_masks[number]
                dp *= dropout_masks[number]
            _add_product(dv[:, keys], dropped.mT, dy[:, queries], keep=add)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)  # p * (dp - (p * dp).sum(-1))
            _add_product(dq[:, queries], ds, k[:, keys], keep=0, times=scale)
            _add_product(dk[:, keys], ds.mT, q[:, queries], keep=add, times=scale)
        return dq.view(grad.shape), dk.view(grad.shape), dv.view(grad.shape), None, None


def _drop_part(part: Tensor, dropout: float, seeds: Tensor, start: int, T: int) -> Tensor:
    """Drop some of the attention weights (B H, R, E) of the queries from `start` on, of T."""
    rows = part.view(len(seeds), -1, *part.shape[1:])  # (B, H, R, E)
    return drop(rows, dropout, seeds, lines=T, width=T, start=start).view_as(part)


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, keep: int, times: float = 1.0) -> None:
    """out = keep * out + times * a @ b, in place."""
    torch.baddbmm(out, a, b, beta=keep, alpha=times, out=out)


def blocks(T: int) -> list[tuple[int, int]]:
    """Return the start and end of each block of queries."""
    return [(start, min(start + BLOCK_QUERIES, T)) for start in range(0, T, BLOCK_QUERIES)]
