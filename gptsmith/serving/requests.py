"""Requests in OpenAI's JSON, with vLLM's additions, checked field by field.

Knows nothing of routes, tokenizers, jobs or responses. The models are also the OpenAPI description.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import FailFast, Field, model_validator

from ..config.settings import SamplingSettings
from .errors import refused
from .fields import Content, LogitBias, Prompt, RequestObject, Stop, TokenIds

MOST_CHOICES = 128  # of one prompt, as OpenAI allows
MOST_ALTERNATIVES = 20
SEEDS = 2**63  # PyTorch's generators take seeds from -SEEDS to twice that
UNUSED: Any = Field(None, description="accepted, but not used")


class StreamOptions(RequestObject):
    """What a stream reports besides its text."""

    neutral = {"include_obfuscation": (False,)}  # noqa: RUF012

    include_usage: bool = Field(False, description="add a last event with the token counts")
    continuous_usage_stats: bool = Field(
        False, description="with include_usage, give the counts so far in every event"
    )


class CommonRequest(RequestObject):
    """The fields that both kinds of request have."""

    neutral = {"top_k": (0, -1), "min_p": (0,)}  # noqa: RUF012

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
    stop_token_ids: TokenIds = Field([], description="a completion also ends at these tokens")
    ignore_eos: bool = Field(False, description="do not end at the model's own end tokens")
    min_tokens: int = Field(0, ge=0, description="minimum number of new tokens")
    seed: int | None = Field(
        None, ge=-SEEDS, lt=SEEDS, description="same seed, same text; choice j uses seed + j"
    )
    stream: bool = Field(False, description="send the text as it is generated, as events")
    stream_options: StreamOptions = StreamOptions.model_construct()
    user: str | None = UNUSED

    @model_validator(mode="after")
    def consistent(self) -> Self:
        """Return the request; ApiError if its fields contradict each other."""
        options = self.stream_options
        if not self.stream and (options.include_usage or options.continuous_usage_stats):
            raise refused("stream_options needs stream true: leave it out", "stream_options")
        if self.most_tokens is not None and self.min_tokens > self.most_tokens:
            raise refused(
                f"min_tokens is {self.min_tokens}: at most max_tokens, {self.most_tokens}, is "
                "possible",
                "min_tokens",
            )
        return self

    @property
    def most_tokens(self) -> int | None:
        """Maximum number of new tokens; None for up to the context limit."""
        raise NotImplementedError

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

    neutral = CommonRequest.neutral | {"suffix": ("",), "logprobs": (False,)}
    why = "GPT-2 writes from left to right"

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

    neutral = {  # noqa: RUF012
        "annotations": ([],),
        "audio": (),
        "function_call": (),
        "refusal": ("",),
        "tool_call_id": (),
        "tool_calls": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None


class ChatCompletionRequest(CommonRequest):
    """A conversation to answer."""

    neutral = CommonRequest.neutral | {
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=0, description="maximum number of new tokens (default: up to the context limit)"
    )
    max_tokens: int | None = Field(None, ge=0, description="older name of max_completion_tokens")
    logprobs: bool = Field(False, description="report the log-probability of each token")
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_ALTERNATIVES, description="likeliest alternatives to report per token"
    )
    metadata: dict[str, str] | None = UNUSED
    parallel_tool_calls: bool | None = UNUSED
    prompt_cache_key: str | None = UNUSED
    prompt_cache_options: dict[str, Any] | None = UNUSED
    prompt_cache_retention: str | None = UNUSED
    safety_identifier: str | None = UNUSED

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
