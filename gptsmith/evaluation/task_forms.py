"""What a row of each task asks: a prompt, the texts to choose from, and the right answer.

`TASKS` is the table of tasks. A new one is a row there and a function that reads its rows; the
function that measures its items is in `tasks.py`. Knows nothing of models or tokens.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..config.settings import PrepareSettings
from ..data.decoding import checked_encoding
from ..data.example_fields import kind, label_in, named, text_in, there_are
from ..data.rows import BadRows, read_rows
from ..data.sources import find_sources

PromptStyle = Literal["lm-eval", "llm.c"]
Fields = Mapping[str, Any]
OTHER_NAMES = {
    "sentence_good": "good",  # in BLiMP's files
    "sentence_bad": "bad",
    "completion": "answer",  # in examples to learn from
}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. `answer` is the number of the right choice, a label or a text."""

    place: str  # for errors
    prompt: str
    answer: int | str
    choices: tuple[str, ...] = ()
    delimiter: str = " "  # between prompt and choice
    by_tokens: bool = False  # prompt and choice are encoded separately; normalized by tokens


@dataclass(frozen=True)
class TaskForm:
    """The rows of a task: the fields by which they are known, how they are read and measured."""

    fields: tuple[str, ...]
    read: Callable[[str, Fields, PromptStyle], Item]
    measure: Literal["choose", "prefer", "continue", "label", "write"]


# -- reading one row; each raises ValueError with the end of a sentence that begins with its place


def hellaswag(place: str, fields: Fields, style: PromptStyle) -> Item:
    """Read a beginning and its endings, in the form of lm-evaluation-harness or of llm.c."""
    endings = texts_in(fields, "endings")
    answer = number_in(fields, "label", len(endings))
    if style == "llm.c":
        prompt = text_in(fields, "ctx")
        return Item(place=place, prompt=prompt, choices=endings, answer=answer, by_tokens=True)
    second = text_in(fields, "ctx_b", empty=True)
    context = f"{text_in(fields, 'ctx_a', empty=True)} {second.capitalize()}"
    return Item(
        place=place,
        prompt=without_wikihow(f"{text_in(fields, 'activity_label')}: {context}"),
        choices=tuple(map(without_wikihow, endings)),
        answer=answer,
    )


