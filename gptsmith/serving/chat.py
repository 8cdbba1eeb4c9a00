"""Chat templates: the token ids of a conversation.

Knows nothing of requests. Only the template can write special tokens. In a message they are
ordinary text, so nobody can end a turn, or speak for somebody else, by typing their markers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from ..tokenizers import Tokenizer

NONCHARACTERS = range(0xFDD0, 0xFDF0)  # code points that Unicode never assigns to characters


class ChatTemplate:
    """A Jinja template that writes a conversation as the prompt on which a model was trained."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        """`names` are the variables for special tokens in the template: bos_token, eos_token."""
        try:
            self.template = language().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error
        self.tokenizer, self.names = tokenizer, names
        self.specials = {text: id for id, text in tokenizer.specials.items()}
        # Longest first: where one special token begins with another, the longer one matches.
        longest_first = sorted(self.specials, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # Each first character of a special token, and the noncharacter that masks it in messages.
        begins = sorted({ord(special[0]) for special in self.specials})
        self.masks = dict(zip(begins, map(chr, NONCHARACTERS), strict=False))
        if len(begins) > len(self.masks):
            raise ValueError(
                f"special tokens begin with {len(begins)} different characters: at most "
                f"{len(self.masks)} are possible"
            )
        self.unmask = {ord(mask): chr(begin) for begin, mask in self.masks.items()}

    def ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation; ValueError if the template refuses it."""
        masked = [{key: self.masked(text) for key, text in each.items()} for each in messages]
        try:
            text = self.template.render(
                messages=masked,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self.names,
            )
        except Exception as error:  # a template is a program: it can raise anything
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        ids, end = list[int](), 0
        for found in self.special.finditer(text):
            ids += self.plain_ids(text[end : found.start()])
            ids.append(self.specials[found.group()])
            end = found.end()
        return ids + self.plain_ids(text[end:])

    def plain_ids(self, text: str) -> list[int]:
        """Return the token ids of a text without special tokens, unmasked."""
        return self.tokenizer.encode(text.translate(self.unmask)) if text else []

    def masked(self, text: str) -> str:
        """Return a message in which no special token can be found.

        The first character of each is masked, also at the end of the message, where the text that
        follows could complete one.
        """
        if any(chr(mask) in text for mask in self.unmask):
            raise ValueError("a message has a noncharacter, such as U+FDD0: remove it")
        places, after = set[int](), 0
        while found := self.special.search(text, after):  # they may overlap
            places.add(found.start())
            after = found.start() + 1
        places |= {
            len(text) - length
            for special in self.specials
            for length in range(1, len(special))
            if text.endswith(special[:length])
        }
        letters = list(text)
        for place in places:
            letters[place] = self.masks[ord(letters[place])]
        return "".join(letters)


def open_template(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the chat template that a folder's tokenizer came with; None if it has none."""
    source = tokenizer.usage.templates.get("default")
    if source is None:
        return None
    variables = ("bos_token", "eos_token", "pad_token")
    said = tokenizer.usage.tokenizer
    try:
        return ChatTemplate(source, tokenizer, {n: said[n] for n in variables if n in said})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


# -- Jinja as transformers sets it up for chat templates


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
