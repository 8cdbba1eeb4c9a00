"""A model behind OpenAI's API: requests become jobs of the engine, and their texts responses.

Knows nothing of routes, of the engine's steps, or of access control.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ..generation.job import Job
from ..generation.text import Text
from ..generation.writing import prompt_ids
from ..tokenizers import Tokenizer
from ..tokenizers.chat import ChatTemplate
from .answers import ChatCompletionBuilder, CompletionBuilder
from .errors import ApiError, refused, shown
from .jobs import jobs, too_long
from .metrics import Metrics
from .requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    Message,
)
from .streams import (
    EventStream,
    PendingChoice,
    best,
    events,
    merged,
    usage,
    while_connected,
    whole_texts,
)
from .worker import QueueFull, Service, Stream

LONG = 20_000  # characters, which take milliseconds to encode: longer texts go to a thread

T = TypeVar("T")
Look = Callable[[Sequence[int]], dict[str, Any]]  # at what a model does with tokens, for JSON


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model behind the API, its names and its limits."""

    writes: ClassVar[bool] = True
    labels: ClassVar[list[str] | None] = None

    service: Service
    tokenizer: Tokenizer
    name: str
    metrics: Metrics
    aliases: frozenset[str] = frozenset()  # other names that a request may use
    ends: frozenset[int] = frozenset()  # tokens that end a text
    template: ChatTemplate | None = None
    look: Look | None = None  # needed for POST /inspect
    timeout: float = 600.0  # seconds that a request may take
    created: int = field(default_factory=lambda: int(time.time()))
    adapters: tuple["ServedModel", ...] = ()  # of this model, each with an engine of its own

    # -- checking requests
    @property
    def models(self) -> tuple["ServedModel", ...]:
        """The model itself and its adapters."""
        return (self, *self.adapters)

    def named(self, name: str) -> "ServedModel":
        """Return the model that a request names: this one or an adapter; ApiError for another."""
        for model in self.models:
            if name == model.name or name in model.aliases:
                return model
        known = " or ".join(f"'{model.name}'" for model in self.models)
        raise ApiError(
            404,
            f"this server has no model {shown(name)}: use {known}",
            param="model",
            code="model_not_found",
        )

    def check_count(self, prompts: int, request: GenerationRequest) -> None:
        """Raise ApiError for more texts than could ever run and wait at once."""
        most = self.service.slots + self.service.waiting
        if (count := prompts * request.candidates) > most:
            raise refused(f"the request is for {count:,} texts: at most {most:,} are possible")

    @cached_property
    def longest_prompt(self) -> int:
        """Characters of the longest text that can fit the context: every token is the longest."""
        longest = max(map(len, self.tokenizer.pieces.values()))
        return self.service.config.context_length * longest

    @cached_property
    def beginning(self) -> list[int]:
        """What the model reads for an empty prompt."""
        return prompt_ids(self.tokenizer, "")

    async def rows(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Return the token ids of prompts. Long ones are encoded in a thread, so that the event
        loop serves others meanwhile."""
        sizes = [len(prompt) for prompt in prompts if isinstance(prompt, str)]
        self.check_length(max(sizes, default=0))
        encode = self.tokenizer.encode
        return await in_thread(
            lambda: [encode(each) if isinstance(each, str) else each for each in prompts],
            sum(sizes),
        )

    async def conversation(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation; ApiError if there is no template."""
        if (template := self.template) is None:
            raise refused(
                "this model has no chat template: send the prompt as text to /v1/completions, "
                "or /tokenize",
                code="no_chat_template",
            )
        plain = [message.model_dump(exclude_none=True) for message in messages]
        size = sum(len(text) for message in plain for text in message.values())
        self.check_length(size)
        return await in_thread(lambda: template.ids(plain), size)

    def check_length(self, characters: int) -> None:
        """Raise ApiError for more characters than the context can hold."""
        if characters > self.longest_prompt:
            raise too_long(f"{characters:,} characters", self.service.config.context_length)

    # -- responding

    async def complete(self, request: CompletionRequest, http: Request) -> BaseModel | Response:
        """Complete the prompts of a request."""
        begun = time.monotonic()
        self.check_count(len(request.prompt), request)
        rows = await self.rows(request.prompt)
        echoes = None
        if request.echo:
            echoes = [
                prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
                for prompt in request.prompt
            ]
        return await self.answer(request, http, rows, echoes, begun=begun)

    async def chat(self, request: ChatCompletionRequest, http: Request) -> BaseModel | Response:
        """Answer a conversation."""
        begun = time.monotonic()
        self.check_count(1, request)
        ids = await self.conversation(request.messages)
        return await self.answer(request, http, [ids], begun=begun)

    async def answer(
        self,
        request: GenerationRequest,
        http: Request,
        rows: Sequence[list[int]],
        echoes: Sequence[str] | None = None,
        *,
        begun: float,
    ) -> BaseModel | Response:
        """Generate texts for prompts of token ids; return the response, whole or streamed.

        `echoes` are the prompts' texts, if they are to be repeated. Raises ApiError for everything
        that fails before a stream's first event, so that the status can say so.
        """
        with_logprobs = request.alternatives is not None
        kind = (
            CompletionBuilder if isinstance(request, CompletionRequest) else ChatCompletionBuilder
        )
        builder = kind(
            self.name,
            self.tokenizer,
            logprobs=with_logprobs,
            include_usage=request.stream_options.include_usage,
            continuous_usage=request.stream_options.continuous_usage_stats,
        )
        deadline = begun + self.timeout
        asked = jobs(
            request,
            rows,
            self.service.config,
            beginning=self.beginning,
            ends=self.ends,
            deadline=deadline,
        )
        # Requests that arrive together should be submitted together: after a turn of the event loop
        # the engine finds more of them at once (8 clients: 0.16 steps a request instead of 0.32).
        await asyncio.sleep(0)
        choices = [
            PendingChoice(
                stream,
                Text(
                    self.tokenizer,
                    stop=request.stop,
                    min_tokens=request.min_tokens,
                    echo=echoes[number // request.candidates] if echoes else "",
                    with_tokens=with_logprobs,
                    with_end=kind.with_end,
                ),
                self.metrics,
                begun=begun,
            )
            for number, stream in enumerate(self.submit(asked))
        ]
        read = sum(map(len, rows))
        self.metrics.tokens("prompt", read)
        if request.stream:
            batches = merged(choices)
            with while_connected(http.receive):
                first = await anext(batches)
            return EventStream(events(builder, first, batches, lambda: usage(read, choices)))
        with while_connected(http.receive):
            texts = await whole_texts(choices)
        returned = best(texts, choices, request.n, request.candidates)
        return builder.whole(returned, usage(read, choices))

    def submit(self, asked: Sequence[Job]) -> list[Stream]:
        """Submit jobs and return their streams; ApiError if the queue is full."""
        try:
            return self.service.submit(asked)
        except QueueFull as error:
            raise busy(error) from error


def busy(error: QueueFull) -> ApiError:
    """Return the error for a request that finds the queue full."""
    return ApiError(
        429,
        f"the server is busy and its queue is full: retry in {error.retry_after} s",
        headers={"Retry-After": str(error.retry_after)},
    )


async def in_thread(work: Callable[[], T], size: int) -> T:
    """Return the result of work on `size` characters, done in a thread if they are many.

    A ValueError becomes an ApiError.
    """
    try:
        return work() if size <= LONG else await asyncio.to_thread(work)
    except ValueError as error:
        raise refused(str(error)) from error
