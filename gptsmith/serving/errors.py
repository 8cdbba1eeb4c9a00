"""What a client is told when something goes wrong: OpenAI's errors, in one line.

Knows nothing of what is asked, only of what Pydantic says against it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

HUNG_UP = 499  # what nginx writes of a client that left before its answer was whole
MOST_SHOWN = 40  # characters of what was sent; it may be megabytes
TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # of an error, by its status

# What Pydantic calls a mistake, and what it wanted. The rest it says well itself.
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
    """What went wrong, in one line, with what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The answer where something went wrong."""

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
        """The error as an answer."""
        content, kind = self.body.model_dump_json(), "application/json"
        return Response(content, self.status, headers=self.headers, media_type=kind)


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that cannot be carried out as it is."""
    return ApiError(400, message, param=param, code=code)


def stopping() -> ApiError:
    """The error of a request that the end of the server has cut short."""
    return ApiError(503, "the server is stopping: ask again in a moment")


def mistake(errors: Sequence[Any]) -> ApiError:
    """The first of the errors that Pydantic found in a request."""
    error = errors[0]
    path = [str(part) for part in error["loc"] if part != "body"]
    name, kind, context = ".".join(path), error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return refused(f"the body is not JSON: {context.get('error', 'it cannot be read')}")
    if isinstance(error["input"], bytes):
        return refused("the body is not JSON: send it with Content-Type: application/json")
    if kind == "missing":
        wanted = f"{name} is missing" if name else "the body is missing: a JSON object is needed"
        return refused(wanted, name or None)
    wanted = WANTED[kind].format(**context) if kind in WANTED else error["msg"]
    subject = name or "the body"
    if kind != "value_error":
        subject += f" is {shown(error['input'])}"
    return refused(f"{subject}: {wanted}", path[0] if path else None)


def shown(value: Any) -> str:
    """A value as a short text, for an error."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if not isinstance(value, str):
        text = json.dumps(value)
        return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
    text = json.dumps(value[:MOST_SHOWN], ensure_ascii=False)[1:-1].replace('\\"', '"')
    text = as_unicode(text)
    return f"'{text}'" if len(value) <= MOST_SHOWN else f"'{text}…'"


def as_unicode(text: str) -> str:
    """Text without halves of UTF-16 pairs, which a client may send and UTF-8 cannot hold: escapes
    stand in their place."""
    return text.encode(errors="backslashreplace").decode()