def without_wikihow(text: str) -> str:
    """Return a text of HellaSwag without the marks that its WikiHow articles left in it."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def lambada(place: str, fields: Fields, style: PromptStyle) -> Item:
    """Read a text whose last word is to be continued with."""
    beginning, _, word = text_in(fields, "text").rpartition(" ")
    if not word:
        raise ValueError("has a text that ends with a space: it must end with its last word")
    return Item(place=place, prompt=beginning, choices=(word,), answer=0)


def choices(place: str, fields: Fields, style: PromptStyle) -> Item:
    """Read a prompt and the choices of what follows, after a space unless `delimiter` says else."""
    prompt, texts = text_in(fields, "prompt", empty=True), texts_in(fields, "choices")
    delimiter = text_in(fields, "delimiter", empty=True) if "delimiter" in fields else " "
    answer = fields.get("answer")
    if isinstance(answer, str) and answer in texts:
        number = texts.index(answer)
    else:
        number = number_in(fields, "answer", len(texts))
    return Item(place=place, prompt=prompt, choices=texts, answer=number, delimiter=delimiter)


def pairs(place: str, fields: Fields, style: PromptStyle) -> Item:
    """Read a good sentence and a bad one."""
    both = (text_in(fields, "good"), text_in(fields, "bad"))
    return Item(place=place, prompt="", choices=both, answer=0)


def labelled(place: str, fields: Fields, style: PromptStyle) -> Item:
    """Read a text and its label."""
    return Item(place=place, prompt=text_in(fields, "text"), answer=label_in(fields))


def exact(place: str, fields: Fields, style: PromptStyle) -> Item:
    """Read a prompt and the answer that is to be written."""
    if isinstance(fields.get("answer"), int | float):
        fields = {**fields, "answer": str(fields["answer"])}
    answer = text_in(fields, "answer").strip()
    return Item(place=place, prompt=text_in(fields, "prompt", empty=True), answer=answer)


TASKS = {
    "hellaswag": TaskForm(("endings", "label"), hellaswag, "choose"),
    "lambada": TaskForm(("text",), lambada, "continue"),
    "choices": TaskForm(("prompt", "choices", "answer"), choices, "choose"),
    "classify": TaskForm(("text", "label"), labelled, "label"),
    "exact": TaskForm(("prompt", "answer"), exact, "write"),
    "pairs": TaskForm(("good", "bad"), pairs, "prefer"),
}


def texts_in(fields: Fields, name: str) -> tuple[str, ...]:
    """Return the texts of a list of two or more."""
    if name not in fields:
        raise ValueError(f"has no '{name}'{there_are(fields)}")
    value = fields[name]
    if not isinstance(value, list | tuple):
        raise ValueError(f"has {kind(value)} in '{name}': a list of texts is needed")
    if len(value) < 2:
        raise ValueError(f"has {len(value)} texts in '{name}': at least 2 are needed")
    return tuple(text_in({name: each}, name) for each in value)


def number_in(fields: Fields, name: str, count: int) -> int:
    """Return the number of the right one of `count` choices, from 0."""
    if name not in fields:
        raise ValueError(f"has no '{name}'{there_are(fields)}")
    value = fields[name]
    digits = isinstance(value, str) and value.strip().isdecimal()
    number = int(value) if digits or type(value) is int else -1
    if not 0 <= number < count:
        raise ValueError(
            f"has {value!r} in '{name}': the number of one of its choices, 0 to {count - 1}, is "
            "needed"
        )
    return number


# -- reading a file


def read_items(
    data: str,
    task: str | None = None,
    *,
    style: PromptStyle = "lm-eval",
    options: PrepareSettings | None = None,
) -> tuple[str, list[Item]]:
    """Read a file of rows; return the name of its task and the items.

    Without `task`, the fields of the first row tell it. ValueError in one line for a file of
    another form, for an empty one, and for a row that is wrong unless the options skip such rows.
    """
    options, items = options or PrepareSettings(), list[Item]()
    bad_rows = BadRows(options.bad_rows)
    for source in find_sources([data]):
        if not source.has_rows:
            raise ValueError(
                f"{source.name} is not a file of rows: .jsonl, .json (a list), .csv, .tsv or "
                ".parquet is needed"
            )
        for row in read_rows(source, encoding=checked_encoding(options.encoding)):
            found = named(row)
            fields = {OTHER_NAMES[name]: found.pop(name) for name in OTHER_NAMES if name in found}
            fields |= found  # a field of the task's own name comes first
            if not row.problem and not items:
                task = checked_form(row.place, fields, task)
            try:
                if row.problem:
                    raise ValueError(row.problem)
                assert task is not None
                items.append(TASKS[task].read(row.place, fields, style))
            except ValueError as error:
                bad_rows.add(f"{row.place} {error}")
    bad_rows.warn()
    if task is None or not items:
        raise ValueError(f"{data} has no rows of questions: at least one is needed")
    return task, items


def checked_form(place: str, fields: Fields, task: str | None) -> str:
    """Return the task that a row is for; ValueError if it is not the wanted one, or for none."""
    known = [name for name, form in TASKS.items() if {*form.fields} <= fields.keys()]
    found = max(known, key=lambda name: len(TASKS[name].fields), default=None)
    if found is None or task not in (None, found, *known):
        wanted = TASKS if task is None else (task,)
        forms = "; ".join(f"{name}: {', '.join(TASKS[name].fields)}" for name in wanted)
        theirs = "" if found is None else f", which are those of --task {found}"
        raise ValueError(
            f"{place} has the fields {', '.join(map(repr, fields)) or 'of no name'}{theirs}; "
            f"needed are those of {forms}"
        )
    return task or found
