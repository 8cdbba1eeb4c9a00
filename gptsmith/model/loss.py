"""Cross entropy of a large vocabulary, without holding every token's logits at once.

The head and its loss are computed for some tokens at a time, and their gradient with them, so that
what lives until the backward pass is the gradient of the features and of the head: at GPT-2's size
and 2,048 tokens this saves two thirds of a gigabyte. Knows nothing of how features are made.

Shapes:  N tokens    R of them at once    C channels    V vocabulary    P padded vocabulary
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NOT_LEARNED = -1  # a target with this id counts for nothing
LOGITS_AT_ONCE = 1 << 25  # numbers, 128 MiB in float32; with fewer, adding up the head costs more


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy per counted target, in nats, in float32 or more.  (B, T, V), (B, T) -> ()"""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=NOT_LEARNED, reduction="sum")
    return total / (targets != NOT_LEARNED).sum().clamp(min=1)


def head_loss(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """`mean_loss(features @ head.T, targets)`, a part at a time.  (B, T, C), (V, C), (B, T) -> ()

    Multiplies in the precision of autocast, where that is on.
    """
    device, dtype = features.device.type, features.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _HeadLoss.apply(features.flatten(0, 1), head, targets.flatten(), dtype)


class _HeadLoss(torch.autograd.Function):
    """The gradient is found in the forward pass, while the logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        V, learns = len(head), any(ctx.needs_input_grad)
        x, weight = features.to(dtype), head.to(dtype)
        if head.is_cuda:  # GPUs multiply multiples of 64 faster; no one sees the added rows
            weight = F.pad(weight, (0, 0, 0, -V % 64))  # (P, C)
        wide = torch.promote_types(dtype, torch.float32)
        counted = targets != NOT_LEARNED
        count = counted.sum().clamp(min=1)
        total = torch.zeros((), dtype=wide, device=x.device)
        d_features = torch.empty_like(x) if learns else None
        d_weight = torch.zeros_like(weight, dtype=wide) if learns else None
        for part in parts(len(x), V):
            logits = (x[part] @ weight.T).to(wide)  # (R, P)
            logits[:, V:] = -torch.inf
            index = targets[part].clamp(min=0)[:, None]
            logits = logits.log_softmax(1)
            nats = -logits.gather(1, index)[:, 0]  # (R,)
            total += nats.where(counted[part], 0.0).sum()
            if d_features is None or d_weight is None:
                continue
            d_logits = logits.softmax(1)  # exp, which is many times slower here on CPUs
            del logits
            d_logits.scatter_add_(1, index, -torch.ones_like(index, dtype=wide))
            d_logits *= (counted[part].to(wide) / count)[:, None]
            d_logits = d_logits.to(dtype)
            d_features[part] = d_logits @ weight
            d_weight += d_logits.T @ x[part]
        if d_features is not None and d_weight is not None:
            ctx.save_for_backward(d_features.to(features.dtype), d_weight[:V].to(head.dtype))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_features, d_head = ctx.saved_tensors
        return d_features.mul_(grad), d_head.mul_(grad), None, None  # in place: they are large


def parts(tokens: int, vocabulary: int) -> list[slice]:
    """Runs of tokens whose logits are few enough to be computed at once."""
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    return [slice(start, start + rows) for start in range(0, tokens, rows)]
