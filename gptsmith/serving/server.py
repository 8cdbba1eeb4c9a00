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
from .manual import add_manual
from .protocol import ChatRequest, CompletionRequest
from .served import Served, failed
from .wire import EVENTS

PAGE = Path(__file__).with_name("page.html")


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
        responses={"default": {"model": schema.Failure, "description": "What went wrong"}},
    )
    add_api(app, served)
    add_rest(app, served)
    add_page(app)
    add_manual(app, with_key=with_key)
    add_errors(app)
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

    @app.post("/v1/completions", responses=also_streamed(schema.Completion))
    async def completions(request: CompletionRequest) -> Response:
        """Continue texts."""
        return await served.complete(request)

    @app.post("/v1/chat/completions", responses=also_streamed(schema.ChatCompletion))
    async def chat_completions(request: ChatRequest) -> Response:
        """Go on with a conversation, where the model has a chat template."""
        return await served.chat(request)

    @app.get("/v1/models")
    async def models() -> schema.Models:
        """The model that is served."""
        return schema.Models(object="list", data=[model])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> schema.Model:
        """The model, by its name."""
        served.check_name(name)
        return model


def also_streamed(kind: type) -> dict[int | str, dict[str, Any]]:
    """What the description says of an answer that is whole or a stream."""
    stream = {EVENTS.partition(";")[0]: {"schema": {"type": "string"}}}
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
