"""From logits to the next token: filters of the logits, and one draw; of several texts at once.

Each text has its own settings and generator. Texts with equal settings are sampled in one batch,
with the same result as alone. Knows nothing of models, slots or time.

Shapes:  B batch    V vocabulary    S tokens seen so far    K likeliest tokens    N probabilities,
         or texts    T tokens of one text
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.settings import SamplingSettings
from ..machine.devices import with_float64
from .job import Scored, Writer

NEVER = float("-inf")
BLOCK_SIZE = 256  # tokens whose probabilities are summed first, see `drawn`
FEW = 256  # tokens; top_p mostly needs fewer than these likeliest ones
LARGE = 1e30  # float32 can represent it and its inverse
ROUNDING = 1e-4  # more than the rounding error of a sum of probabilities
NOT_FINITE = "the model's logits are not finite: its weights have diverged"


class NotFiniteError(ValueError):
    """The logits are not finite, so no token can be chosen."""


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens of each row, and ties with the k-th.  (B, V) -> (B, V)"""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities sum to p or more; of ties, the first.

    (B, V) -> (B, V)
    """
    probabilities = with_float64(logits.softmax(dim=-1))
    # Sorting the whole vocabulary is slow, and the few likeliest tokens are mostly enough.
    likeliest = probabilities.topk(min(FEW, logits.shape[-1])).values  # (B, K)
    least, count = last_kept(likeliest, p)
    more = likeliest.sum(dim=-1) < p + ROUNDING  # (B,)
    if more.any():
        least[more], count[more] = last_kept(probabilities[more].sort(descending=True).values, p)
    above, equal = probabilities > least, probabilities == least
    room = count - above.sum(dim=-1, keepdim=True)  # how many of the ties are kept: (B, 1)
    kept = above | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= room))
    return logits.masked_fill(~kept, NEVER)


def last_kept(ordered: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return the smallest probability needed to reach p, and how many are needed.

    `ordered` has probabilities in descending order.  (B, K) -> (B, 1), (B, 1)
    """
    before = ordered.cumsum(dim=-1) - ordered  # sum of the larger ones
    count = (before < p).sum(dim=-1, keepdim=True).clamp(min=1)  # p may be 0 in float32
    return ordered.gather(-1, count - 1), count


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """Keep tokens at least `share` times as likely as the likeliest.  (B, V) -> (B, V)"""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(
        probabilities < share * probabilities.amax(dim=-1, keepdim=True), NEVER
    )


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Lower the logits of seen tokens: divide positive ones, multiply others (CTRL, 2019).

    (B, V), (B, S) -> (B, V)
    """
    scores = logits.gather(-1, seen)
    penalty = min(max(penalty, 1 / LARGE), LARGE)  # infinite in float32, it would make 0 NaN
    scores = torch.where(scores > 0, scores / penalty, scores * penalty)
    return logits.scatter(-1, seen, scores.clamp(-LARGE, LARGE))


def filtered(logits: Tensor, seen: Tensor, settings: SamplingSettings) -> Tensor:
    """Apply the repetition penalty, the temperature and the filters, in float32.

    (B, V), (B, S) -> (B, V). At temperature 0 the logits are not divided.
    """
    logits = logits.float()
    if settings.repetition_penalty != 1.0:
        logits = penalize_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature != 0:
        # The largest logit becomes 0, so that no temperature near 0 makes it overflow.
        temperature = max(settings.temperature, 1e-30)  # smaller ones could be 0 in float32
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
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
    """Choose one token per row, each with its own generator.  (B, V), (B, S) -> (B,)

    The draw inverts the cumulative distribution at a uniform random number from the CPU, so that a
    seed means the same on every device, and a row does not depend on the others. NotFiniteError
    where a row's logits are not finite.
    """
    logits = filtered(logits, seen, settings)
    if settings.temperature == 0:
        likeliest = logits.argmax(dim=-1, keepdim=True)  # argmax returns a NaN if there is one
        check_finite(logits.gather(-1, likeliest))
        return likeliest.squeeze(-1)
    probabilities = logits.softmax(dim=-1)
    check_finite(probabilities[:, 0])  # one NaN makes the whole row NaN
    draws = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    tokens = drawn(probabilities, draws.to(probabilities.device).unsqueeze(-1))
    return tokens.to(logits.device)


def check_finite(numbers: Tensor) -> None:
    """Raise NotFiniteError unless all numbers are finite.  (B, ...)"""
    if not numbers.isfinite().all():
        raise NotFiniteError(NOT_FINITE)


def drawn(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Invert the cumulative distribution at numbers from 0 to 1.  (B, V), (B, 1) -> (B,)

    Finds the block of tokens first, then the token within it, since the cumulative sum over a large
    vocabulary would take longer than all other operations here.
    """
    B, V = probabilities.shape
    blocks = F.pad(probabilities, (0, -V % BLOCK_SIZE)).view(B, -1, BLOCK_SIZE)
    sums = blocks.sum(dim=-1)  # (B, V / BLOCK_SIZE)
    block, height = pick(sums, draws * sums.double().sum(dim=-1, keepdim=True))
    inside = blocks.take_along_dim(block.unsqueeze(-1), dim=1).squeeze(1)  # (B, BLOCK_SIZE)
    return (block * BLOCK_SIZE + pick(inside, height)[0]).squeeze(-1)


