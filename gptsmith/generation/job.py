"""A request to generate one text, the text so far, and the results step by step.

Knows nothing of how tokens are computed, of characters or of HTTP.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..config.settings import SamplingSettings
from .drafts import Draft

FORBIDDEN = -1e30  # added to a logit; infinity would fail where every token ends the text


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A prompt to continue, and how. Jobs are compared by identity."""

    prompt: Sequence[int]  # ids; 1 to context_length of them, or more with beyond_context
    max_tokens: int  # largest number of new tokens; 0 only scores the prompt
    sampling: SamplingSettings
    seed: int
    ends: frozenset[int] = frozenset()  # tokens that end the text
    min_tokens: int = 0  # new tokens before which no token that ends the text is chosen
    bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    presence_penalty: float = 0.0  # subtracted from the logits of tokens generated before
    frequency_penalty: float = 0.0  # subtracted once for each time that a token was generated
    alternatives: int | None = None  # likeliest tokens to return with each; None: no logprobs
    score_prompt: bool = False  # return the tokens of a prompt within the context with logprobs
    deadline: float = math.inf  # by time.monotonic, in seconds
    beyond_context: bool = False  # continue past the limit with the last context_length tokens
    draft: Draft | None = None  # guesses the next tokens; the text does not depend on it


class Scored(NamedTuple):
    """A token and, where requested, its log-probability and the likeliest tokens in its place.

    These are the model's own, in nats, before temperature, filters, bias and penalties.
    """

    id: int
    logprob: float | None = None  # None for the first token of a prompt
    alternatives: tuple[tuple[int, float], ...] = ()  # (id, logprob), likeliest first


Finish = Literal["stop", "length", "timeout", "failed"]


class News(NamedTuple):
    """The result of one step for a job; a job's last one says how it finished.

    "stop" comes with the token that ended the text, "length" with the last token that was allowed,
    and "failed" with a reason.
    """

    job: Job
    prompt: tuple[Scored, ...] = ()  # the next scored tokens of the prompt
    token: Scored | None = None  # the new token
    finish: Finish | None = None
    reason: str = ""


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
        if job.bias or job.presence_penalty or job.frequency_penalty or job.min_tokens:
            bias = torch.zeros(vocab_size)
            bias[list(job.bias)] = torch.tensor([*job.bias.values()], dtype=bias.dtype)
            if job.min_tokens:
                bias[list(job.ends)] = FORBIDDEN
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
        """Append a token, apply the penalties to it, and allow the ends after min_tokens."""
        if self.bias is not None:
            first = token not in self.new
            self.bias[token] -= self.job.frequency_penalty + first * self.job.presence_penalty
        self.text.append(token)
        if self.bias is not None and self.written == self.job.min_tokens:
            for end in self.job.ends:
                self.bias[end] = self.job.bias.get(end, 0.0)
