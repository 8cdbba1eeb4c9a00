"""Jinja as transformers sets it up for chat templates, in a sandbox.

Knows nothing of tokens.
"""

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox


def language() -> jinja2.Environment:
    """Return Jinja in a sandbox, where a template can reach only its own variables."""
    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    jinja.filters["tojson"] = to_json
    jinja.globals |= {"raise_exception": refuse, "strftime_now": now}
    return jinja


class Generation(jinja2.ext.Extension):
    """The tag `{% generation %}`, which marks the assistant's part for training; ignored here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """Return the contents of the block, as if the tags were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return a value as JSON; Jinja's own filter escapes it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def refuse(message: str) -> None:
    """Raise TemplateError: a template calls this to refuse a conversation."""
    raise jinja2.TemplateError(message)


def now(form: str) -> str:
    """Return the current date and time in strftime's format `form`."""
    return datetime.now().strftime(form)
