"""What is answered, in OpenAI's JSON: both kinds of answer, whole or as events of a stream.

Knows nothing of what is asked. Answers are made for every token of every stream, so they are plain
dictionaries; schema.py describes them.
"""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from ..generation.job import Scored
from ..generation.text import Piece, Told
from ..tokenizers import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -inf; this is what OpenAI writes
DONE = b"data: [DONE]\n\n"


def encoded(value: Any) -> bytes:
    """A value as JSON. Half of a UTF-16 pair, which UTF-8 cannot hold, is written as an escape."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", errors="backslashreplace")


def event(value: Any) -> bytes:
    """A value as a server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


# -- tokens


def token_name(tokenizer: Tokenizer, id: int) -> str:
    """A token as text, as OpenAI writes those that are no whole characters: no two are alike."""
    piece = tokenizer.token_bytes(id)
    try:
        return piece.decode() if piece else f"token_id:{id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def likeliest(token: Scored) -> dict[int, float]:
    """The likeliest ids of a token's place, and its own, with their log-probabilities."""
    found = dict(token.alternatives)
    if token.logprob is not None:
        found.setdefault(token.id, token.logprob)
    return found


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Told]) -> dict[str, Any]:
    """The tokens of a text as four lists of the same length."""
    told = [each.token for each in tokens]
    return {
        "tokens": [token_name(tokenizer, token.id) for token in told],
        "token_logprobs": [
            None if token.logprob is None else finite(token.logprob) for token in told
        ],
        "top_logprobs": [
            {token_name(tokenizer, id): finite(value) for id, value in likeliest(token).items()}
            or None
            for token in told
        ],
        "text_offset": [each.offset for each in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Told]) -> dict[str, Any]:
    """The tokens of a message, one object for each."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        piece = list(tokenizer.token_bytes(id))
        name = token_name(tokenizer, id)
        return {"token": name, "logprob": finite(logprob), "bytes": piece}

    content = [
        entry(token.id, token.logprob or 0.0)
        | {"top_logprobs": [entry(id, value) for id, value in token.alternatives]}
        for token in (each.token for each in tokens)
    ]
    return {"content": content, "refusal": None}


# -- the two kinds of answer


class Answer:
    """What all parts of one answer have in common; its subclasses say what a choice looks like."""

    prefix: ClassVar[str]
    whole_object: ClassVar[str]
    part_object: ClassVar[str]
    with_end: ClassVar[bool]  # whether the token that ends a text is told with its log-probability

    def __init__(
        self, model: str, tokenizer: Tokenizer, *, logprobs: bool, counted: bool = False
    ) -> None:
        """`counted` is a stream that ends with a count of its tokens."""
        self.tokenizer, self.logprobs, self.counted = tokenizer, logprobs, counted
        name = self.prefix + secrets.token_hex(12)
        self.head: dict[str, Any] = {"id": name, "created": int(time.time()), "model": model}
        if counted:
            self.head["usage"] = None

    def whole(self, pieces: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The answer of all choices' whole texts."""
        choices = [self.choice(index, piece) for index, piece in enumerate(pieces)]
        return self.head | {"object": self.whole_object, "choices": choices, "usage": usage}

    def part(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """An event: the next piece of a choice."""
        return self.head | {
            "object": self.part_object,
            "choices": [self.change(index, piece, first=first)],
        }

    def count(self, usage: dict[str, int]) -> dict[str, Any]:
        """The event that counts the tokens, after all others."""
        return self.head | {"object": self.part_object, "choices": [], "usage": usage}

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A whole text."""
        raise NotImplementedError

    def change(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """What a piece adds to a text, of which it may be the first."""
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Continuations."""

    prefix = "cmpl-"
    whole_object = part_object = "text_completion"
    with_end = True  # scores of a prompt are found by leaving out as many tokens as were asked for

    def choice(self, index: int, piece: Piece) -> dict[str, Any]:
        """A text."""
        told = completion_logprobs(self.tokenizer, piece.tokens) if self.logprobs else None
        return {
            "index": index,
            "text": piece.text,
            "logprobs": told,
            "finish_reason": piece.finish,
        }

    def change(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
        """A part of a text looks like a whole one."""
        return self.choice(index, piece)


class ChatAnswer(Answer):
    """Messages."""

    prefix = "chatcmpl-"
    whole_object, part_object = "chat.completion", "chat.completion.chunk"
    with_end = False  # the bytes of what is told make up the message

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
        told = chat_logprobs(self.tokenizer, piece.tokens) if self.logprobs else None
        return {"logprobs": told, "finish_reason": piece.finish}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The tokens that were read and generated."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
