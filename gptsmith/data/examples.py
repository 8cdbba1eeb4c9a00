"""Read the rows of examples: conversations, preferences and labelled texts, and check them.

What a row is follows from its fields. Every refusal names the file, the line and the field, and
what is wanted there. Knows nothing of tokens or templates.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..config.finetune import ExampleKind, FinetuneSettings, Task
from ..config.settings import PrepareSettings
from .decoding import checked_encoding, decoded_text
from .example_fields import (
    Form,
    Message,
    conversation_in,
    form_of,
    label_in,
    named,
    preference_in,
    task_of,
    text_in,
    there_are,
)
from .rows import BadRows, Row, read_rows
from .sources import STANDARD_INPUT, Source, find_sources

SPLITS = ("train", "validation", "test")
FORMS = (
    "messages; instruction, input and output; prompt and completion; prompt, chosen and rejected; "
    "or text and label"
)


class Conversation(NamedTuple):
    """Messages of which the last is an assistant's; every message of an assistant is learned."""

    place: str  # for errors
    form: Form
    split: str  # that the row says it belongs to, or ""
    messages: list[Message]

    @property
    def prompt(self) -> str:
        """What tells prompts apart: all before the first answer."""
        roles = [message["role"] for message in self.messages]
        return joined(self.messages[: roles.index("assistant")])


class Preference(NamedTuple):
    """The messages of a prompt, and two answers of an assistant: the better and the worse."""

    place: str
    form: Form
    split: str
    messages: list[Message]
    chosen: Message
    rejected: Message

    @property
    def prompt(self) -> str:
        """What tells prompts apart."""
        return joined(self.messages)


class Labelled(NamedTuple):
    """A text and the name of its label."""

    place: str
    form: Form
    split: str
    text: str
    label: str

    @property
    def prompt(self) -> str:
        """What tells texts apart."""
        return self.text


Example: TypeAlias = Conversation | Preference | Labelled


def joined(messages: Sequence[Message]) -> str:
    """Return messages as one text, different for different ones."""
    return "\0".join(f"{each['role']}\0{each['content']}" for each in messages)


class ExampleReader:
    """Reads the examples of all sources, and keeps account of what was read."""

    def __init__(
        self, names: Sequence[str], options: PrepareSettings, finetune: FinetuneSettings
    ) -> None:
        self.names, self.options, self.finetune = names, options, finetune
        self.task = finetune.example_kind  # None until the first row tells
        self.encoding = checked_encoding(options.encoding)
        self.files = [file for name in names for file in example_files(name, self.task)]
        self.size = sum(source.size for source, _ in self.files)  # bytes
        self.read = 0  # of them
        self.sums: list[str] = []  # SHA-256 of each source
        self.bad_rows = BadRows(options.bad_rows)

    def examples(self) -> Iterator[Example]:
        """Yield all examples, in order; ValueError in one line for what is not one."""
        for source, said in self.files:
            before, digest = self.read, hashlib.sha256()
            for row in self.rows(source, said, digest):
                self.read = before + row.read
                try:
                    if row.problem:
                        raise ValueError(row.problem)
                    example = self.example(row)
                except ValueError as error:
                    self.bad_rows.add(f"{row.place} {error}")
                    continue
                yield example
            self.read = before + source.size
            self.sums.append(digest.hexdigest())

    def rows(
        self, source: Source, said: Mapping[str, str], digest: "hashlib._Hash"
    ) -> Iterator[Row]:
        """Yield the rows of a source; a text whose folder says its label is one row."""
        encoding = "utf-8" if source.content is not None else self.encoding
        if said:
            text = "".join(part for part, _ in decoded_text(source, encoding, None, digest))
            yield Row(source.name, {self.options.field: text, **said}, source.size)
        else:
            yield from read_rows(
                source, encoding=encoding, header=self.finetune.header, digest=digest
            )

    def example(self, row: Row) -> Example:
        """Return what a row is; ValueError with what is wrong with it."""
        fields = named(row)
        task = self.task or task_of(fields)
        if task is None:
            raise ValueError(no_example(row, fields))
        try:
            example = self.example_for(task, fields, row)
        except ValueError as error:
            other = task_of(fields)
            if other in (None, task):
                raise
            raise ValueError(f"{error}: it is an example for {other}, not for {task}") from None
        self.task = task
        return example

    def example_for(self, task: ExampleKind, fields: Mapping[str, Any], row: Row) -> Example:
        """Return the example for a task that a row has; ValueError with what is wrong with it."""
        split = fields.get("split", "")
        if split not in ("", *SPLITS):
            raise ValueError(f"has {split!r} in 'split': train, validation or test is needed")
        if task == "classify":
            text = text_in(fields, self.options.field.lower())
            return Labelled(row.place, "label", split, text, label_in(fields))
        if task == "preference":
            return Preference(row.place, form_of(fields), split, *preference_in(fields))
        return Conversation(row.place, form_of(fields), split, conversation_in(fields))


