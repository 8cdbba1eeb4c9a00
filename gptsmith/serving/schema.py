"""What an answer looks like, for the description of the API: nothing is made from these classes.

Knows nothing of how answers come about; a test holds real ones against it.
"""

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class Usage(BaseModel):
    """How many tokens were read and generated: each prompt once, and every text of best_of."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """For each token: its text (or bytes:\\xe2...), log-probability, the likeliest, its place."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
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


class TokenLogprob(BaseModel):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TokenLogprob):
    """A token of a message, and the likeliest of its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message."""

    content: list[ChatToken]
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


class Models(BaseModel):
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


class ErrorDetail(BaseModel):
    """What went wrong, in one line, with what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(BaseModel):
    """The answer where something went wrong."""

    error: ErrorDetail
