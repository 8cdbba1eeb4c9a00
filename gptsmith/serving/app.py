"""The application: which path leads where, and what is said on a path that leads nowhere.

Knows nothing of how a request is carried out (served.py) or of who may ask (guard.py).
"""

import re
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request

from .. import __version__
from . import schema
from .answers import encoded
from .errors import ApiError, mistake, shown
from .handler import Served, failed
from .manual import add_manual
from .requests import ChatRequest, CompletionRequest
from .wire import EVENTS

PAGE = Path(__file__).with_name("page.html")
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


def make_app(served: Served, *, with_key: bool = False) -> FastAPI:
    """The application that serves a model; `with_key` only makes the manual ask for one."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        async with served.service:
            yield

    app = FastAPI(
        title="gptsmith",
        summary="OpenAI's API for one model",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=running,
        responses=failures(500),
    )
    add_api(app, served)
    add_rest(app, served)
    add_page(app)
    add_manual(app, with_key=with_key)
    add_errors(app)
    describe_as_it_is(app)
    return app


def add_api(app: FastAPI, served: Served) -> None:
    """Add what OpenAI's clients call."""
    model = schema.Model(
        id=served.name,
        object="model",
        created=served.created,
        owned_by="gptsmith",
        context_length=served.service.config.context_length,
    )

    asked = failures(400, 401, 404, 413, 429, 503, 504)

    @app.post("/v1/completions", responses=also_streamed(schema.Completion) | asked)
    async def completions(request: CompletionRequest) -> Response:
        """Continue texts."""
        return await served.complete(request)

    @app.post("/v1/chat/completions", responses=also_streamed(schema.ChatCompletion) | asked)
    async def chat_completions(request: ChatRequest) -> Response:
        """Go on with a conversation, where the model has a chat template."""
        return await served.chat(request)

    @app.get("/v1/models", responses=failures(401))
    async def models() -> schema.Models:
        """The model that is served."""
        return schema.Models(object="list", data=[model])

    @app.get("/v1/models/{name:path}", responses=failures(401, 404))
    async def one_model(name: str) -> schema.Model:
        """The model, by its name."""
        served.check_name(name)
        return model


def failures(*statuses: int) -> Responses:
    """What the description says of answers that are errors."""
    return {each: {"model": schema.Failure, "description": FAILURES[each]} for each in statuses}


def describe_as_it_is(app: FastAPI) -> None:
    """Take out of the description what FastAPI would answer to a request that makes no sense, and
    name each route by what it does."""
    describe = app.openapi

    def described() -> dict[str, Any]:
        whole = describe()
        for path, operations in whole["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["summary"] = operation.pop("description", operation["summary"])
                operation["tags"] = ["OpenAI's API" if path.startswith("/v1/") else "The server"]
        for name in ("HTTPValidationError", "ValidationError"):
            whole["components"]["schemas"].pop(name, None)
        return whole

    app.openapi = described  # type: ignore[method-assign]


def also_streamed(kind: type) -> Responses:
    """What the description says of an answer that is whole or a stream."""
    data = {"type": "string", "description": "JSON, or [DONE] in the end"}
    one = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    stream = {EVENTS.partition(";")[0]: {"itemSchema": one}}
    return {200: {"model": kind, "content": stream, "description": "Whole, or as events"}}


def add_rest(app: FastAPI, served: Served) -> None:
    """Add what says how the server is."""

    @app.get("/health")
    async def health() -> schema.Health:
        """How full the server is."""
        counts = served.service.counts()
        return schema.Health(
            status="ok",
            model=served.name,
            running=counts.running,
            waiting=counts.waiting,
            slots=served.service.slots,
        )

    if (metrics := served.metrics) is not None:

        @app.get("/metrics", response_class=Response)
        async def figures() -> Response:
            """Figures for Prometheus."""
            return Response(metrics.text(), headers={"content-type": metrics.content_type})


def add_page(app: FastAPI) -> None:
    """Add the page at /, which may run and look as its file says, and talk to this server only."""
    page = PAGE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {hashes(page, 'script')}; "
        f"style-src {hashes(page, 'style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    @app.get("/", include_in_schema=False)
    async def desk() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})


def hashes(page: str, tag: str) -> str:
    """What a security policy allows: the contents of these elements of a page, or nothing."""
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", page, flags=re.DOTALL)
    sums = (b64encode(sha256(text.encode()).digest()).decode() for text in found)
    return " ".join(f"'sha256-{sum}'" for sum in sums) or "'none'"


# -- what goes wrong


def add_errors(app: FastAPI) -> None:
    """Make every error one of OpenAI's."""

    @app.exception_handler(ApiError)
    async def said(request: Request, error: ApiError) -> Response:
        return answer_of(error)

    @app.exception_handler(RequestValidationError)
    async def not_understood(request: Request, error: RequestValidationError) -> Response:
        return answer_of(mistake(error.errors()))

    @app.exception_handler(HTTPException)
    async def not_found(request: Request, error: HTTPException) -> Response:
        path, headers = request.url.path, dict(error.headers or {})
        message = {
            400: "the body is not JSON: it cannot be read",
            404: f"there is nothing at {shown(path)}: see /docs",
            405: f"{request.method} is not for {shown(path)}: use {headers.get('Allow')}",
        }.get(error.status_code, str(error.detail))
        return answer_of(ApiError(error.status_code, message, headers=headers))

    @app.exception_handler(Exception)
    async def failure(request: Request, error: Exception) -> Response:
        answer = answer_of(failed(error))
        answer.headers["connection"] = "close"  # as the error, which goes on, makes the server do
        return answer


def answer_of(error: ApiError) -> Response:
    """An error as an answer."""
    headers = {"content-type": "application/json"} | error.headers
    return Response(encoded(error.body), error.status, headers=headers)
