"""What one text asks of the engine, and what comes of it step by step.

Knows nothing of how tokens are computed, of characters or of HTTP.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from ..config.settings import SamplingSettings
from .drafts import Draft


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A prompt to continue, and how. Two jobs that ask the same are two."""

    prompt: Sequence[int]  # ids; from 1 to context_length of them, unless beyond_context
    max_tokens: int  # new ones at most; with 0 the prompt is only scored
    sampling: SamplingSettings
    seed: int
    ends: frozenset[int] = frozenset()  # a token of these ends the text
    bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    presence_penalty: float = 0.0  # taken from the logits of tokens generated before
    frequency_penalty: float = 0.0  # the same, for each time that they were
    alternatives: int | None = None  # likeliest tokens told beside each; None tells no logprobs
    score_prompt: bool = False  # one that is within the context
    deadline: float = math.inf  # by time.monotonic, in seconds
    beyond_context: bool = False  # go on past the limit, seeing the last context_length tokens
    draft: Draft | None = None  # guesses the next tokens; the text stays the same


class Scored(NamedTuple):
    """A token and, where asked for, its natural log-probability and the likeliest of its place.

    They are the model's own, before temperature, filters, bias and penalties.
    """

    id: int
    logprob: float | None = None  # the first token of a prompt has none
    alternatives: tuple[tuple[int, float], ...] = ()  # (id, logprob), the likeliest first


Finish = Literal["stop", "length", "timeout", "failed"]


class News(NamedTuple):
    """What a step brought to a job; the last of a job says how it finished.

    "stop" comes with the token that ended the text, "length" with the last that there was room
    for; "failed" has a reason.
    """

    job: Job
    prompt: tuple[Scored, ...] = ()  # the next tokens of the prompt, where they are to be scored
    token: Scored | None = None  # a new one
    finish: Finish | None = None
    reason: str = ""
