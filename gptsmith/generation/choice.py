"""From the logits of many texts to a token for each, and what the model thought of it.

Each text has settings and a generator of its own; those alike are drawn together, which gives what
each would draw alone. Knows nothing of slots or time.

Shapes:  N texts    V vocabulary    S tokens seen    T tokens of one text
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .job import Job, Scored
from .sampling import NotFiniteError, next_token


@dataclass(eq=False)
class Writer:
    """A job's tokens so far, and what its next one depends on."""

    job: Job
    generator: torch.Generator
    bias: Tensor | None  # (V,), added to its logits
    new: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, job: Job, vocab_size: int) -> "Writer":
        """A job that has not begun."""
        bias = None
        if job.bias or job.presence_penalty or job.frequency_penalty:
            bias = torch.zeros(vocab_size)
            bias[list(job.bias)] = torch.tensor([*job.bias.values()], dtype=bias.dtype)
        return cls(job, torch.Generator().manual_seed(job.seed), bias)

    def take(self, token: int) -> None:
        """Add a token, which is less likely to come again where there are penalties."""
        if self.bias is not None:
            first = token not in self.new
            self.bias[token] -= self.job.frequency_penalty + first * self.job.presence_penalty
        self.new.append(token)


def choose(writers: Sequence[Writer], logits: Tensor) -> list[int | None]:
    """The next token of each, who is not told of it yet; None where its logits are not finite.

    N times, (N, V) -> N tokens
    """
    alike: dict[object, list[int]] = {}
    for number, writer in enumerate(writers):
        sampling = writer.job.sampling
        looks_back = sampling.repetition_penalty != 1
        alike.setdefault(writer if looks_back else sampling, []).append(number)
    chosen: list[int | None] = [None] * len(writers)
    for numbers in alike.values():
        rows = logits if len(numbers) == len(writers) else logits[numbers]
        for number, token in zip(numbers, draw([writers[n] for n in numbers], rows), strict=True):
            chosen[number] = token
    return chosen


def draw(writers: Sequence[Writer], logits: Tensor) -> list[int | None]:
    """A token for each of some whose sampling is the same.  (N, V) -> N tokens"""
    biased = logits
    if any(writer.bias is not None for writer in writers):
        none = torch.zeros_like(logits[0])
        biases = [none if writer.bias is None else writer.bias.to(none) for writer in writers]
        biased = logits + torch.stack(biases)
    # Only one who is drawn for alone looks back at the tokens seen.
    text = torch.tensor([*writers[0].job.prompt, *writers[0].new], device=logits.device)  # (S,)
    generators = [writer.generator for writer in writers]
    try:
        sampling = writers[0].job.sampling
        return next_token(biased, text.expand(len(writers), -1), sampling, generators).tolist()
    except NotFiniteError:
        if len(writers) == 1:
            return [None]
        each = (draw([writer], row[None]) for writer, row in zip(writers, logits, strict=True))
        return [token for tokens in each for token in tokens]


def scored(
    tokens: Sequence[int], logits: Tensor, alternatives: Sequence[int | None]
) -> list[Scored]:
    """Tokens with what the logits before each say of it, where asked for.  T, (T, V), T -> T"""
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
