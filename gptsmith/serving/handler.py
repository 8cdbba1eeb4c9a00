"""A model behind OpenAI's API: what is asked goes to the engine, what comes of it back.

Knows nothing of routes, of the engine's steps, or of who may ask.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from ..generation.job import Job
from ..generation.text import Text
from ..generation.writing import prompt_ids
from ..tokenizers import Tokenizer
from .answers import DONE, Builder, ChatCompletionBuilder, CompletionBuilder, Usage, event
from .chat import ChatTemplate
from .errors import ApiError, refused, shown, stopping
from .metrics import Metrics
from .requests import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
    jobs,
    too_long,
)
from .streams import Batch, EventStream, PendingChoice, best, merged, while_connected, whole_texts
from .worker import QueueFull, Service, Stream

LOG = logging.getLogger(__name__)
LONG = 20_000  # characters that take some milliseconds to encode: longer texts go to a thread

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model behind the API, and how it is called."""

    service: Service
    tokenizer: Tokenizer
    name: str
    metrics: Metrics
    aliases: frozenset[str] = frozenset()  # other names that a request may use
    ends: frozenset[int] = frozenset()  # tokens that end a text
    template: ChatTemplate | None = None
    timeout: float = 600.0  # seconds that a request may take
    created: int = field(default_factory=lambda: int(time.time()))

    # -- what is asked

    def check_name(self, name: str) -> None:
        """Raise ApiError where another model is meant."""
        if name != self.name and name not in self.aliases:
            raise ApiError(
                404,
                f"the model {shown(name)} is not served here: take '{self.name}'",
                param="model",
                code="model_not_found",
            )

    def check_count(self, prompts: int, request: GenerationRequest) -> None:
        """Raise ApiError for more texts at once than could ever be taken."""
        most = self.service.slots + self.service.waiting
        if (count := prompts * request.candidates) > most:
            raise refused(f"{count:,} texts are asked for at once: at most {most:,} are possible")

    @cached_property
    def longest_prompt(self) -> int:
        """Characters of the longest text that may fit: all of its tokens the longest there is."""
        longest = max(map(len, self.tokenizer.pieces.values()))
        return self.service.config.context_length * longest

    async def rows(self, prompts: Sequence[str | list[int]]) -> list[list[int]]:
        """Prompts as ids; where they are long, others go on in the meantime."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        longest = max(map(len, texts), default=0)
        if longest > self.longest_prompt:
            raise too_long(f"{longest:,} characters", self.service.config.context_length)
        return await aside(
            lambda: [
                prompt_ids(self.tokenizer, prompt) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ],
            sum(map(len, texts)),
        )

    # -- what is answered

    async def complete(self, request: CompletionRequest, http: Request) -> BaseModel | Response:
        """Continue texts."""
        begun = time.monotonic()
        self.check_name(request.model)
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
        """Go on with a conversation."""
        begun = time.monotonic()
        self.check_name(request.model)
        self.check_count(1, request)
        if (template := self.template) is None:
            raise refused(
                "this model has no chat template, so it knows no turns of a conversation: send a "
                "text to /v1/completions",
                code="no_chat_template",
            )
        messages = [message.model_dump(exclude_none=True) for message in request.messages]
        size = sum(len(text) for message in messages for text in message.values())
        if size > self.longest_prompt:
            raise too_long(f"{size:,} characters", self.service.config.context_length)
        ids = await aside(lambda: template.ids(messages), size)
        ids = ids or prompt_ids(self.tokenizer, "")  # a template may say nothing
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
        """The answer, whole or streamed, to a request for texts after these prompts. Errors from
        before the first event are raised."""
        with_logprobs = request.alternatives is not None
        kind = (
            CompletionBuilder if isinstance(request, CompletionRequest) else ChatCompletionBuilder
        )
        builder = kind(
            self.name,
            self.tokenizer,
            logprobs=with_logprobs,
            include_usage=request.include_usage,
        )
        deadline = begun + self.timeout
        asked = jobs(request, rows, self.service.config, ends=self.ends, deadline=deadline)
        choices = [
            PendingChoice(
                stream,
                Text(
                    self.tokenizer,
                    stop=request.stop,
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
            first = await while_connected(http, anext(batches))
            return EventStream(events(builder, first, batches, lambda: usage(read, choices)))
        texts = await while_connected(http, whole_texts(choices))
        told = best(texts, choices, request.n, request.candidates)
        return builder.whole(told, usage(read, choices))

    def submit(self, asked: Sequence[Job]) -> list[Stream]:
        """The jobs' streams; ApiError where there is no room for them now."""
        try:
            return self.service.submit(asked)
        except QueueFull as error:
            raise ApiError(
                429,
                f"the server is busy, and its queue is full: ask again in {error.retry_after} s",
                headers={"Retry-After": str(error.retry_after)},
            ) from error


async def aside(work: Callable[[], T], size: int) -> T:
    """What some work on so many characters gives; ApiError where it refuses its text."""
    try:
        return work() if size <= LONG else await asyncio.to_thread(work)
    except ValueError as error:
        raise refused(str(error)) from error


async def events(
    builder: Builder,
    first: Batch,
    rest: AsyncGenerator[Batch, None],
    usage: Callable[[], Usage],
) -> AsyncGenerator[bytes, None]:
    """All pieces of all choices as server-sent events; what goes wrong is an event too."""
    begun = set[int]()

    def encoded(batch: Batch) -> bytes:
        chunks = []
        for index, piece in batch:
            chunks.append(event(builder.chunk(index, piece, first=index not in begun)))
            begun.add(index)
        return b"".join(chunks)

    async with aclosing(rest):
        yield encoded(first)
        try:
            async for batch in rest:
                yield encoded(batch)
        except (Exception, asyncio.CancelledError) as error:
            # Cancelled means that the server ends, or that the client left and hears nothing.
            told = failed(error) if isinstance(error, Exception) else stopping()
            yield event(told.body)
            return
    yield (event(builder.last_chunk(usage())) if builder.include_usage else b"") + DONE


def failed(error: Exception) -> ApiError:
    """What a client is told of an error: all of one that is meant for it, nothing of another."""
    if isinstance(error, ApiError):
        return error
    LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request: whoever runs it can read why")


def usage(read: int, choices: Sequence[PendingChoice]) -> Usage:
    """How many tokens were read and generated."""
    generated = sum(choice.tokens for choice in choices)
    return Usage(prompt_tokens=read, completion_tokens=generated, total_tokens=read + generated)
