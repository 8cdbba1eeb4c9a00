"""Read the fields of one row of examples, in all their forms, and say what is wrong with them.

Every function raises ValueError with the end of a sentence that begins with the row's place.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from ..config.finetune import ExampleKind
from .rows import Row

Form = Literal["messages", "alpaca", "prompt", "label"]
Message: TypeAlias = dict[str, str]  # role and content


def named(row: Row) -> dict[str, Any]:
    """Return the fields of a row by their names in lower case; "Label" is label.

    A column of Parquet is null where a row lacks the field.
    """
    return {str(k).strip().lower(): v for k, v in row.fields.items() if v is not None}


def task_of(fields: Mapping[str, Any]) -> ExampleKind | None:
    """Return the task that the fields of a row are for; None if they are for none."""
    if "chosen" in fields or "rejected" in fields:
        return "preference"
    if fields.keys() & {"messages", "instruction", "completion"}:
        return "chat"
    if "label" in fields:
        return "classify"
    return "chat" if "prompt" in fields else None


def form_of(fields: Mapping[str, Any]) -> Form:
    """Return the form of a row's prompt, by which a template is chosen."""
    if "messages" in fields:
        return "messages"
    if "prompt" in fields:
        return "prompt" if isinstance(fields["prompt"], str) else "messages"
    return "alpaca" if "instruction" in fields else "messages"


def conversation_in(fields: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a row, which end with an answer of an assistant."""
    if "messages" in fields:
        messages = messages_in(fields, "messages")
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(
                "has 'messages' that do not end with one of role 'assistant', which is learned"
            )
        return messages
    if "completion" in fields or "prompt" in fields:
        return [*prompt_in(fields), answer_in(fields, "completion")]
    return [*prompt_in(fields), answer_in(fields, "output")]


def preference_in(fields: Mapping[str, Any]) -> tuple[list[Message], Message, Message]:
    """Return prompt, chosen and rejected; these may be whole conversations with one beginning."""
    answers = []
    for name in ("chosen", "rejected"):
        if isinstance(fields.get(name), list | tuple):
            answers.append(messages_in(fields, name))
        else:
            answers.append([answer_in(fields, name)])
    whole = max(map(len, answers)) > 1
    prompt = answers[0][:-1] if whole else prompt_in(fields)
    for name, messages in zip(("chosen", "rejected"), answers, strict=True):
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"has '{name}' that does not end with a message of role 'assistant'")
        if whole and messages[:-1] != prompt:
            raise ValueError("has 'chosen' and 'rejected' that differ before their last message")
    chosen, rejected = (messages[-1] for messages in answers)
    return prompt, chosen, rejected


def prompt_in(fields: Mapping[str, Any]) -> list[Message]:
    """Return the messages of a prompt. Of Alpaca, instruction and input are one message."""
    if "messages" in fields:
        return messages_in(fields, "messages")
    if "prompt" in fields or "instruction" not in fields:
        if isinstance(fields.get("prompt"), list | tuple):
            return messages_in(fields, "prompt")
        return [{"role": "user", "content": text_in(fields, "prompt", empty=True)}]
    instruction = text_in(fields, "instruction")
    more = text_in(fields, "input", empty=True) if "input" in fields else ""
    content = f"{instruction}\n\n### Input:\n{more}" if more else instruction
    return [{"role": "user", "content": content}]


def answer_in(fields: Mapping[str, Any], name: str) -> Message:
    """Return an answer: a text, or a list with one message of an assistant."""
    value = fields.get(name)
    if not isinstance(value, list | tuple):
        return {"role": "assistant", "content": text_in(fields, name)}
    messages = messages_in(fields, name)
    if [each["role"] for each in messages] != ["assistant"]:
        raise ValueError(f"has '{name}' that is not one message of role 'assistant'")
    return messages[0]


def messages_in(fields: Mapping[str, Any], name: str) -> list[Message]:
    """Return the role and the content of messages."""
    if not isinstance(fields[name], list | tuple):
        raise ValueError(f"has {kind(fields[name])} in '{name}': a list of messages is needed")
    messages = []
    for number, each in enumerate(fields[name], 1):
        if not isinstance(each, Mapping):
            raise ValueError(
                f"has {kind(each)} as message {number} of '{name}': an object with role and "
                "content is needed"
            )
        where = f" of message {number} in '{name}'"
        role = text_in(each, "role", where)
        empty = role != "assistant"  # an empty answer would be nothing to learn
        content = text_in(each, "content", where, empty=empty)
        messages.append({"role": role, "content": content})
    return messages


def label_in(fields: Mapping[str, Any]) -> str:
    """Return the name of a label, which may be a number."""
    value = fields.get("label")
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else text_in(fields, "label").strip()


def text_in(fields: Mapping[str, Any], name: str, where: str = "", *, empty: bool = False) -> str:
    """Return the text of a field; ValueError if there is none, or an empty one unless allowed."""
    if name not in fields:
        raise ValueError(f"has no '{name}'{where}{there_are(fields)}")
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f"has {kind(value)} in '{name}'{where}: text is needed")
    if not value.strip() and not empty:
        raise ValueError(f"has an empty '{name}'{where}: text is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain lone surrogates
        code = ord(value[error.start])
        raise ValueError(f"has a lone surrogate, U+{code:04X}, in '{name}'{where}") from None
    return value


def kind(value: Any) -> str:
    """Return the name of the type of a value."""
    return "null" if value is None else type(value).__name__


def there_are(fields: Mapping[str, Any]) -> str:
    """Return the names of the first fields that there are, for the end of an error."""
    return f" (there are: {', '.join(map(repr, [*fields][:8]))})"
