"""Chat templates: the token ids of a conversation, and which of them are an assistant's answers.

Knows nothing of requests or of training. Only the template can write special tokens. In a message
they are ordinary text, so nobody can end a turn, or speak for somebody else, by typing their
markers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jinja2

from ..config.fields import suggestion
from .jinja import language
from .tokenizer import END_OF_TEXT, Tokenizer, Unknown

NONCHARACTERS = range(0xFDD0, 0xFDF0)  # code points that Unicode never assigns to characters
VARIABLES = ("bos_token", "eos_token", "pad_token")  # of a template, for special tokens
# Alpaca's prompt, as the book writes it; a system message takes the place of its first sentences.
ALPACA = """\
{%- for message in messages %}
{%- if loop.first %}
{%- if message.role == 'system' %}{{- message.content }}
{%- else %}{{- 'Below is an instruction that describes a task. ' -}}
{{- 'Write a response that appropriately completes the request.' }}
{%- endif %}
{%- endif %}
{%- if message.role == 'user' %}{{- '\n\n### Instruction:\n' + message.content }}
{%- elif message.role == 'assistant' %}{{- '\n\n### Response:\n' }}
{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- elif message.role != 'system' or not loop.first %}
{{- raise_exception('there is no place for a message of role ' + message.role) }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\n\n### Response:\n' }}{%- endif %}
"""
# Nothing between the messages; the end of a text after each answer.
PLAIN = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- else %}{{- message.content }}
{%- endif %}
{%- endfor %}
"""
# The same of the last exchange alone, for models that have learned from no other.
COMPLETION = """\
{%- set last = messages | length - (2 if messages[-1].role == 'assistant' else 1) %}
{%- for message in messages %}
{%- if message.role == 'system' or loop.index0 >= last %}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + eos_token }}{%- endgeneration %}
{%- else %}{{- message.content }}
{%- endif %}
{%- endif %}
{%- endfor %}
"""
# The same without an end, for answers that are all of one length.
FIXED_LENGTH = COMPLETION.replace(" + eos_token", "")
BUILT_IN = {
    "alpaca": ALPACA,
    "plain": PLAIN,
    "completion": COMPLETION,
    "fixed-length": FIXED_LENGTH,
}


class Segment(NamedTuple):
    """A part of a conversation: token ids, and whether they are an answer, which is learned."""

    ids: list[int]
    learned: bool


class ChatTemplate:
    """A Jinja template that writes a conversation as the prompt on which a model was trained."""

    def __init__(self, source: str, tokenizer: Tokenizer, names: Mapping[str, str]) -> None:
        """`names` are the variables for special tokens in the template: bos_token, eos_token."""
        try:
            self.template = language().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error
        self.tokenizer, self.names = tokenizer, names
        self.ends = source != FIXED_LENGTH  # whether its answers have an end, which is learned
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
        self.suspect = {*map(chr, begins), *map(chr, NONCHARACTERS)}
        self.unmask = {ord(mask): chr(begin) for begin, mask in self.masks.items()}

    def ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's next answer begins.

        ValueError if the template refuses it.
        """
        return self.encoded(self.rendered(self.all_masked(messages), prompt=True))

    def segments(
        self, messages: Sequence[Mapping[str, str]], *, unknown: Unknown = "error"
    ) -> list[Segment]:
        """Return a conversation in segments: what precedes each answer, and the answer.

        An answer is what the template adds after the prompt for it, up to the special token that
        ends it, if answers have an end; each is encoded apart, so that no token spans its
        beginning, as in generation.
        ValueError if the template refuses the conversation or does not write it in this order.
        """
        masked = self.all_masked(messages)
        found, whole, end = list[Segment](), "", 0
        for number, message in enumerate(masked):
            if message.get("role") != "assistant":
                continue
            before, prompt = whole, self.rendered(masked[:number], prompt=True)
            whole = self.rendered(masked[: number + 1], prompt=False)
            if not (prompt.startswith(before) and whole.startswith(prompt)):
                raise ValueError(
                    f"the chat template does not write message {number + 1} as a continuation of "
                    "the prompt for it: use a template that does, such as alpaca"
                )
            found.append(Segment(self.encoded(prompt[end:], unknown), False))
            end = self.end_of_answer(whole, len(prompt))
            found.append(Segment(self.encoded(whole[len(prompt) : end], unknown), True))
        if masked[-1:] and masked[-1].get("role") != "assistant":
            whole = self.rendered(masked, prompt=False)
        found.append(Segment(self.encoded(whole[end:], unknown), False))
        return [segment for segment in found if segment.ids]

    def end_of_answer(self, whole: str, start: int) -> int:
        """Return where an answer ends that starts there: after the last special token, if any."""
        if not self.ends:
            return len(whole)
        ends = [found.end() for found in self.special.finditer(whole, start)]
        if not ends:
            raise ValueError(
                "the chat template writes no special token after an answer, so that a model could "
                "not learn to stop: add {{ eos_token }} there"
            )
        return ends[-1]

    def rendered(self, masked: Sequence[Mapping[str, str]], *, prompt: bool) -> str:
        """Return the text of masked messages, with the beginning of an answer if `prompt`."""
        try:
            return self.template.render(
                messages=masked,
                add_generation_prompt=prompt,
                tools=None,
                documents=None,
                **self.names,
            )
        except Exception as error:  # a template is a program: it can raise anything
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def encoded(self, text: str, unknown: Unknown = "error") -> list[int]:
        """Return the token ids of a text that a template has written, with its special tokens."""
        ids, end = list[int](), 0
        for found in self.special.finditer(text):
            ids += self.plain_ids(text[end : found.start()], unknown)
            ids.append(self.specials[found.group()])
            end = found.end()
        return ids + self.plain_ids(text[end:], unknown)

    def plain_ids(self, text: str, unknown: Unknown) -> list[int]:
        """Return the token ids of a text without special tokens, unmasked."""
        plain = text.translate(self.unmask)
        return self.tokenizer.encode_array(plain, unknown=unknown).tolist() if plain else []

    def all_masked(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
        """Return messages in which no special token can be found."""
        return [{key: self.masked(text) for key, text in each.items()} for each in messages]

    def masked(self, text: str) -> str:
        """Return a message in which no special token can be found.

        The first character of each is masked, also at the end of the message, where the text that
        follows could complete one.
        """
        if self.suspect.isdisjoint(text):
            return text
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
    said = tokenizer.usage.tokenizer
    try:
        return ChatTemplate(source, tokenizer, {n: said[n] for n in VARIABLES if n in said})
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


# -- choosing one


def template_source(name: str, tokenizer: Tokenizer, *, default: str) -> str:
    """Return the Jinja source that a name means: auto, a built-in one or a file.

    auto is the tokenizer's own template, or else the built-in one named `default`.
    """
    if name == "auto":
        return tokenizer.usage.templates.get("default") or BUILT_IN[default]
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not Path(name).is_file():
        raise FileNotFoundError(
            f"no chat template '{name}'{suggestion(name, BUILT_IN)}: {', '.join(BUILT_IN)} or a "
            "file in Jinja is needed"
        )
    try:
        source = Path(name).read_text(encoding="utf-8-sig")
        language().from_string(source)
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not in UTF-8 ({error.reason}): save it so") from error
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{name}, line {error.lineno}: the chat template is not valid Jinja: {error.message}"
        ) from error
    return source


def with_template(tokenizer: Tokenizer, source: str) -> Tokenizer:
    """Return a tokenizer that is saved with this chat template, and with what it may call its
    special tokens: <|endoftext|> where the tokenizer came with no others."""
    usage, said = tokenizer.usage, dict(tokenizer.usage.tokenizer)
    if tokenizer.end_of_text is not None:
        said = dict.fromkeys(VARIABLES, END_OF_TEXT) | said
    templates = {**usage.templates, "default": source}
    return Tokenizer(tokenizer.backend, replace(usage, tokenizer=said, templates=templates))
