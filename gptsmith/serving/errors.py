"""What a client is told when something goes wrong: OpenAI's errors, in one line.

Knows nothing of what is asked, only of what pydantic says against it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

MOST_SHOWN = 40  # characters of what was sent; it may be megabytes

# What pydantic calls a mistake, and what it wanted. The rest it says well itself.
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


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form: what was got, what was wanted, what to do."""

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
        self.status, self.headers = status, dict(headers or {})
        self.body = error_body(status, message, param=param, code=code)


def error_body(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The JSON of an error."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    line = " ".join(message.split())
    return {"error": {"message": line, "type": kind, "param": param, "code": code}}


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The error of a request that cannot be carried out as it is."""
    return ApiError(400, message, param=param, code=code)


def stopping() -> ApiError:
    """The error of a request that the end of the server has cut short."""
    return ApiError(503, "the server is stopping: ask again in a moment")


def mistake(errors: Sequence[Any]) -> ApiError:
    """The first of the errors that pydantic found in a request."""
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
    text = text.encode(errors="backslashreplace").decode()  # half of a pair is no character
    return f"'{text}'" if len(value) <= MOST_SHOWN else f"'{text}…'"
