"""Cross entropy over a large vocabulary, without holding the logits of all tokens at once.

Logits and loss are computed for a chunk of tokens at a time, and their gradient right away, so that
only the gradients of the features and of the head live until the backward pass. At GPT-2's size and
2,048 tokens this saves two thirds of a gigabyte. Knows nothing of how features are computed.

Shapes:  N tokens    R tokens of a chunk    C channels    V vocabulary    P padded vocabulary
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import cost

NOT_LEARNED = -1  # a target with this id is ignored


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy, in nats per counted target.  (B, T, V), (B, T) -> ()

    Computed in float32, or in the dtype of the logits where that is wider.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=NOT_LEARNED, reduction="sum")
    return total / (targets != NOT_LEARNED).sum().clamp(min=1)


def cross_entropy(
    logits: Tensor, targets: Tensor, share: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the summed cross entropy, and its gradient times `share` unless that is None.

    (R, P), (R,), () -> (), (R, P). The gradient has the dtype of the logits, the sum a wider one.
    """
    dtype = logits.dtype
    wide = torch.promote_types(dtype, torch.float32)
    counted, index = targets != NOT_LEARNED, targets.clamp(min=0)[:, None]
    logits = logits.to(wide).log_softmax(1)
    nats = -logits.gather(1, index)[:, 0]  # (R,)
    total = nats.where(counted, 0.0).sum()
    if share is None:
        return total, None
    d_logits = logits.softmax(1)  # equal to logits.exp(), which is far slower on CPUs
    del logits
    d_logits.scatter_add_(1, index, -torch.ones_like(index, dtype=wide))
    d_logits *= (counted.to(wide) * share)[:, None]
    return total, d_logits.to(dtype)


CrossEntropy = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def head_loss(
    features: Tensor, head: Tensor, targets: Tensor, way: CrossEntropy = cross_entropy
) -> Tensor:
    """Compute `mean_loss(features @ head.T, targets)` in chunks.  (B, T, C), (V, C), (B, T) -> ()

    The matrix products run in autocast's precision where autocast is on. `way` computes a chunk's
    cross entropy and gradient: as `cross_entropy`, or faster.
    """
    dtype = product_dtype(features)
    return _HeadLoss.apply(features.flatten(0, 1), head, targets.flatten(), dtype, way)


def product_dtype(features: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with such a tensor, of any shape, also in autocast."""
    device = features.device.type
    on = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else features.dtype


def head_logits(x: Tensor, weight: Tensor, V: int) -> Tensor:
    """Return the logits of tokens, -inf beyond the vocabulary.  (R, C), (P, C) -> (R, P)"""
    logits = x @ weight.T
    logits[:, V:] = -torch.inf
    return logits


def padded(head: Tensor) -> Tensor:
    """Return the head with rows added that its device multiplies faster with.  (V, C) -> (P, C)"""
    return F.pad(head, (0, 0, 0, -len(head) % 64)) if head.is_cuda else head


class _HeadLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        head: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        way: CrossEntropy,
    ) -> Tensor:
        V, needs_grad = len(head), any(ctx.needs_input_grad)
        of_features, of_head = ctx.needs_input_grad[:2]
        x, weight = features.to(dtype), padded(head.to(dtype))
        wide = torch.promote_types(dtype, torch.float32)
        count = (targets != NOT_LEARNED).sum().clamp(min=1)
        share = 1 / count.to(wide) if needs_grad else None
        total = torch.zeros((), dtype=wide, device=x.device)
        d_features = torch.empty_like(x) if of_features else None
        d_weight = torch.zeros_like(weight, dtype=wide) if of_head else None
        rows = max(1, cost.LOGITS_AT_ONCE // V)
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            logits = head_logits(x[chunk], weight, V)
            nats, d_logits = way(logits, targets[chunk], share)
            del logits
            total += nats
            if d_logits is not None and d_features is not None:
                d_features[chunk] = d_logits @ weight
            if d_logits is not None and d_weight is not None:
                d_weight += d_logits.T @ x[chunk]
        ctx.save_for_backward(
            None if d_features is None else d_features.to(features.dtype),
            None if d_weight is None else d_weight[:V].to(head.dtype),
        )
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # In place, as they are large; what is frozen has none.
        scaled = (None if each is None else each.mul_(grad) for each in ctx.saved_tensors)
        return *scaled, None, None, None
