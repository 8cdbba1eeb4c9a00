"""The base of all objects in a request, and the fields that can take several forms.

Knows nothing of the requests themselves. A field of several forms is checked by a function, which
returns one of them: a union of types would report an error for every form.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from ..config.fields import suggestion
from .errors import refused, shown

MOST_STOPS, LONGEST_STOP = 16, 1000  # stop strings, and characters in one
NOTES = ("title", "description", "default")  # of a field in a schema, besides its type
LONGEST_NAME = 40  # characters of a field's name used for a suggestion; it may be megabytes


def nullable(schema: dict[str, Any]) -> None:
    """Allow null in a schema for every optional field, and for unknown ones: null means absent."""
    null = {"type": "null"}
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()):
            notes = {key: field.pop(key) for key in NOTES if key in field}
            kinds = [kind for kind in field.get("anyOf", [field]) if kind != null]
            schema["properties"][name] = {"anyOf": [*kinds, null], **notes}
    schema["additionalProperties"] = null


class RequestObject(BaseModel):
    """An object in a request: unknown fields are errors, and null is the same as no field."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=nullable,
        protected_namespaces=(),
    )
    unsupported: ClassVar[Mapping[str, str]] = {}  # OpenAI's fields that are refused, and why

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        """Return the fields that are not null; ApiError if one is unknown or unsupported."""
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if value is not None}
        for name in given:
            if name in cls.unsupported:
                raise refused(f"{name} is not supported: {cls.unsupported[name]}", name)
            if name not in cls.model_fields:
                hint = suggestion(name[:LONGEST_NAME], cls.model_fields)
                raise refused(f"unknown field {shown(name)}{hint}", shown(name).strip("'"))
        return given


def checked_prompt(value: Any) -> list[str] | list[list[int]]:
    """Return a prompt of any of the four forms as a list of texts or of lists of ids."""
    rows = value
    if isinstance(value, str) or (value and is_row(value)):
        rows = [value]
    if not (isinstance(rows, list) and rows):
        raise ValueError("text, token ids, or a list of either is needed")
    if all(isinstance(row, str) for row in rows):
        return rows
    if not all(is_row(row) for row in rows):
        raise ValueError("a list must hold only texts, only token ids, or only lists of token ids")
    if not all(rows):
        raise ValueError("one of its lists of token ids is empty: at least one id is needed")
    return rows


def is_row(value: Any) -> bool:
    """Return whether a value is a list of whole numbers."""
    return isinstance(value, list) and all(type(id) is int for id in value)


def checked_stop(value: Any) -> list[str]:
    """Return the list of stop strings; a single one need not be in a list."""
    strings = [value] if isinstance(value, str) else value
    if not (isinstance(strings, list) and all(isinstance(each, str) for each in strings)):
        raise ValueError("a text or a list of texts is needed")
    if "" in strings:
        raise ValueError("a stop string is empty: at least one character is needed")
    if len(strings) > MOST_STOPS or any(len(each) > LONGEST_STOP for each in strings):
        raise ValueError(
            f"at most {MOST_STOPS} strings of at most {LONGEST_STOP:,} characters are possible"
        )
    return strings


def checked_content(value: Any) -> str:
    """Return the text of a message; the parts of a list are joined by newlines."""
    if isinstance(value, str):
        return value
    if not (isinstance(value, list) and all(isinstance(part, dict) for part in value)):
        raise ValueError("a text, or a list of parts of type text, is needed")
    for part in value:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = shown(part.get("type"))
            raise ValueError(f"parts of type {kind} are not supported: only text is")
    return "\n".join(part["text"] for part in value)


def checked_bias(value: Any) -> dict[int, float]:
    """Return what is added to the logits of token ids, which are strings in JSON."""
    if not isinstance(value, dict):
        raise ValueError("an object of token ids and numbers is needed")
    for id, number in value.items():
        if not (id.isascii() and id.isdigit() and len(id) < 10):
            raise ValueError(f"{shown(id)} is not a token id: a whole number is needed")
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise ValueError(f"{shown(number)} for token {id}: a number from -100 to 100 is needed")
    return {int(id): float(number) for id, number in value.items()}


# -- the types of these fields, and of their forms in the OpenAPI description


class TextPart(BaseModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
IdText = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Weight = Annotated[float, Field(ge=-100, le=100)]

Prompt = Annotated[
    list[str] | list[list[int]],
    PlainValidator(
        checked_prompt,
        json_schema_input_type=str
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)],
    ),
]
Stop = Annotated[
    list[str],
    PlainValidator(
        checked_stop,
        json_schema_input_type=StopString
        | Annotated[list[StopString], Field(max_length=MOST_STOPS)],
    ),
]
Content = Annotated[
    str, PlainValidator(checked_content, json_schema_input_type=str | list[TextPart])
]
LogitBias = Annotated[
    dict[int, float],
    PlainValidator(
        checked_bias,
        json_schema_input_type=Annotated[
            dict[IdText, Weight], Field(json_schema_extra={"additionalProperties": False})
        ],
    ),
]