def pick(shares: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first index where the cumulative sum exceeds `height`, and the height above the
    sum before it.  (B, N), (B, 1) -> (B, 1), (B, 1)"""
    sums = shares.double().cumsum(dim=-1)  # (B, N)
    # Rounding must not lead past the last index.
    height = height.minimum(sums[:, -1:].nextafter(torch.zeros_like(height)))
    index = torch.searchsorted(sums, height, right=True)
    return index, height - (sums - shares).gather(-1, index)


# -- several texts, each with its own settings


def choose_tokens(writers: Sequence[Writer], logits: Tensor) -> list[int | None]:
    """Choose the next token of each text, without appending it.  N texts, (N, V) -> N tokens

    None where a text's logits are not finite.
    """
    alike: dict[SamplingSettings, list[int]] = {}
    for number, writer in enumerate(writers):
        alike.setdefault(writer.job.sampling, []).append(number)
    if len(alike) == 1:
        return draw(writers, logits)
    chosen: list[int | None] = [None] * len(writers)
    for numbers in alike.values():
        tokens = draw([writers[number] for number in numbers], logits[numbers])
        for number, token in zip(numbers, tokens, strict=True):
            chosen[number] = token
    return chosen


def draw(writers: Sequence[Writer], logits: Tensor) -> list[int | None]:
    """Choose a token for each of the texts, which have equal settings.  (N, V) -> N tokens"""
    biased = logits
    if any(writer.bias is not None for writer in writers):
        none = torch.zeros_like(logits[0])
        biases = [none if writer.bias is None else writer.bias.to(none) for writer in writers]
        biased = logits + torch.stack(biases)
    sampling = writers[0].job.sampling
    # Only the repetition penalty needs the text, and making a tensor of it takes a while.
    texts = [writer.text for writer in writers] if sampling.repetition_penalty != 1 else []
    generators = [writer.generator for writer in writers]
    try:
        return next_token(biased, seen(texts, logits.device), sampling, generators).tolist()
    except NotFiniteError:
        if len(writers) == 1:
            return [None]
        each = (draw([writer], row[None]) for writer, row in zip(writers, logits, strict=True))
        return [token for tokens in each for token in tokens]


def seen(texts: Sequence[list[int]], device: torch.device) -> Tensor:
    """Return the texts as one tensor, padded with their first tokens.  N texts -> (N, S)"""
    longest = max(map(len, texts), default=0)
    rows = [text + text[:1] * (longest - len(text)) for text in texts]
    return torch.tensor(rows, dtype=torch.long, device=device)


def scored(
    tokens: Sequence[int], logits: Tensor, alternatives: Sequence[int | None]
) -> list[Scored]:
    """Add to each token its log-probability and the likeliest alternatives, where requested.

    T tokens, the logits before each (T, V), T numbers of alternatives or None -> T
    """
    asked = [count for count in alternatives if count is not None]
    if not asked:
        return [Scored(token) for token in tokens]
    logprobs = logits.float().log_softmax(dim=-1)  # (T, V)
    ids = torch.tensor(tokens, device=logits.device).unsqueeze(-1)  # (T, 1)
    own = logprobs.gather(-1, ids).squeeze(-1).tolist()
    most = min(max(asked), logprobs.shape[-1])
    values, likeliest = (found.tolist() for found in logprobs.topk(most))  # (T, most)
    return [
        Scored(token)
        if count is None
        else Scored(token, own[i], tuple(zip(likeliest[i], values[i], strict=True))[:count])
        for i, (token, count) in enumerate(zip(tokens, alternatives, strict=True))
    ]
