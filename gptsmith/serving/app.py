"""The application: which path leads where, what is said of it, and what of a path leading nowhere.

Knows nothing of how a request is carried out (handler.py) or of who may ask (guard.py).
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .. import __version__
from .answers import ChatCompletion, Completion, Health, Model, ModelList
from .errors import ApiError, ErrorResponse, mistake, shown
from .handler import ServedModel, failed
from .pages import add_docs, add_page
from .requests import ChatCompletionRequest, CompletionRequest

FAILURES = {
    400: "The request is not understood, or cannot be carried out as it is",
    401: "A key is needed, and this is not it",
    404: "There is no such model here",
    413: "The body is too large",
    429: "The queue is full: ask again after the seconds of Retry-After",
    500: "The server or the model failed",
    503: "The server is stopping",
    504: "The time for a request is over",
}

Responses = dict[int | str, dict[str, Any]]  # as FastAPI takes what it says of answers


class Application(FastAPI):
    """FastAPI, whose description does not have the answer that it would give to a request that
    makes no sense: ours is a 400, in OpenAI's form."""

    def openapi(self) -> dict[str, Any]:
        """The description of the API."""
        described = super().openapi()
        for operations in described["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            described["components"]["schemas"].pop(name, None)
        return described


def make_app(served: ServedModel, *, with_key: bool = False) -> FastAPI:
    """The application that serves a model; `with_key` only makes its description ask for one."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with served.service:
            yield

    app = Application(
        title="gptsmith",
        summary="OpenAI's API for one model",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=failures(500),
        exception_handlers={
            ApiError: api_error,
            RequestValidationError: not_understood,
            HTTPException: not_found,
            Exception: failure,
        },
        # A variable of the environment could switch it on.
        telemetry={"auto_configure": False},
    )
    # The guard has checked the key; this tells of it in the description.
    keys = [Security(HTTPBearer(scheme_name="key", auto_error=False))] if with_key else []
    app.include_router(openai_api(served), dependencies=keys)
    app.include_router(state(served))
    add_page(app)
    add_docs(app)
    return app


def openai_api(served: ServedModel) -> APIRouter:
    """What OpenAI's clients call."""
    api = APIRouter(prefix="/v1", tags=["OpenAI's API"], redirect_slashes=False)
    model = Model(
        id=served.name,
        object="model",
        created=served.created,
        owned_by="gptsmith",
        context_length=served.service.config.context_length,
    )
    refusals = failures(400, 401, 404, 413, 429, 503, 504)

    @api.post(
        "/completions",
        summary="Continue texts",
        response_model=Completion,
        responses=also_streamed() | refusals,
    )
    async def completions(request: CompletionRequest, http: Request) -> Any:
        return await served.complete(request, http)

    @api.post(
        "/chat/completions",
        summary="Go on with a conversation, where the model has a chat template",
        response_model=ChatCompletion,
        responses=also_streamed() | refusals,
    )
    async def chat_completions(request: ChatCompletionRequest, http: Request) -> Any:
        return await served.chat(request, http)

    @api.get("/models", summary="The model that is served", responses=failures(401))
    async def models() -> ModelList:
        return ModelList(object="list", data=[model])

    @api.get("/models/{name:path}", summary="The model, by its name", responses=failures(401, 404))
    async def one_model(name: str) -> Model:
        served.check_name(name)
        return model

    return api


def state(served: ServedModel) -> APIRouter:
    """What says how the server is."""
    router = APIRouter(tags=["The server"], redirect_slashes=False)

    @router.get("/health", summary="How full the server is")
    async def health() -> Health:
        counts = served.service.counts()
        return Health(
            status="ok",
            model=served.name,
            running=counts.running,
            waiting=counts.waiting,
            slots=served.service.slots,
        )

    @router.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def figures() -> Response:
        metrics = served.metrics
        return Response(metrics.text(), headers={"content-type": metrics.content_type})

    return router


def failures(*statuses: int) -> Responses:
    """What the description says of answers that are errors."""
    return {each: {"model": ErrorResponse, "description": FAILURES[each]} for each in statuses}


def also_streamed() -> Responses:
    """What the description says of an answer that is whole or a stream."""
    data = {"type": "string", "description": "JSON, or [DONE] in the end"}
    one = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    stream = {"text/event-stream": {"itemSchema": one}}
    return {200: {"content": stream, "description": "Whole, or as events"}}


# -- what goes wrong


async def api_error(request: Request, error: ApiError) -> Response:
    """The error as it is."""
    return error.response()


async def not_understood(request: Request, error: RequestValidationError) -> Response:
    """The first mistake in the request."""
    return mistake(error.errors()).response()


async def not_found(request: Request, error: HTTPException) -> Response:
    """What Starlette finds before any route is asked."""
    path, headers = request.url.path, error.headers or {}
    message = {
        400: "the body is not JSON: it cannot be read",
        404: f"there is nothing at {shown(path)}: see /docs",
        405: f"{request.method} is not for {shown(path)}: use {headers.get('Allow')}",
    }.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=headers).response()


async def failure(request: Request, error: Exception) -> Response:
    """An error of ours, which goes on to the server and makes it close the connection."""
    answer = failed(error).response()
    answer.headers["connection"] = "close"
    return answer
