"""POST /inspect: what the model does inside with a prompt; /inspect.html is the page that shows it.

Knows nothing of what there is to see: `cli/` gives the function that looks.
"""

import asyncio
import json
from collections.abc import Sequence

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from .errors import ApiError, refused
from .fields import RequestObject
from .handler import Look, ServedModel

MOST_TOKENS = 128  # the answer's size grows with their square
RETRY_AFTER = 5  # seconds: what another inspection takes at most


class InspectRequest(RequestObject):
    """A prompt to look at."""

    model: str | None = Field(None, description="name of the model")
    prompt: str = Field(
        min_length=1, description=f"text to look at; of a long one, its last {MOST_TOKENS} tokens"
    )


def inspect_api(served: ServedModel) -> APIRouter:
    """Return the route. One request is answered at a time, so that generating goes on beside it."""
    api = APIRouter(tags=["The model"], redirect_slashes=False)
    looking = asyncio.Lock()

    @api.post(
        "/inspect",
        summary="Return what the model does with a prompt: attention, layers, attribution",
        response_class=Response,
        responses={200: {"content": {"application/json": {"schema": {"type": "object"}}}}},
    )
    async def inspect(request: InspectRequest) -> Response:
        model = served.named(request.model or served.name)
        look = model.look
        assert look is not None, "where this route is, each model has a function that looks"
        (ids,) = await model.rows([request.prompt])
        if looking.locked():
            message = f"another prompt is being inspected: retry in {RETRY_AFTER} s"
            raise ApiError(429, message, headers={"Retry-After": str(RETRY_AFTER)})
        seen = ids[-min(MOST_TOKENS, model.service.config.context_length) :]
        async with looking:
            try:
                body = await asyncio.to_thread(answer, look, seen, len(ids) - len(seen))
            except ValueError as error:
                raise refused(str(error)) from error
        return Response(body, media_type="application/json")

    return api


def answer(look: Look, tokens: Sequence[int], cut: int) -> str:
    """Return what is seen as JSON; `cut` tokens before are not looked at."""
    return json.dumps(look(tokens) | {"cut": cut})
