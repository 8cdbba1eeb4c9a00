"""Responses in OpenAI's JSON: models, which are also the OpenAPI description, and stream chunks.

Knows nothing of requests, or of the form of logprobs (logprobs.py).
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json

from ..generation.text import Piece
from ..tokenizers import Tokenizer
from .logprobs import ChatLogprobs, Logprobs, chat_logprobs, completion_logprobs

DONE = b"data: [DONE]\n\n"

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """Token counts: each prompt once, and every generated text, including those best_of drops."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One completion of a prompt."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """Completions, prompt by prompt; a stream's events have the same form, with parts of texts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(BaseModel):
    """A message that the model wrote."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """One message that answers the conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Messages; a stream's events have a `delta` instead of each `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """The served model; `labels`, in the order of their probabilities, if it is a classifier."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    labels: list[str] | None = None
    chat: bool = Field(description="whether it has a chat template, and so answers conversations")


class ModelList(BaseModel):
    """The list of served models, which has one entry."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """The load of the server: running and waiting completions, and the number of slots."""

    status: Literal["ok"]
    model: str
    running: int
    waiting: int
    slots: int


# -- from texts to responses


def event(value: Any) -> bytes:
    """Return a value as a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Builder:
    """Builds the response to one request; there is a subclass for each kind of request.

    A whole response is a Pydantic model. The chunks of a stream are plain dictionaries, because
    there is one for every token, and a model would take four times as long.
    """

    prefix: ClassVar[str]  # of response ids
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    whole_type: ClassVar[type[BaseModel]]
    with_end: ClassVar[bool]  # whether logprobs include the token that ends a text

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        *,
        logprobs: bool,
        include_usage: bool = False,
        continuous_usage: bool = False,
    ) -> None:
        """`include_usage` is for a stream that ends with its token counts; with
        `continuous_usage` too, every event has the counts so far."""
        self.tokenizer, self.logprobs, self.include_usage = tokenizer, logprobs, include_usage
        self.continuous_usage = include_usage and continuous_usage
        id, now = self.prefix + secrets.token_hex(12), int(time.time())
        self.head: dict[str, Any] = {"id": id, "created": now, "model": model}
        if include_usage:
            self.head["usage"] = None

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> BaseModel:
        """Return the response with all choices' whole texts."""
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        rest = {"object": self.whole_object, "choices": choices, "usage": usage}
        return self.whole_type(**(self.head | rest))

    def chunk(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """Return the chunk for a piece of a choice's text; `first` marks its first piece."""
        choices = [self.change(index, piece, first=first)]
        return self.head | {"object": self.chunk_object, "choices": choices}

    def last_chunk(self, usage: Usage) -> dict[str, Any]:
        """Return the chunk with the token counts, which follows all others."""
        return self.head | {"object": self.chunk_object, "choices": [], "usage": usage}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a choice with its whole text."""
        raise NotImplementedError

    def change(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """Return a choice with the next piece of its text."""
        raise NotImplementedError


class CompletionBuilder(Builder):
    """Builds completions of prompts."""

    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"
    whole_type = Completion
    # Clients that score a prompt with `echo` drop the last max_tokens entries of the logprobs, so
    # the token that ends a text must have one.
    with_end = True

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a completion."""
        logprobs = completion_logprobs(self.tokenizer, piece.tokens) if self.logprobs else None
        end = piece.finish
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": end}

    def change(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """Return a part of a completion, which has the form of a whole one."""
        return self.choice(index, piece)


class ChatCompletionBuilder(Builder):
    """Builds answers to conversations."""

    prefix = "chatcmpl-"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    whole_type = ChatCompletion
    with_end = False  # the bytes of the reported tokens add up to the message

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """Return a message."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "message": message} | self.rest(piece)

    def change(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """Return a part of a message; the first also has the role."""
        delta = ({"role": "assistant"} if first else {}) | {"content": piece.text}
        return {"index": index, "delta": delta} | self.rest(piece)

    def rest(self, piece: Piece) -> dict[str, Any]:
        """Return the fields that messages and their parts have in common."""
        logprobs = chat_logprobs(self.tokenizer, piece.tokens) if self.logprobs else None
        return {"logprobs": logprobs, "finish_reason": piece.finish}