# -- which files, and which task


def example_files(name: str, task: ExampleKind | None) -> list[tuple[Source, dict[str, str]]]:
    """Return the files of a name, each with the label and the split that its folder says, if any.

    ValueError for a text that has no label, which is no example.
    """
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        if folders := label_folders(path, task):
            return [
                (source, said)
                for folder, said in folders.items()
                for source in find_sources([str(folder)])
            ]
        rows = [source for source in find_sources([name]) if source.has_rows]
        if not rows:
            raise ValueError(
                f"{name} has no rows of examples: .jsonl or .parquet files, or a folder for each "
                "label are needed"
            )
        return [(source, {}) for source in rows]
    sources = find_sources([name])
    if texts := [source.name for source in sources if not source.has_rows]:
        raise ValueError(
            f"{texts[0]} is a text, not rows of examples: .jsonl, .json (a list), .csv, .tsv or "
            ".parquet is needed"
        )
    return [(source, {}) for source in sources]


def label_folders(folder: Path, task: ExampleKind | None) -> dict[Path, dict[str, str]]:
    """Return the folders in a folder that has one for each label, and what each says; else {}.

    There may be one of these for each split: train/ham, train/spam, test/ham, test/spam.
    """
    visible = [each for each in sorted(folder.iterdir()) if not each.name.startswith(".")]
    folders = [each for each in visible if each.is_dir()]
    if task not in (None, "classify"):
        return {}
    if "train" in [each.name for each in folders] and {each.name for each in folders} <= {*SPLITS}:
        parts = {each.name: label_folders(each, task) for each in folders}
        return {
            path: said | {"split": split}
            for split, part in parts.items()
            for path, said in part.items()
        }
    if len(folders) < 2 or len(folders) < len(visible):
        return {}
    return {each: {"label": each.name} for each in folders}


def recognised_task(
    names: Sequence[str], options: PrepareSettings, finetune: FinetuneSettings
) -> Task:
    """Return the task that the settings name, or else what the first row of the data is for.

    Plain text, and rows that have a text and nothing else of an example, are for the task "text".
    """
    if finetune.task is not None:
        return finetune.task
    for name in names:
        path = Path(os.path.expanduser(name))
        if name == STANDARD_INPUT or (path.exists() and not path.is_file() and not path.is_dir()):
            return "text"  # a pipe, which can be read only once
        if name and path.is_dir() and label_folders(path, None):
            return "classify"
    sources, bad_rows = find_sources(names), BadRows(options.bad_rows)
    for source in sources:
        if not source.has_rows:
            if source.name.endswith(".json"):
                raise ValueError(f"{source.name} is not a JSON list: a list of objects is needed")
            continue
        encoding = "utf-8" if source.content is not None else checked_encoding(options.encoding)
        for row in read_rows(source, encoding=encoding, header=finetune.header):
            fields = named(row)
            if not row.problem and (task := task_of(fields)):
                return task
            if not row.problem and options.field.lower() in fields:
                return "text"
            bad_rows.add(f"{row.place} {row.problem or no_example(row, fields)}")
    if all(source.has_rows for source in sources):
        raise ValueError(none_in(names, bad_rows))
    return "text"


def no_example(row: Row, fields: Mapping[str, Any]) -> str:
    """Return what is wrong with a row that is no example, for the end of an error."""
    table = row.place.rpartition(",")[0].lower().endswith((".csv", ".tsv"))
    cure = "; if the file has no header, name its columns with --columns" if table else ""
    return f"has none of the fields of an example{there_are(fields)}: {FORMS}{cure}"


def none_in(names: Sequence[str], bad_rows: BadRows) -> str:
    """Return the error for sources that have no example."""
    first = f"; the first bad row: {bad_rows.first}" if bad_rows.first else ""
    return f"there is no example in {', '.join(names)}: rows of {FORMS} are needed{first}"
