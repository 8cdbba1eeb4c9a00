"""Which of two answers is better: log-probabilities of answers, and the loss of direct preference
optimization (DPO; Rafailov et al., 2023).

A pair is a prompt with two answers, the chosen one and the rejected one. The model learns to raise
the chosen answer's probability over the rejected one's, compared with what a reference, the model
before training, thinks of both. Knows nothing of how pairs and the reference are kept.

Shapes:  P pairs, of 2 answers: the chosen, the rejected    B rows    T tokens    C channels
         N counted tokens    R tokens of a chunk    V vocabulary    W padded vocabulary
         K places of dropout
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from ..config import cost
from . import loss
from .gpt import GPT


class Preference(NamedTuple):
    """How much a model prefers the chosen answers, compared with the reference."""

    loss: Tensor  # (), mean over pairs
    margins: Tensor  # (P,), the chosen answers' rewards above the rejected ones'

    @property
    def accuracy(self) -> Tensor:
        """Share of the pairs whose chosen answer has the larger reward.  ()"""
        return (self.margins > 0).double().mean()


def preference_loss(logprobs: Tensor, reference: Tensor, beta: float) -> Preference:
    """Return DPO's loss, -log sigmoid(margin), and the margins.  (P, 2), (P, 2) -> (), (P,)

    An answer's reward is `beta` times its log-probability above the reference's; a margin is the
    chosen answer's reward above the rejected one's.
    """
    rewards = beta * (logprobs - reference)  # (P, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    return Preference(-F.logsigmoid(margins).mean(), margins.detach())


def preference(
    model: GPT,
    tokens: Tensor,
    targets: Tensor,
    reference: Tensor,
    beta: float,
    seeds: Tensor | None = None,
) -> Preference:
    """Return `preference_loss` of a model.  (P, 2, T), (P, 2, T), (P, 2), (P, K) -> (), (P,)

    `reference` is what `answer_logprobs` returned before training. Both answers of a pair lose the
    same to dropout, which is drawn by the pair's seeds.
    """
    return preference_loss(answer_logprobs(model, tokens, targets, seeds), reference, beta)


@dataclass(frozen=True)
class PreferenceLoss:
    """What training minimizes, with the tensors of a micro-batch in this order: `preference`."""

    beta: float

    def loss(self, model: GPT, *batch: Tensor) -> Tensor:
        """Return the mean loss of pairs.  (P, 2, T), (P, 2, T), (P, 2), maybe (P, K) -> ()"""
        tokens, targets, reference, *seeds = batch
        return preference(model, tokens, targets, reference, self.beta, *seeds).loss

    def counted(self, *batch: Tensor) -> Tensor:
        """Return the number of pairs, each of which weighs the same.  (P, 2, T), ... -> ()"""
        return torch.tensor(len(batch[0]), device=batch[0].device)


def answer_logprobs(
    model: GPT, tokens: Tensor, targets: Tensor, seeds: Tensor | None = None
) -> Tensor:
    """Return the log-probability of each pair's two answers, in float64 and nats.

    (P, 2, T), (P, 2, T), (P, K) -> (P, 2)
    """
    if seeds is not None:
        seeds = seeds.repeat_interleave(2, 0)
    features = model.features(tokens.flatten(0, 1), None, seeds)
    found = target_logprobs(features, model.lm_head.weight, targets.flatten(0, 1))
    return found.view(-1, 2)


def target_logprobs(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Return the summed log-probability of each row's counted targets, in float64 and nats.

    (B, T, C), (V, C), (B, T) -> (B,). Logits are computed of counted tokens only, a chunk at a
    time, in autocast's precision where that is on, and once more in the backward pass, which knows
    what each row weighs. Sums are in float64, since the loss is about small differences of them:
    in float32, -1,000 has errors of 0.00003.
    """
    if torch.compiler.is_compiling():
        return _outside_graphs(features, head, targets)
    return _target_logprobs(features, head, targets)


def _target_logprobs(features: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Do the work of `target_logprobs`.  (B, T, C), (V, C), (B, T) -> (B,)"""
    rows, places = (targets != loss.NOT_LEARNED).nonzero(as_tuple=True)
    dtype = loss.product_dtype(features)
    each = _Logprobs.apply(features[rows, places], head, targets[rows, places], dtype)
    spread = torch.zeros(targets.shape, dtype=torch.float64, device=features.device)
    # Spread again to sum in a fixed order, which adding by index has not on GPUs.
    return spread.index_put((rows, places), each.double()).sum(1)


# How many tokens count is known only when it runs, so that it is no part of a compiled graph.
# torch.compiler.disable would import the compiler here, which takes more than a second; what
# PyTorch's own functions use imports it when they are called.
_outside_graphs = _disable_dynamo(_target_logprobs)


class _Logprobs(torch.autograd.Function):
    """The log-probability of each target.  (N, C), (V, C), (N,) -> (N,)"""

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, head: Tensor, targets: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(features, head, targets)
        ctx.dtype, wide = dtype, torch.promote_types(dtype, torch.float32)
        x, weight = features.to(dtype), loss.padded(head.to(dtype))  # (N, C), (W, C)
        found = torch.empty(len(targets), dtype=wide, device=features.device)
        for chunk, index in _chunks(targets, len(head)):
            logits = loss.head_logits(x[chunk], weight, len(head)).to(wide)  # (R, W)
            found[chunk] = logits.log_softmax(1).gather(1, index)[:, 0]
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        features, head, targets = ctx.saved_tensors
        x, weight = features.to(ctx.dtype), loss.padded(head.to(ctx.dtype))
        d_features = torch.empty_like(x)
        # A frozen head, as with adapters, needs no gradient.
        d_weight = torch.zeros_like(weight, dtype=grad.dtype) if ctx.needs_input_grad[1] else None
        for chunk, index in _chunks(targets, len(head)):
            share = grad[chunk, None]  # (R, 1)
            logits = loss.head_logits(x[chunk], weight, len(head)).to(grad.dtype)
            d_logits = logits.softmax(1).mul_(-share).scatter_add_(1, index, share).to(ctx.dtype)
            d_features[chunk] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.T @ x[chunk]
        d_head = None if d_weight is None else d_weight[: len(head)].to(head.dtype)
        return d_features.to(features.dtype), d_head, None, None


def _chunks(targets: Tensor, V: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of tokens whose logits are held at once, and their targets (R, 1).  (N,)"""
    rows = max(1, cost.LOGITS_AT_ONCE // V)
    for start in range(0, len(targets), rows):
        chunk = slice(start, start + rows)
        yield chunk, targets[chunk, None]
