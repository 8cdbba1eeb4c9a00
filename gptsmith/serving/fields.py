"""The base of all objects in a request, and the fields that can take several forms.

Knows nothing of the requests themselves. A field of several forms is checked by a function, which
returns one of them: a union of types would report an error for every form.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, model_validator

from ..config.fields import suggestion
from .errors import ApiError, refused, shown

MOST_STOPS, LONGEST_STOP = 16, 1000  # stop strings, and characters in one
NOTES = ("title", "description", "default")  # of a field in a schema, besides its type
LONGEST_NAME = 40  # characters of a field's name used for a suggestion; it may be megabytes


def described(schema: dict[str, Any], kind: "type[RequestObject]") -> None:
    """Add to a schema what types do not say: null, and the values that ask for nothing."""
    fields, null = schema["properties"], {"type": "null"}
    for name, field in fields.items():
        if name not in schema.get("required", ()):
            notes = {key: field.pop(key) for key in NOTES if key in field}
            kinds = [each for each in field.get("anyOf", [field]) if each != null]
            neutral = [{"enum": [*kind.neutral[name]]}] if name in kind.neutral else []
            fields[name] = {"anyOf": [*kinds, *neutral, null], **notes}
    for name, values in kind.neutral.items():
        fields.setdefault(name, {"enum": [*values, None], "description": "not supported"})
    schema["additionalProperties"] = null


class RequestObject(BaseModel):
    """An object in a request, in which unknown fields are errors.

    Clients also send fields that ask for nothing. Null is the same as no field, and so are the
    values in `neutral`, where fields may be listed that have no other values.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        json_schema_extra=described,
        protected_namespaces=(),
    )
    neutral: ClassVar[Mapping[str, Sequence[Any]]] = {}
    why: ClassVar[str] = "this model only writes text"

    @model_validator(mode="before")
    @classmethod
    def asked(cls, values: Any) -> Any:
        """Return the fields that ask for something; ApiError if one is unknown or unsupported."""
        if not isinstance(values, dict):
            return values
        given = {}
        for name, value in values.items():
            neutral = cls.neutral.get(name, ())
            value = whole(value)
            if value is None or any(type(value) is type(n) and value == n for n in neutral):
                continue
            if name not in cls.model_fields:
                raise cls.refused(name, neutral)
            given[name] = value
        return given

    @classmethod
    def refused(cls, name: str, neutral: Sequence[Any]) -> ApiError:
        """Return the error for a field that the request does not have."""
        if name in cls.neutral:
            values = " or ".join(map(json.dumps, neutral))
            hint = f", or send {values}" if values else ""
            return refused(f"{name} is not supported: {cls.why}, leave it out{hint}", name)
        hint = suggestion(name[:LONGEST_NAME], [*cls.model_fields, *cls.neutral])
        return refused(f"unknown field {shown(name)}{hint}", shown(name).strip("'"))


def whole(value: Any, depth: int = 2) -> Any:
    """Return 16 for 16.0, because JSON has one kind of number; also in lists, and lists in them."""
    if type(value) is float and value.is_integer():
        return int(value)
    if depth and type(value) is list and not {float, list}.isdisjoint(map(type, value)):
        return [whole(each, depth - 1) for each in value]
    return value


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


Id = Annotated[int, Field(ge=0)]
Row = Annotated[list[Id], Field(min_length=1)]
TokenIds = Annotated[list[Id], FailFast()]
StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
IdText = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Weight = Annotated[float, Field(ge=-100, le=100)]

Prompt = Annotated[
    list[str] | list[list[int]],
    PlainValidator(
        checked_prompt,
        json_schema_input_type=str
        | Annotated[list[str], Field(min_length=1)]
        | Row
        | Annotated[list[Row], Field(min_length=1)],
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
