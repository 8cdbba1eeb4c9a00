"""From the logits of several texts to a token for each, with its log-probability.

Each text has its own settings and generator. Texts with equal settings are sampled in one batch,
with the same result as alone. Knows nothing of slots or time.

Shapes:  N texts    V vocabulary    S tokens of the longest text    T tokens of one text
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.settings import SamplingSettings
from .job import Job, Scored
from .sampling import NotFiniteError, next_token


@dataclass(eq=False)
class Writer:
    """The state of one text: its tokens so far, and what its next token depends on."""

    job: Job
    generator: torch.Generator
    bias: Tensor | None  # (V,), added to the logits
    text: list[int]  # the prompt and the generated tokens

    @classmethod
    def of(cls, job: Job, vocab_size: int) -> "Writer":
        """Return the state of a job that has not begun."""
        bias = None
        if job.bias or job.presence_penalty or job.frequency_penalty:
            bias = torch.zeros(vocab_size)
            bias[list(job.bias)] = torch.tensor([*job.bias.values()], dtype=bias.dtype)
        return cls(job, torch.Generator().manual_seed(job.seed), bias, list(job.prompt))

    @property
    def new(self) -> list[int]:
        """The generated tokens."""
        return self.text[len(self.job.prompt) :]

    @property
    def written(self) -> int:
        """The number of generated tokens."""
        return len(self.text) - len(self.job.prompt)

    def take(self, token: int) -> None:
        """Append a token, and apply the presence and frequency penalties to it."""
        if self.bias is not None:
            first = token not in self.new
            self.bias[token] -= self.job.frequency_penalty + first * self.job.presence_penalty
        self.text.append(token)


def choose(writers: Sequence[Writer], logits: Tensor) -> list[int | None]:
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
