"""vLLM's route for a classifier: POST /classify.

Knows nothing of how texts of several requests become a batch (labelling.py).
"""

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NoReturn

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.requests import Request

from ..evaluation.labels import prediction
from .answers import Usage
from .errors import failed, refused
from .fields import Prompt, RequestObject
from .handler import ServedModel, busy
from .jobs import check_prompts
from .labelling import LabelService
from .requests import UNUSED, ChatCompletionRequest, CompletionRequest, Message
from .streams import timed_out, while_connected
from .worker import QueueFull


class ClassifyRequest(RequestObject):
    """Texts to label."""

    neutral = {"activation": (True,), "use_activation": (True,), "priority": (0,)}  # noqa: RUF012
    why = "the answer has the probability of every label"

    model: str | None = Field(None, description="name of the model")
    input: Prompt = Field(description="text to label, token ids, or a list of either")
    add_special_tokens: bool | None = Field(
        None, description="accepted, but GPT-2 adds none to a text"
    )
    user: str | None = UNUSED


class Classification(BaseModel):
    """The label of a text, as vLLM returns it."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classifications(BaseModel):
    """The labels of all texts of a request."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification]
    usage: Usage


@dataclass(frozen=True, kw_only=True)
class ServedClassifier(ServedModel):
    """A classifier behind the API, its names and its limits."""

    writes = False

    service: LabelService  # type: ignore[assignment]

    @property
    def labels(self) -> list[str]:  # type: ignore[override]
        """The labels, in the order of their probabilities."""
        return [*self.service.config.labels]

    async def classify(self, request: ClassifyRequest, http: Request) -> Classifications:
        """Label the texts of a request."""
        begun, config = time.monotonic(), self.service.config
        self.named(request.model or self.name)
        most = self.service.slots + self.service.waiting
        if (count := len(request.input)) > most:
            raise refused(f"the request is for {count:,} texts: at most {most:,} are possible")
        rows = await self.rows(request.input)
        check_prompts(rows, config)
        if config.pad_token_id is None and not all(rows):
            raise refused("input has an empty text, but this model has no padding token", "input")
        read = sum(map(len, rows))
        self.metrics.tokens("prompt", read)
        with while_connected(http.receive):
            found = await self.labelled(rows, begun + self.timeout - time.monotonic())
        data = []
        for index, (row, probabilities) in enumerate(zip(rows, found, strict=True)):
            label = prediction(self.service.model, probabilities, len(row)).label
            data.append(
                Classification(
                    index=index, label=label, probs=probabilities, num_classes=config.head_rows
                )
            )
        return Classifications(
            id=f"classify-{secrets.token_hex(12)}",
            object="list",
            created=int(time.time()),
            model=self.name,
            data=data,
            usage=Usage(prompt_tokens=read, completion_tokens=0, total_tokens=read),
        )

    async def labelled(self, rows: Sequence[list[int]], seconds: float) -> list[list[float]]:
        """Return the probabilities of rows of tokens; ApiError if that fails or takes longer."""
        try:
            async with asyncio.timeout(seconds):
                return await self.service.label(rows)
        except QueueFull as error:
            raise busy(error) from error
        except TimeoutError as error:
            raise timed_out() from error
        except RuntimeError as error:
            raise failed(error) from error

    async def complete(self, request: CompletionRequest, http: Request) -> NoReturn:
        """Refuse to complete prompts."""
        self.refuse_to_write()

    async def chat(self, request: ChatCompletionRequest, http: Request) -> NoReturn:
        """Refuse to answer a conversation."""
        self.refuse_to_write()

    async def conversation(self, messages: Sequence[Message]) -> NoReturn:
        """Refuse to read a conversation."""
        self.refuse_to_write()

    def refuse_to_write(self) -> NoReturn:
        """Raise the error for what a classifier does not do."""
        raise refused(
            f"{self.name} is a classifier, which labels texts and does not write: send the text "
            "to /classify",
            code="model_does_not_write",
        )


def labels_api(served: ServedClassifier) -> APIRouter:
    """Return the route."""
    api = APIRouter(tags=["Labels"], redirect_slashes=False)

    @api.post("/classify", summary="Label texts")
    async def classify(request: ClassifyRequest, http: Request) -> Classifications:
        return await served.classify(request, http)

    return api
