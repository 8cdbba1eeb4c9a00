"""From logits to the next token: small filters, composed, and one draw.

Knows nothing of models, text or time.

Shapes:  B batch    V vocabulary    S tokens seen so far
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .settings import SamplingSettings

NEVER = float("-inf")


class NotFiniteError(ValueError):
    """The logits hold NaN, or nothing that could be chosen."""


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leave the k likeliest of each row; ties with the k-th stay.  (B, V) -> (B, V)"""
    smallest = logits.topk(k).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Leave the fewest likeliest tokens whose probabilities reach p.  (B, V) -> (B, V)"""
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier ones make up
    drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(drop, NEVER)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Leave what is at least `share` times as likely as the likeliest.  (B, V) -> (B, V)"""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(
        probabilities < share * probabilities.amax(dim=-1, keepdim=True), NEVER
    )


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lower the logits of tokens seen: divided where positive, else multiplied (CTRL, 2019).

    (B, V), (B, S) -> (B, V)
    """
    scores = logits.gather(-1, seen)
    scores = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits.scatter(-1, seen, scores)


def filtered(logits: Tensor, seen: Tensor, settings: SamplingSettings) -> Tensor:
    """The logits to draw from, after every filter that the settings ask for, as float32.

    (B, V), (B, S) -> (B, V); the temperature must not be 0, which is no distribution.
    """
    logits = logits.float()
    if settings.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature != 0:
        # From the largest down, so that a temperature near 0 cannot overflow what matters.
        coldest = max(settings.temperature, 1e-30)  # which float32 can still hold
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / coldest
    if settings.top_k is not None:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p is not None:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p is not None:
        logits = keep_min_p(logits, settings.min_p)
    return logits


def next_token(
    logits: Tensor, seen: Tensor, settings: SamplingSettings, generators: Sequence[torch.Generator]
) -> Tensor:
    """Choose one token per row, each row by its own generator.  (B, V), (B, S) -> (B,)

    The draw inverts the cumulative distribution at one uniform number made on the CPU, so a seed
    means the same on every device, and a row does not depend on its neighbours.
    """
    logits = filtered(logits, seen, settings)
    likeliest = logits.argmax(dim=-1, keepdim=True)  # (B, 1); a NaN anywhere counts as the largest
    if not logits.gather(-1, likeliest).isfinite().all():
        raise NotFiniteError("the model's logits are not finite: its weights have diverged")
    if settings.temperature == 0:
        return likeliest.squeeze(-1)
    cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    height = draws.to(logits.device).unsqueeze(-1) * cumulative[:, -1:]  # (B, 1)
    return torch.searchsorted(cumulative, height, right=True).squeeze(-1)
