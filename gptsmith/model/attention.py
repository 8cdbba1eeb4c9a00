"""Causal attention by faster ways than its formula, which stands in `gpt.py`.

PyTorch's kernel serves every case; on CPUs in bfloat16, which that kernel is slow at, plain
products over blocks of queries are up to four times as fast. A block meets only the keys up to its
end, so a long context costs little more than the triangle that causality leaves. Knows nothing of
weights or caches.

Shapes:  B batch    H heads    T queries    S positions so far    D channels per head
         R queries in a block    E keys up to the block's end
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 128  # queries; the fastest of 64 to 1,024, at contexts of 256 and 1,024


def by_kernel(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, positions: Tensor | None = None
) -> Tensor:
    """Attention by PyTorch's kernel.  (B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D)

    The T queries are the last of the S positions, or in rows of different lengths at `positions`
    (B, T); none sees a later key. `dropout` is the probability with which an attention weight is
    dropped.
    """
    T, S = q.shape[2], k.shape[2]
    # One query sees all; a square is plainly causal; between the two (a chunk of a prefill) the
    # triangle hangs from the lower right.
    mask = None
    if positions is not None:
        mask = torch.arange(S, device=q.device) <= positions[:, None, :, None]  # (B, 1, T, S)
    elif 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    causal = mask is None and 1 < T == S
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)


def by_blocks(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, positions: Tensor | None = None
) -> Tensor:
    """The same of whole texts (T = S) by products over blocks of queries; else by the kernel.

    (B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D)
    """
    if positions is None and 1 < q.shape[2] == k.shape[2]:
        return _Blocks.apply(q, k, v, dropout)
    return by_kernel(q, k, v, dropout, positions)


# What computes attention: (q, k, v, dropout, positions) -> (B, H, T, D).
Attention = Callable[[Tensor, Tensor, Tensor, float, Tensor | None], Tensor]
WAYS: dict[str, Attention] = {"kernel": by_kernel, "blocks": by_blocks}


class _Blocks(torch.autograd.Function):
    """The attention weights of the forward pass are kept for the backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        shape = q.shape
        q, k, v = (part.reshape(-1, *shape[2:]) for part in (q, k, v))  # (B H, T, D)
        y = torch.empty_like(q)
        weights, kept = [], []
        for start, end in blocks(len(q[0])):
            hidden = torch.full((end - start, end), -torch.inf, dtype=q.dtype, device=q.device)
            hidden = hidden.triu(start + 1)
            scores = torch.baddbmm(
                hidden, q[:, start:end], k[:, :end].mT, alpha=scale(q)
            )  # (B H, R, E)
            p = scores.softmax(-1)
            weights.append(p)
            if dropout:
                kept.append(torch.empty_like(p).bernoulli_(1 - dropout).div_(1 - dropout))
                p = p * kept[-1]
            y[:, start:end] = p @ v[:, :end]
        ctx.save_for_backward(q, k, v, *weights, *kept)
        return y.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, *saved = ctx.saved_tensors
        T, dy = q.shape[1], grad.reshape(q.shape)
        spans = blocks(T)
        weights, kept = saved[: len(spans)], saved[len(spans) :]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # The last block meets every key, so it writes what the others then add to.
        for number in reversed(range(len(spans))):
            (start, end), p = spans[number], weights[number]
            mine, before, add = slice(start, end), slice(end), 0 if end == T else 1
            dp = dy[:, mine] @ v[:, before].mT  # (B H, R, E)
            dropped = p
            if kept:
                dropped = p * kept[number]
                dp *= kept[number]
            _add_product(dv[:, before], dropped.mT, dy[:, mine], keep=add)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            _add_product(dq[:, mine], ds, k[:, before], keep=0, times=scale(q))
            _add_product(dk[:, before], ds.mT, q[:, mine], keep=add, times=scale(q))
        return dq.view(grad.shape), dk.view(grad.shape), dv.view(grad.shape), None


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, keep: int, times: float = 1.0) -> None:
    """out = keep * out + times * a @ b, in place."""
    torch.baddbmm(out, a, b, beta=keep, alpha=times, out=out)


def blocks(T: int) -> list[tuple[int, int]]:
    """Where each block of queries begins and ends."""
    return [(start, min(start + BLOCK, T)) for start in range(0, T, BLOCK)]


def scale(q: Tensor) -> float:
    """1 / sqrt(D), which keeps the scores' variance at one."""
    return float(q.shape[-1] ** -0.5)
