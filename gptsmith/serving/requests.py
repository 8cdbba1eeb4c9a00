"""What a request may say, in OpenAI's JSON: checked field by field, and the engine's jobs for it.

Knows nothing of routes, tokens' text or answers. The models also are the description of the API.
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
SEEDS = 2**63  # PyTorch takes whole numbers from -SEEDS to twice that


class StreamOptions(RequestObject):
    """What a stream tells besides its text."""

    include_usage: bool = Field(False, description="end with an event that counts the tokens")


class CommonRequest(RequestObject):
    """What both kinds of request may say."""

    model: str = Field(description="the name of the model, as /v1/models has it")
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float = Field(
        1.0, gt=0, le=1, description="choose among the likeliest that make up this probability"
    )
    top_k: int | None = Field(None, ge=1, description="choose among the K likeliest (not OpenAI's)")
    min_p: float | None = Field(
        None, gt=0, le=1, description="leave out what is rarer than this share of the likeliest"
    )
    repetition_penalty: float = Field(
        1.0, gt=0, description="above 1 makes tokens of the text so far less likely"
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="taken from the logits of tokens that were generated"
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="the same, for each time that they were"
    )
    logit_bias: LogitBias = Field({}, description="added to the logits of these tokens, by id")
    n: int = Field(1, ge=1, le=MOST_CHOICES, description="texts for each prompt")
    stop: Stop = Field([], description="the text ends before the first of these")
    seed: int | None = Field(
        None, ge=-SEEDS, lt=SEEDS, description="the same seed gives the same text; choice j has + j"
    )
    stream: bool = Field(False, description="send the text piece by piece, as events")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="accepted, and not used")

    @model_validator(mode="after")
    def consistent(self) -> Self:
        """The request, if its fields suit one another."""
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options is for stream true only: leave it out", "stream_options")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def candidates(self) -> int:
        """Texts generated for each prompt, of which n are told."""
        return self.n

    @property
    def scores_prompt(self) -> bool:
        """Whether the tokens of the prompt get log-probabilities too."""
        return False

    def sampling(self) -> SamplingSettings:
        """How the next token is chosen."""
        return SamplingSettings(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=None if self.top_p == 1 else self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )


class CompletionRequest(CommonRequest):
    """Texts to continue."""

    unsupported = {"suffix": "GPT-2 writes from left to right, leave it out"}  # noqa: RUF012

    prompt: Prompt = Field([""], description="what to continue; nothing begins a text")
    max_tokens: int = Field(16, ge=0, description="new tokens at most")
    best_of: int | None = Field(
        None, ge=1, le=MOST_CHOICES, description="texts written, of which the n likeliest are told"
    )
    logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="likeliest tokens told beside each"
    )
    echo: bool = Field(False, description="begin each text with its prompt")

    @model_validator(mode="after")
    def possible(self) -> Self:
        """The request, if its fields suit one another."""
        if self.best_of is not None and self.best_of < self.n:
            raise refused(f"best_of is {self.best_of}: at least n, {self.n}, is needed", "best_of")
        if self.stream and self.candidates > self.n:
            raise refused("best_of cannot be streamed: it is known in the end only", "best_of")
        return self

    @property
    def candidates(self) -> int:
        """Texts generated for each prompt, of which n are told."""
        return self.n if self.best_of is None else self.best_of

    @property
    def most_tokens(self) -> int:
        """New tokens at most."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Likeliest tokens told beside each; None for no logprobs."""
        return self.logprobs

    @property
    def scores_prompt(self) -> bool:
        """Whether the tokens of the prompt get log-probabilities too."""
        return self.echo and self.logprobs is not None


class Message(RequestObject):
    """What somebody said."""

    unsupported = dict.fromkeys(
        ("tool_calls", "function_call", "tool_call_id", "audio"), "this model only writes text"
    )

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None


class ResponseFormat(RequestObject):
    """How a message is written: as text."""

    type: Literal["text"]


class ChatCompletionRequest(CommonRequest):
    """A conversation to go on with."""

    unsupported = dict.fromkeys(
        ("tools", "tool_choice", "functions", "function_call", "audio", "modalities"),
        "this model only writes text, leave it out",
    )

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=0, description="new tokens at most (default: as many as there is room for)"
    )
    max_tokens: int | None = Field(None, ge=0, description="its older name")
    logprobs: bool = Field(False, description="tell the log-probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="likeliest tokens told beside each"
    )
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def possible(self) -> Self:
        """The request, if its fields suit one another."""
        if self.top_logprobs is not None and not self.logprobs:
            raise refused("top_logprobs is for logprobs true only", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens):
            raise refused("max_tokens is the older name of max_completion_tokens: take one")
        return self

    @property
    def most_tokens(self) -> int | None:
        """New tokens at most; None for as many as there is room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Likeliest tokens told beside each; None for no logprobs."""
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
    """What the engine is to generate: `candidates` texts for each prompt, prompt by prompt.

    Raises ApiError for what does not fit the model. `deadline` is by time.monotonic.
    """
    check_sizes(request, prompts, config)
    limit = config.context_length  # ends a text, whatever was asked for
    seed = secrets.randbits(32) if request.seed is None else request.seed
    alternatives = request.alternatives
    if request.candidates > request.n and alternatives is None:
        alternatives = 0  # the likeliest texts are to be found
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
    """Raise ApiError for what does not fit the model."""
    V, limit = config.vocab_size, config.context_length
    for ids in prompts:
        if len(ids) > limit:
            raise too_long(f"{len(ids):,} tokens", limit)
        if not 0 <= min(ids) <= max(ids) < V:
            raise refused(f"the prompt has ids outside the vocabulary: 0 to {V - 1} are needed")
    if request.top_k is not None and request.top_k > V:
        raise refused(f"top_k is {request.top_k}: at most the vocabulary, {V}, is needed", "top_k")
    if max(request.logit_bias, default=0) >= V:
        got = max(request.logit_bias)
        raise refused(f"logit_bias has token {got}: 0 to {V - 1} are needed", "logit_bias")


def too_long(size: str, limit: int) -> ApiError:
    """The error of a prompt of that size, for which the context is too short."""
    return refused(
        f"the prompt has {size}, and the model's context_length is {limit:,}: shorten it",
        code="context_length_exceeded",
    )
