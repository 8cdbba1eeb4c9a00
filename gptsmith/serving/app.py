"""The application: its routes, their OpenAPI description, and error responses.

Knows nothing of how a request is handled (handler.py) or of access control (guard.py).
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .. import __version__
from .answers import ChatCompletion, Completion, Health, Model, ModelList
from .classify import ServedClassifier, labels_api
from .errors import ApiError, ErrorResponse, failed, mistake, shown
from .handler import ServedModel
from .inspecting import inspect_api
from .pages import LABELLING, WRITING, add_docs, add_page
from .requests import ChatCompletionRequest, CompletionRequest
from .tokens import tokens_api

FAILURES = {
    400: "The request is invalid",
    401: "The API key is missing or wrong",
    404: "This server has no such model",
    413: "The body is too large",
    429: "The queue is full: retry after the seconds in Retry-After",
    500: "The server or the model failed",
    503: "The server is stopping",
    504: "The request timed out",
}

Responses = dict[int | str, dict[str, Any]]  # as FastAPI's `responses` argument takes them


class Application(FastAPI):
    """FastAPI without its 422 response in the OpenAPI description: invalid requests get a 400 in
    OpenAI's form instead."""

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI description."""
        described = super().openapi()
        for operations in described["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            described["components"]["schemas"].pop(name, None)
        return described


def make_app(
    served: ServedModel, *, with_key: bool = False, inspector: Path | None = None
) -> FastAPI:
    """Return the application that serves a model and its adapters.

    `with_key` only adds the API key to the OpenAPI description; guard.py checks it. `inspector` is
    the page that shows what POST /inspect returns, if the model writes.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as running:
            for model in served.models:
                await running.enter_async_context(model.service)
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
        # Otherwise an environment variable could switch telemetry on.
        telemetry={"auto_configure": False},
    )
    # For the description only: the guard has already checked the key.
    keys = [Security(HTTPBearer(scheme_name="key", auto_error=False))] if with_key else []
    app.include_router(openai_api(served), dependencies=keys)
    refusals = failures(400, 401, 404, 413)
    app.include_router(tokens_api(served), dependencies=keys, responses=refusals)
    if isinstance(served, ServedClassifier):
        also = failures(429, 503, 504)
        app.include_router(labels_api(served), dependencies=keys, responses=refusals | also)
    app.include_router(state(served))
    add_page(app, "/", WRITING if served.writes else LABELLING)
    if inspector is not None:
        also = failures(429)
        app.include_router(inspect_api(served), dependencies=keys, responses=refusals | also)
        add_page(app, "/inspect.html", inspector)
    add_docs(app)
    return app


def openai_api(served: ServedModel) -> APIRouter:
    """Return the routes of OpenAI's API."""
    api = APIRouter(prefix="/v1", tags=["OpenAI's API"], redirect_slashes=False)

    def described(model: ServedModel) -> Model:
        return Model(
            id=model.name,
            object="model",
            created=model.created,
            owned_by="gptsmith",
            context_length=model.service.config.context_length,
            labels=model.labels,
            chat=model.template is not None,
        )

    refusals = failures(400, 401, 404, 413, 429, 503, 504)

    @api.post(
        "/completions",
        summary="Complete prompts",
        response_model=Completion,
        responses=also_streamed() | refusals,
        include_in_schema=served.writes,
    )
    async def completions(request: CompletionRequest, http: Request) -> Any:
        return await served.named(request.model).complete(request, http)

    @api.post(
        "/chat/completions",
        summary="Answer a conversation, if the model has a chat template",
        response_model=ChatCompletion,
        responses=also_streamed() | refusals,
        include_in_schema=served.writes,
    )
    async def chat_completions(request: ChatCompletionRequest, http: Request) -> Any:
        return await served.named(request.model).chat(request, http)

    @api.get(
        "/models",
        summary="List the served models",
        responses=failures(401),
        response_model_exclude_none=True,
    )
    async def models() -> ModelList:
        return ModelList(object="list", data=[described(model) for model in served.models])

    @api.get(
        "/models/{name:path}",
        summary="Describe a model",
        responses=failures(401, 404),
        response_model_exclude_none=True,
    )
    async def one_model(name: str) -> Model:
        return described(served.named(name))

    return api


def state(served: ServedModel) -> APIRouter:
    """Return the routes for monitoring."""
    router = APIRouter(tags=["The server"], redirect_slashes=False)

    @router.get("/health", summary="Report running and waiting completions")
    async def health() -> Health:
        counts = [model.service.counts() for model in served.models]
        return Health(
            status="ok",
            model=served.name,
            running=sum(each.running for each in counts),
            waiting=sum(each.waiting for each in counts),
            slots=sum(model.service.slots for model in served.models),
        )

    @router.get("/metrics", summary="Metrics for Prometheus", response_class=Response)
    async def prometheus() -> Response:
        metrics = served.metrics
        return Response(metrics.text(), headers={"content-type": metrics.content_type})

    return router


def failures(*statuses: int) -> Responses:
    """Return the description of error responses."""
    return {each: {"model": ErrorResponse, "description": FAILURES[each]} for each in statuses}


def also_streamed() -> Responses:
    """Return the description of a successful response that may also be a stream."""
    data = {"type": "string", "description": "JSON, or [DONE] at the end"}
    one = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    stream = {"text/event-stream": {"itemSchema": one}}
    return {200: {"content": stream, "description": "One JSON object, or a stream of events"}}


# -- errors


async def api_error(request: Request, error: ApiError) -> Response:
    """Respond with the error itself."""
    return error.response()


async def not_understood(request: Request, error: RequestValidationError) -> Response:
    """Respond with the first mistake in the request."""
    return mistake(error.errors()).response()


async def not_found(request: Request, error: HTTPException) -> Response:
    """Respond to what Starlette refuses before a route runs: no such path, method or JSON."""
    path, headers = request.url.path, error.headers or {}
    message = {
        400: "the body is not JSON: it cannot be read",
        404: f"there is nothing at {shown(path)}: see /docs",
        405: f"{shown(path)} does not support {request.method}: use {headers.get('Allow')}",
    }.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=headers).response()


async def failure(request: Request, error: Exception) -> Response:
    """Respond to an unexpected error. Starlette also re-raises it, and uvicorn then closes the
    connection."""
    answer = failed(error).response()
    answer.headers["connection"] = "close"
    return answer
