"""Requests in OpenAI's JSON, checked field by field, and the engine's jobs for them.

Knows nothing of routes, tokenizers or responses. The models are also the OpenAPI description.
"""

import secrets
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import FailFast, Field, model_validator

from ..config.model import GPTConfig
from ..config.settings import SamplingSettings
from ..generation.job import Job
from .errors import ApiError, refused
from .fields import Content, LogitBias, Prompt, RequestObject, Stop

MOST_CHOICES = 128  # of one prompt, as OpenAI allows
MOST_ALTERNATIVES = 20
SEEDS = 2**63  # PyTorch's generators take seeds from -SEEDS to twice that


class StreamOptions(RequestObject):
    """What a stream reports besides its text."""

    include_usage: bool = Field(False, description="add a last event with the token counts")


class CommonRequest(RequestObject):
    """The fields that both kinds of request have."""

    model: str = Field(description="name of the model, as listed by /v1/models")
    temperature: float = Field(1.0, ge=0, le=2, description="0 always takes the likeliest token")
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample from the likeliest tokens of this total probability"
    )
    top_k: int | None = Field(None, ge=1, description="sample from the K likeliest (not OpenAI's)")
    min_p: float | None = Field(
        None, gt=0, le=1, description="drop tokens below this share of the top probability"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="above 1, tokens of the text so far become less likely"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted from the logits of generated tokens"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="subtracted for each time that a token was generated"
    )
    logit_bias: LogitBias = Field({}, description="token ids, and what is added to their logits")
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="completions of each prompt")
    stop: Stop = Field([], description="a completion ends before the first of these strings")
    seed: int | None = Field(
        None, ge=-SEEDS, lt=SEEDS, description="same seed, same text; choice j uses seed + j"
    )
    stream: bool = Field(False, description="send the text as it is generated, as events")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="accepted, but not used")

    @model_validator(mode="after")
    def consistent(self) -> Self:
        """Return the request; ApiError if its fields contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options needs stream true: leave it out", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def candidates(self) -> int:
        """Texts generated for each prompt, of which n are returned."""
        return self.n

    @property
    def scores_prompt(self) -> bool:
        """Whether the tokens of the prompt get log-probabilities too."""
        return False

    def sampling(self) -> SamplingSettings:
        """Return the sampling settings."""
        return SamplingSettings(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=None if self.top_p == 1 else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


class CompletionRequest(CommonRequest):
    """Prompts to complete."""

    unsupported = {"suffix": "GPT-2 writes from left to right, leave it out"}  # noqa: RUF012

    prompt: Prompt = Field([""], description="text to continue; if empty, a new text begins")
    max_tokens: int = Field(16, ge=0, description="maximum number of new tokens")
    best_of: int | None = Field(
        None, ge=1, le=MOST_CHOICES, description="generate so many and return the n likeliest"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="likeliest alternatives to report per token"
    )
    echo: bool = Field(False, description="begin each completion with its prompt")

    @model_validator(mode="after")
    def possible(self) -> Self:
        """Return the request; ApiError if its fields contradict each other."""
        if self.best_of is not None and self.best_of < self.n:
            raise refused(f"best_of is {self.best_of}: at least n, {self.n}, is needed", "best_of")
        if self.stream and self.candidates > self.n:
            raise refused(
                "best_of cannot be streamed, because the best is known only at the end: leave it "
                "or stream out",
                "best_of",
            )
        return self

    @property
    def candidates(self) -> int:
        """Texts generated for each prompt, of which n are returned."""
        return self.n if self.best_of is None else self.best_of

    @property
    def most_tokens(self) -> int:
        """Maximum number of new tokens."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Likeliest alternatives to report per token; None for no logprobs."""
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        """Whether the tokens of the prompt get log-probabilities too."""
        return self.echo and self.logprobs is not None


class Message(RequestObject):
    """A message of a conversation."""

    unsupported = dict.fromkeys(
        ("tool_calls", "function_call", "tool_call_id", "audio"), "this model only writes text"
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None


class ResponseFormat(RequestObject):
    """The format of a message: only text."""

    type: Literal["text"]


class ChatCompletionRequest(CommonRequest):
    """A conversation to answer."""

    unsupported = dict.fromkeys(
        ("tools", "tool_choice", "functions", "function_call", "audio", "modalities"),
        "this model only writes text, leave it out",
    )

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=0, description="maximum number of new tokens (default: up to the context limit)"
    )
    max_tokens: int | None = Field(None, ge=0, description="older name of max_completion_tokens")
    logprobs: bool = Field(False, description="report the log-probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="likeliest alternatives to report per token"
    )
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def possible(self) -> Self:
        """Return the request; ApiError if its fields contradict each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs needs logprobs true: set it", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise refused("max_tokens is the older name of max_completion_tokens: give only one")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Maximum number of new tokens; None for up to the context limit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Likeliest alternatives to report per token; None for no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


GenerationRequest = CompletionRequest | ChatCompletionRequest

# -- as jobs


def jobs(
    request: GenerationRequest,
    prompts: Sequence[list[int]],
    config: GPTConfig,
    *,
    ends: frozenset[int],
    deadline: float,
) -> list[Job]:
    """Return the engine's jobs: `candidates` texts for each prompt, prompt by prompt.

    `ends` are the tokens that end a text; `deadline` is by time.monotonic. Raises ApiError if the
    request does not fit the model.
    """
    check_sizes(request, prompts, config)
    limit = config.context_length  # ends every text, whatever max_tokens says
    seed = secrets.randbits(32) if request.seed is None else request.seed
    alternatives = request.alternatives
    if request.candidates > request.n and alternatives is None:
        alternatives = 0  # best_of compares log-probabilities
    return [
        Job(
            prompt=ids,
            max_tokens=limit if request.most_tokens is None else min(request.most_tokens, limit),
            sampling=request.sampling(),
            seed=seed + number * request.candidates + candidate,
            ends=ends,
            bias=request.logit_bias,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            alternatives=alternatives,
            score_prompt=request.scores_prompt,
            deadline=deadline,
        )
        for number, ids in enumerate(prompts)
        for candidate in range(request.candidates)
    ]


def check_sizes(
    request: GenerationRequest, prompts: Sequence[list[int]], config: GPTConfig
) -> None:
    """Raise ApiError if the prompts, top_k or logit_bias do not fit the model."""
    V, limit = config.vocab_size, config.context_length
    for ids in prompts:
        if len(ids) > limit:
            raise too_long(f"{len(ids):,} tokens", limit)
        if not 0 <= min(ids) <= max(ids) < V:
            raise refused(
                f"the prompt has token ids outside the vocabulary: 0 to {V - 1} are needed"
            )
    if request.top_k is not None and request.top_k > V:
        raise refused(f"top_k is {request.top_k}: the vocabulary has only {V} tokens", "top_k")
    if max(request.logit_bias, default=0) >= V:
        got = max(request.logit_bias)
        raise refused(f"logit_bias has token {got}: 0 to {V - 1} are needed", "logit_bias")


def too_long(size: str, limit: int) -> ApiError:
    """Return the error for a prompt that is longer than the context."""
    return refused(
        f"the prompt has {size}, but the model's context_length is {limit:,}: shorten it",
        code="context_length_exceeded",
    )
