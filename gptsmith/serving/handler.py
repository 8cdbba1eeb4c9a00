"""A model behind OpenAI's API: what is asked goes to the engine, what comes of it back.

Knows nothing of routes, of the engine's steps, or of who may ask.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Send

from ..generation.job import Job
from ..generation.text import Text
from ..generation.writing import prompt_ids
from ..tokenizers import Tokenizer
from .answers import DONE, Answer, ChatAnswer, CompletionAnswer, event, usage
from .chat import ChatTemplate
from .errors import ApiError, refused, shown, stopping
from .metrics import Metrics
from .requests import ChatRequest, CompletionRequest, jobs, too_long
from .streams import Writing, best, together, whole_texts
from .wire import EVENTS, Watched, begin, send_json, send_part
from .worker import QueueFull, Service, Stream

LOG = logging.getLogger(__name__)
LONG = 20_000  # characters that take some milliseconds to encode: longer texts go to a thread

Request = CompletionRequest | ChatRequest
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model behind the API, and how it is called."""

    service: Service
    tokenizer: Tokenizer
    name: str
    aliases: frozenset[str] = frozenset()  # other names that a request may use
    ends: frozenset[int] = frozenset()  # tokens that end a text
    template: ChatTemplate | None = None
    timeout: float = 600.0  # seconds that a request may take
    metrics: Metrics | None = None
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

    def check_count(self, prompts: int, request: Request) -> None:
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

    async def complete(self, request: CompletionRequest) -> Response:
        """Continue texts."""
        deadline = time.monotonic() + self.timeout
        self.check_name(request.model)
        self.check_count(len(request.prompt), request)
        rows = await self.rows(request.prompt)
        echoes = [""] * len(rows)
        if request.echo:
            echoes = [
                prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
                for prompt in request.prompt
            ]
        return self.answer(request, rows, echoes, CompletionAnswer, deadline)

    async def chat(self, request: ChatRequest) -> Response:
        """Go on with a conversation."""
        deadline = time.monotonic() + self.timeout
        self.check_name(request.model)
        self.check_count(1, request)
        if (template := self.template) is None:
            raise refused(
                "this model has no chat template, so it knows no turns of a conversation: send a "
                "text to /v1/completions",
                code="no_chat_template",
            )
        messages = request.spoken()
        size = sum(len(text) for message in messages for text in message.values())
        if size > self.longest_prompt:
            raise too_long(f"{size:,} characters", self.service.config.context_length)
        ids = await aside(lambda: template.ids(messages), size)
        ids = ids or prompt_ids(self.tokenizer, "")  # a template may say nothing
        return self.answer(request, [ids], [""], ChatAnswer, deadline)

    def answer(
        self,
        request: Request,
        rows: Sequence[list[int]],
        echoes: Sequence[str],
        kind: type[Answer],
        deadline: float,
    ) -> Response:
        """The answer to a request for texts after these prompts, worked out when it is sent."""
        asked = jobs(request, rows, self.service.config, ends=self.ends, deadline=deadline)
        with_tokens = request.alternatives is not None
        answer = kind(self.name, self.tokenizer, logprobs=with_tokens, counted=request.counted)
        prompt_tokens = sum(map(len, rows))

        async def work(send: Send) -> None:
            writings = [
                Writing(
                    stream,
                    Text(
                        self.tokenizer,
                        stop=request.stop,
                        echo=echoes[number // request.candidates],
                        with_tokens=with_tokens,
                        with_end=kind.with_end,
                    ),
                    begun=deadline - self.timeout,
                    metrics=self.metrics,
                )
                for number, stream in enumerate(self.submit(asked))
            ]
            try:
                if request.stream:
                    await send_events(send, writings, answer, prompt_tokens)
                else:
                    texts = await whole_texts(writings)
                    told = best(texts, writings, request.n, request.candidates)
                    await send_json(send, answer.whole(told, usage_of(writings, prompt_tokens)))
            finally:
                if self.metrics is not None:
                    self.metrics.tokens("prompt", prompt_tokens)
                    self.metrics.tokens("generated", sum(text.tokens for text in writings))

        return Watched(work)

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


async def send_events(
    send: Send, writings: Sequence[Writing], answer: Answer, prompt_tokens: int
) -> None:
    """All pieces of all texts as events. What goes wrong after the first is an event too."""
    begun = set[int]()
    async with aclosing(together(writings)) as batches:
        try:
            async for batch in batches:
                if not begun:
                    await begin(send, EVENTS)
                events = []
                for number, piece in batch:
                    events.append(event(answer.part(number, piece, first=number not in begun)))
                    begun.add(number)
                await send_part(send, b"".join(events))
        except (Exception, asyncio.CancelledError) as error:
            if not begun:
                raise
            # Who is not told by the server that ends has left, and hears nothing.
            told = failed(error) if isinstance(error, Exception) else stopping()
            await send_part(send, event(told.body), last=True)
            return
    end = event(answer.count(usage_of(writings, prompt_tokens))) if answer.counted else b""
    await send_part(send, end + DONE, last=True)


def failed(error: Exception) -> ApiError:
    """What a client is told of an error: all of one that is meant for it, nothing of another."""
    if isinstance(error, ApiError):
        return error
    LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request: whoever runs it can read why")


def usage_of(writings: Sequence[Writing], prompt_tokens: int) -> dict[str, int]:
    """How many tokens were read and generated."""
    return usage(prompt_tokens, sum(writing.tokens for writing in writings))
