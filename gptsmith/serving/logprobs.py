"""How the log-probabilities of tokens are told, in the two forms that OpenAI has for them.

Knows nothing of the answers that they are a part of.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from ..generation.job import Scored
from ..generation.text import Told
from ..tokenizers import Tokenizer

LEAST_LOGPROB = -9999.0  # JSON has no -inf; this is what OpenAI writes


class Logprobs(BaseModel):
    """For each token: its text (or bytes:\\xe2...), log-probability, the likeliest, its place."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of a message, and the likeliest of its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message."""

    content: list[TokenLogprob]
    refusal: None


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
