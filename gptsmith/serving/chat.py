"""From a conversation to a prompt, by the template in a model's folder; and what ends an answer.

Knows nothing of requests. A special token is one only where the template wrote it: in a message
it is text like any other, so nobody can end a turn, or take another's, by writing its marks.
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

from ..machine.files import read_json
from ..tokenizers import Tokenizer

NONCHARACTERS = range(0xFDD0, 0xFDF0)  # Unicode keeps them from ever being characters
SETTINGS = "tokenizer_config.json"


class ChatTemplate:
    """How a folder's model was taught to read a conversation."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        """`names` are the special tokens that a template calls by name: bos_token, eos_token."""
        try:
            self.template = language().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not one: {error}") from error
        self.tokenizer, self.names = tokenizer, names
        self.specials = {text: id for id, text in tokenizer.specials.items()}
        # Of two that begin alike, the longer is meant.
        longest_first = sorted(self.specials, key=len, reverse=True)
        self.special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        # What a special token begins with, and what stands for that where the text is only said.
        begins = sorted({ord(special[0]) for special in self.specials})
        self.masks = dict(zip(begins, map(chr, NONCHARACTERS), strict=False))
        if len(begins) > len(self.masks):
            raise ValueError(f"special tokens begin in {len(begins)} ways: at most 32 are needed")
        self.unmask = {ord(mask): chr(begin) for begin, mask in self.masks.items()}

    def ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The prompt that a conversation is; ValueError where the template refuses it."""
        masked = [{key: self.masked(text) for key, text in each.items()} for each in messages]
        try:
            text = self.template.render(
                messages=masked,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self.names,
            )
        except Exception as error:  # a template can go wrong in as many ways as a program
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        ids, end = list[int](), 0
        for found in self.special.finditer(text):
            ids += self.plain_ids(text[end : found.start()])
            ids.append(self.specials[found.group()])
            end = found.end()
        return ids + self.plain_ids(text[end:])

    def plain_ids(self, text: str) -> list[int]:
        """The ids of text without special tokens."""
        return self.tokenizer.encode(text.translate(self.unmask)) if text else []

    def masked(self, text: str) -> str:
        """A message in which no special token is found: the first character of each is masked, and
        that of what may become one with the text that follows."""
        if any(chr(mask) in text for mask in self.unmask):
            raise ValueError("a message has U+FDD0 or the like, which is no character: remove it")
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
    """The chat template of a folder; None where it has none."""
    said = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    source = template_source(folder, said)
    if source is None:
        return None
    names = {name: token_text(said.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
    try:
        return ChatTemplate(
            source, tokenizer, {name: text for name, text in names.items() if text is not None}
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def template_source(folder: Path, said: Mapping[str, Any]) -> str | None:
    """A template in a file of its own, or in tokenizer_config.json; of several, the default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = said.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def token_text(token: Any) -> str | None:
    """A special token as tokenizer_config.json writes it: its text, or an object that has it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def ends_of(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text, by the tokenizer and by what the folder says."""
    found: list[Any] = [tokenizer.end_of_text]
    if (path := folder / "generation_config.json").is_file():
        said = read_json(path).get("eos_token_id")
        found += said if isinstance(said, list) else [said]
    if (path := folder / SETTINGS).is_file():
        found.append(tokenizer.vocab.get(token_text(read_json(path).get("eos_token")) or ""))
    return frozenset(id for id in found if type(id) is int and 0 <= id < tokenizer.vocab_size)


# -- the language of templates, as transformers speaks it


def language() -> jinja2.Environment:
    """Jinja in a sandbox, where a template reaches what it is given and nothing else."""
    spoken = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    spoken.filters["tojson"] = to_json
    spoken.globals |= {"raise_exception": refuse, "strftime_now": now}
    return spoken


class Generation(jinja2.ext.Extension):
    """`{% generation %}` says which part an assistant wrote, which matters in training only."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        """What stands between, as if the tags were not there."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """A value as JSON; Jinja's own filter would write it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def refuse(message: str) -> None:
    """How a template says that it cannot take a conversation."""
    raise jinja2.TemplateError(message)


def now(form: str) -> str:
    """The date, as a template likes to write it."""
    return datetime.now().strftime(form)
