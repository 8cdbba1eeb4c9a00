"""From logits to the next token: small filters, composed, and one draw.

Knows nothing of models, text or time.

Shapes:  B batch    V vocabulary    S tokens seen so far    K likeliest tokens    N shares
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.settings import SamplingSettings

NEVER = float("-inf")
BLOCK = 256  # tokens
FEW = 256  # tokens, of which mostly the likeliest make up top_p
LARGE = 1e30  # float32 can hold it, and so it can one divided by it
ROUNDING = 1e-4  # more than a sum of probabilities can be off
NOT_FINITE = "the model's logits are not finite: its weights have diverged"


class NotFiniteError(ValueError):
    """The logits hold NaN, or nothing that could be chosen."""


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Leave the k likeliest of each row; ties with the k-th stay.  (B, V) -> (B, V)"""
    smallest = logits.topk(k).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Leave the fewest likeliest tokens whose probabilities reach p; of equals, the first.

    (B, V) -> (B, V)
    """
    probabilities = logits.softmax(dim=-1)
    # Sorting a few is fast, and mostly enough.
    likeliest = probabilities.topk(min(FEW, logits.shape[-1])).values  # (B, K)
    least, count = last_kept(likeliest, p)
    more = likeliest.sum(dim=-1) < p + ROUNDING  # (B,)
    if more.any():
        least[more], count[more] = last_kept(probabilities[more].sort(descending=True).values, p)
    above, equal = probabilities > least, probabilities == least
    room = count - above.sum(dim=-1, keepdim=True)  # for some of the equals: (B, 1)
    stay = above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= room))
    return logits.masked_fill(~stay, NEVER)


def last_kept(ordered: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Of probabilities from the largest down, the last that is needed to reach p, and how many
    these are.  (B, K) -> (B, 1), (B, 1)"""
    before = ordered.cumsum(dim=-1) - ordered  # what the likelier ones make up
    count = (before < p).sum(dim=-1, keepdim=True).clamp(min=1)  # p may be 0 in float32
    return ordered.gather(-1, count - 1), count


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
    penalty = min(max(penalty, 1 / LARGE), LARGE)  # else 0 times it is NaN in float32
    scores = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits.scatter(-1, seen, scores.clamp(-LARGE, LARGE))


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
    if settings.temperature == 0:
        likeliest = logits.argmax(dim=-1, keepdim=True)  # a NaN anywhere counts as the largest
        check_finite(logits.gather(-1, likeliest))
        return likeliest.squeeze(-1)
    probabilities = logits.softmax(dim=-1)
    check_finite(probabilities[:, 0])  # all of a row are NaN if one of its logits is
    draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    return drawn(probabilities, draws.to(logits.device).unsqueeze(-1))


def check_finite(numbers: Tensor) -> None:
    """Raise NotFiniteError unless all are finite.  (B, ...)"""
    if not numbers.isfinite().all():
        raise NotFiniteError(NOT_FINITE)


def drawn(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The token that a number from 0 to 1 stands for.  (B, V), (B, 1) -> (B,)

    First the block of tokens, then the token in it: the running sum of a large vocabulary takes
    longer than all else here.
    """
    B, V = probabilities.shape
    blocks = F.pad(probabilities, (0, -V % BLOCK)).view(B, -1, BLOCK)
    sums = blocks.sum(dim=-1)  # (B, V / BLOCK)
    block, height = pick(sums, draws * sums.double().sum(dim=-1, keepdim=True))
    inside = blocks.gather(1, block.unsqueeze(-1).expand(B, 1, BLOCK)).squeeze(1)  # (B, BLOCK)
    return (block * BLOCK + pick(inside, height)[0]).squeeze(-1)


def pick(shares: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """The first place at which the running sum is above a height, and how far the height reaches
    into it.  (B, N), (B, 1) -> (B, 1), (B, 1)"""
    sums = shares.double().cumsum(dim=-1)  # (B, N)
    # Rounding must not lead past the end, where no share is.
    height = height.minimum(sums[:, -1:].nextafter(torch.zeros_like(height)))
    place = torch.searchsorted(sums, height, right=True)
    return place, height - (sums - shares).gather(-1, place)
