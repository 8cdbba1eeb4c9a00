"""What the objects of a request have in common, and its fields that have several forms.

Knows nothing of the requests that they are parts of. A field of several forms is checked by a
function, which settles on one of them: a union of types would report an error for each form.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, model_validator

from ..config.fields import suggestion
from .errors import refused, shown

MOST_STOPS, LONGEST_STOP = 16, 1000  # stop strings, and characters in one
NOTES = ("title", "description", "default")  # what a schema says of a field beside its kind
LONGEST_NAME = 40  # characters of a field's name that are looked at; it may be megabytes


def nullable(schema: dict[str, Any]) -> None:
    """Say in a schema that null is the same as leaving a field out, whatever it is called."""
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
    unsupported: ClassVar[Mapping[str, str]] = {}  # fields of OpenAI's, and why they are refused

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        """The fields that are not null; raises ApiError for one that is unknown or unsupported."""
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
    """A prompt, in each of its four forms, as a list of texts or of rows of ids."""
    rows = value
    if isinstance(value, str) or (value and is_row(value)):
        rows = [value]
    if not (isinstance(rows, list) and rows):
        raise ValueError("a text, a list of texts, a list of ids or a list of those is needed")
    if all(isinstance(row, str) for row in rows):
        return rows
    if not all(is_row(row) for row in rows):
        raise ValueError("its parts must all be texts, or all whole numbers, or all lists of them")
    if not all(rows):
        raise ValueError("a list of ids in it is empty: at least one id is needed")
    return rows


def is_row(value: Any) -> bool:
    """Whether a value is a list of whole numbers."""
    return isinstance(value, list) and all(type(id) is int for id in value)


def checked_stop(value: Any) -> list[str]:
    """Stop strings, of which one may stand alone."""
    words = [value] if isinstance(value, str) else value
    if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
        raise ValueError("a text or a list of texts is needed")
    if "" in words:
        raise ValueError("a stop string is empty: it would stop before the first character")
    if len(words) > MOST_STOPS or any(len(word) > LONGEST_STOP for word in words):
        raise ValueError(f"at most {MOST_STOPS} texts of {LONGEST_STOP:,} characters are needed")
    return words


def checked_content(value: Any) -> str:
    """The text of a message; the parts of a list become lines."""
    if isinstance(value, str):
        return value
    if not (isinstance(value, list) and all(isinstance(part, dict) for part in value)):
        raise ValueError("a text, or a list of parts of type text, is needed")
    for part in value:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = shown(part.get("type"))
            raise ValueError(f"a part of type {kind} is not understood: only text is")
    return "\n".join(part["text"] for part in value)


def checked_bias(value: Any) -> dict[int, float]:
    """Token ids, which JSON writes as texts, and what is added to their logits."""
    if not isinstance(value, dict):
        raise ValueError("an object of ids and numbers is needed")
    for id, number in value.items():
        if not (id.isascii() and id.isdigit() and len(id) < 10):
            raise ValueError(f"{shown(id)} is no id of a token: a whole number is needed")
        if type(number) not in (int, float) or not -100 <= number <= 100:
            raise ValueError(f"{shown(number)} for token {id}: a number of -100 to 100 is needed")
    return {int(id): float(number) for id, number in value.items()}


# -- their types, and those of their forms, from which the description is made


class TextPart(BaseModel):
    """A part of a message."""

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
