"""vLLM's routes for the model's tokenizer: from text to tokens, and back.

Knows nothing of the engine.
"""

from typing import Annotated, Self

from fastapi import APIRouter
from pydantic import BaseModel, FailFast, Field, model_validator

from .errors import refused
from .fields import RequestObject, TokenIds
from .handler import ServedModel, in_thread
from .jobs import check_ids
from .requests import Message


class TokenizeRequest(RequestObject):
    """A prompt, or a conversation, whose tokens are wanted."""

    neutral = {"add_generation_prompt": (True,), "continue_final_message": (False,)}  # noqa: RUF012

    model: str | None = Field(None, description="name of the model")
    prompt: str | None = Field(None, description="text to tokenize")
    messages: Annotated[list[Message], FailFast()] = Field(
        [], description="conversation to tokenize, as /v1/chat/completions would read it"
    )
    add_special_tokens: bool | None = Field(
        None, description="accepted, but GPT-2 adds none to a prompt"
    )
    return_token_strs: bool = Field(False, description="also name each token")

    @model_validator(mode="after")
    def possible(self) -> Self:
        """Return the request; ApiError unless it has either a prompt or messages."""
        if (self.prompt is not None) == bool(self.messages):
            raise refused("either prompt or messages is needed: send one of them")
        return self


class DetokenizeRequest(RequestObject):
    """Tokens whose text is wanted."""

    model: str | None = Field(None, description="name of the model")
    tokens: TokenIds


class Tokens(BaseModel):
    """The tokens of a prompt, as vLLM returns them."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DecodedPrompt(BaseModel):
    """The text of tokens, as vLLM returns it."""

    prompt: str


def tokens_api(served: ServedModel) -> APIRouter:
    """Return the routes."""
    api = APIRouter(tags=["Tokens"], redirect_slashes=False)

    @api.post("/tokenize", summary="Return the tokens of a prompt or a conversation")
    async def tokenize(request: TokenizeRequest) -> Tokens:
        model = served.named(request.model or served.name)
        if request.messages:
            ids = await model.conversation(request.messages)
        else:
            (ids,) = await model.rows([request.prompt or ""])
        names = [model.tokenizer.backend.id_to_token(id) or "" for id in ids]
        return Tokens(
            count=len(ids),
            max_model_len=model.service.config.context_length,
            tokens=ids,
            token_strs=names if request.return_token_strs else None,
        )

    @api.post("/detokenize", summary="Return the text of tokens")
    async def detokenize(request: DetokenizeRequest) -> DecodedPrompt:
        model = served.named(request.model or served.name)
        ids, decode = request.tokens, model.tokenizer.decode
        check_ids("tokens", ids, model.service.config.vocab_size)
        return DecodedPrompt(prompt=await in_thread(lambda: decode(ids), len(ids)))

    return api
