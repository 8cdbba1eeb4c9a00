"""Errors in OpenAI's form, with one-line messages.

Knows nothing of requests, only of Pydantic's validation errors.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

LOG = logging.getLogger(__name__)
HUNG_UP = 499  # nginx's status for a client that disconnected before the response was complete
MOST_SHOWN = 40  # characters of a value that a message repeats; the value may be megabytes
TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # error types by status

# Pydantic's error types, and our words for what is wanted. Other types keep Pydantic's message.
WANTED = {
    "bool_type": "true or false is needed",
    "dict_type": "an object is needed",
    "finite_number": "a finite number is needed",
    "float_type": "a number is needed",
    "greater_than": "above {gt} is needed",
    "greater_than_equal": "at least {ge} is needed",
    "int_type": "a whole number is needed",
    "less_than": "below {lt} is needed",
    "less_than_equal": "at most {le} is needed",
    "list_type": "a list is needed",
    "literal_error": "{expected} is needed",
    "model_attributes_type": "an object is needed",
    "model_type": "an object is needed",
    "string_type": "text is needed",
    "string_unicode": "valid Unicode is needed",
    "too_short": "at least {min_length} is needed",
    "value_error": "{error}",
}


class ErrorDetail(BaseModel):
    """An error: a one-line message with what to do, and OpenAI's codes."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The response to a request that failed."""

    error: ErrorDetail


class ApiError(Exception):
    """An error in OpenAI's form, with its status: what was got, what was wanted, what to do."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
        line = as_unicode(" ".join(message.split()))
        param = None if param is None else as_unicode(param)
        self.body = ErrorResponse(
            error=ErrorDetail(message=line, type=kind, param=param, code=code)
        )

    def response(self) -> Response:
        """Return the error as a response."""
        content, kind = self.body.model_dump_json(), "application/json"
        return Response(content, self.status, headers=self.headers, media_type=kind)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for an invalid request."""
    return ApiError(400, message, param=param, code=code)


def stopping() -> ApiError:
    """Return the error for a request that the server's shutdown has cut short."""
    return ApiError(503, "the server is stopping: retry in a moment")


def failed(error: Exception) -> ApiError:
    """Return the error to send to the client: an ApiError as it is; any other is logged and
    becomes a 500 without details."""
    if isinstance(error, ApiError):
        return error
    LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request: its log says why")


def mistake(errors: Sequence[Any]) -> ApiError:
    """Return the first of Pydantic's errors about a request."""
    error = errors[0]
    path = [str(part) for part in error["loc"] if part != "body"]
    name, kind, context = ".".join(path), error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return refused(f"the body is not JSON: {context.get('error', 'it cannot be read')}")
    if isinstance(error["input"], bytes):
        return refused("the body is not declared as JSON: send Content-Type: application/json")
    if kind == "missing":
        wanted = f"{name} is missing" if name else "the body is missing: a JSON object is needed"
        return refused(wanted, name or None)
    wanted = WANTED[kind].format(**context) if kind in WANTED else error["msg"]
    subject = name or "the body"
    if kind != "value_error":
        subject += f" is {shown(error['input'])}"
    return refused(f"{subject}: {wanted}", path[0] if path else None)


def shown(value: Any) -> str:
    """Return a short text for a value, to show in an error."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if not isinstance(value, str):
        text = json.dumps(value)
        return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
    text = json.dumps(value[:MOST_SHOWN], ensure_ascii=False)[1:-1].replace('\\"', '"')
    text = as_unicode(text)
    return f"'{text}'" if len(value) <= MOST_SHOWN else f"'{text}…'"


def as_unicode(text: str) -> str:
    """Return a text with lone surrogates escaped: JSON can contain them, but UTF-8 cannot."""
    return text.encode(errors="backslashreplace").decode()
