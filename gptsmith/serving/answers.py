"""What is answered, in OpenAI's JSON: models, which also describe the API, and a stream's chunks.

Knows nothing of what is asked, or of how the log-probabilities of tokens are told (logprobs.py).
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel
from pydantic_core import to_json

from ..generation.text import Piece
from ..tokenizers import Tokenizer
from .logprobs import ChatLogprobs, Logprobs, chat_logprobs, completion_logprobs

DONE = b"data: [DONE]\n\n"

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """How many tokens were read and generated: each prompt once, and every text of best_of."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """A continuation."""

    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: FinishReason


class Completion(BaseModel):
    """Continuations, prompt by prompt; a stream's events have the same form, with parts of them."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(BaseModel):
    """A message."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Messages; a stream's events have a `delta` in place of each `message`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int


class ModelList(BaseModel):
    """A list of one."""

    object: Literal["list"]
    data: list[Model]


class Health(BaseModel):
    """How full the server is: texts being written, texts that wait, and room to write at once."""

    status: Literal["ok"]
    model: str
    running: int
    waiting: int
    slots: int


# -- from texts to answers


def event(value: Any) -> bytes:
    """A value as a server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


class Builder:
    """Builds the answer to one request; its subclasses are of the two kinds.

    A whole answer is a model. The chunks of a stream are plain dictionaries, because one is made
    for every token, and the model would take four times as long.
    """

    prefix: ClassVar[str]  # of ids
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]
    whole_type: ClassVar[type[BaseModel]]
    with_end: ClassVar[bool]  # whether the token that ends a text is told with its log-probability

    def __init__(
        self, model: str, tokenizer: Tokenizer, *, logprobs: bool, include_usage: bool = False
    ) -> None:
        """`include_usage` is of a stream that ends with a count of its tokens."""
        self.tokenizer, self.logprobs, self.include_usage = tokenizer, logprobs, include_usage
        id, now = self.prefix + secrets.token_hex(12), int(time.time())
        self.head: dict[str, Any] = {"id": id, "created": now, "model": model}
        if include_usage:
            self.head["usage"] = None

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> BaseModel:
        """The answer of all choices' whole texts."""
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        rest = {"object": self.whole_object, "choices": choices, "usage": usage}
        return self.whole_type(**(self.head | rest))

    def chunk(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """What a piece adds to the text of a choice, of which it may be the first."""
        choices = [self.change(index, piece, first=first)]
        return self.head | {"object": self.chunk_object, "choices": choices}

    def last_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk that counts the tokens, after all others."""
        return self.head | {"object": self.chunk_object, "choices": [], "usage": usage}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole text."""
        raise NotImplementedError

    def change(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """What a piece adds to a text."""
        raise NotImplementedError


class CompletionBuilder(Builder):
    """Builds continuations."""

    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"
    whole_type = Completion
    with_end = True  # scores of a prompt are found by leaving out as many tokens as were asked for

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A text."""
        logprobs = completion_logprobs(self.tokenizer, piece.tokens) if self.logprobs else None
        end = piece.finish
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": end}

    def change(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """A part of a text looks like a whole one."""
        return self.choice(index, piece)


class ChatCompletionBuilder(Builder):
    """Builds messages."""

    prefix = "chatcmpl-"
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"
    whole_type = ChatCompletion
    with_end = False  # the bytes of the tokens that are told make up the message

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A message."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "message": message} | self.rest(piece)

    def change(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """A part of a message; the first also says whose it is."""
        delta = ({"role": "assistant"} if first else {}) | {"content": piece.text}
        return {"index": index, "delta": delta} | self.rest(piece)

    def rest(self, piece: Piece) -> dict[str, Any]:
        """What messages and their parts have in common."""
        logprobs = chat_logprobs(self.tokenizer, piece.tokens) if self.logprobs else None
        return {"logprobs": logprobs, "finish_reason": piece.finish}
