"""The logprobs of tokens, in OpenAI's two forms for completions and chat.

Knows nothing of the responses that contain them.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from ..generation.job import Scored
from ..generation.text import Told
from ..tokenizers import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -inf; this is what OpenAI writes


class Logprobs(BaseModel):
    """For each token: its text (or bytes:\\xe2...), its logprob, the likeliest, its offset."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """A token and its logprob."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of a message, and the likeliest tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message."""

    content: list[TokenLogprob]
    refusal: None


def token_name(tokenizer: Tokenizer, id: int) -> str:
    """Return a unique name for a token: its text, or, as OpenAI does, its bytes if they are not
    whole characters."""
    piece = tokenizer.token_bytes(id)
    try:
        return piece.decode() if piece else f"token_id:{id}"
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def finite(logprob: float) -> float:
    """Return a logprob that JSON can hold."""
    return max(logprob, LEAST_LOGPROB)


def likeliest(token: Scored) -> dict[int, float]:
    """Return the logprobs of the likeliest ids at a token's position, and of the token itself."""
    found = dict(token.alternatives)
    if token.logprob is not None:
        found.setdefault(token.id, token.logprob)
    return found


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Told]) -> dict[str, Any]:
    """Return the tokens of a text as four lists of the same length."""
    scored = [each.token for each in tokens]
    return {
        "tokens": [token_name(tokenizer, token.id) for token in scored],
        "token_logprobs": [
            None if token.logprob is None else finite(token.logprob) for token in scored
        ],
        "top_logprobs": [
            {token_name(tokenizer, id): finite(value) for id, value in likeliest(token).items()}
            or None
            for token in scored
        ],
        "text_offset": [each.offset for each in tokens],
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Told]) -> dict[str, Any]:
    """Return the tokens of a message, one object for each."""

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
