"""The verb that labels texts: classify."""

import json
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import setting
from ..config.finetune import COLUMNS_HELP
from ..config.settings import InferenceSettings, PrepareSettings
from ..machine.terminal import count, tell
from .flags import Parser, add_flags, chosen
from .opening import CLASSIFIER_HELP, open_model

SHOWN = 5  # labels of a line that is no JSON
# Not asked of texts that are read once.
PREPARING = ("validation_fraction", "deduplicate", "shard_tokens", "workers")


@dataclass(frozen=True, kw_only=True)
class ClassifySettings:
    """What to label."""

    data: str | None = setting(
        None,
        "file of texts, or - for standard input: rows of .jsonl, .json, .csv, .tsv or .parquet, or "
        "one text on each line of any other file; rows with labels are also counted",
        metavar="FILE",
    )
    text: tuple[str, ...] = setting((), "a text to label; repeatable")
    columns: str | None = setting(None, COLUMNS_HELP, metavar="A,B")
    label_field: str = setting("label", "key or column of the labels in the data, if it has them")
    confusion: Path | None = setting(
        None, "draw which labels are taken for which, where the data has labels", metavar="PNG"
    )
    json: bool = setting(False, "write a JSON object on each line")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith classify`."""
    parser.add_argument("model", metavar="MODEL", help=CLASSIFIER_HELP)
    add_flags(parser, ClassifySettings)
    add_flags(parser, PrepareSettings, without=PREPARING)
    add_flags(parser, InferenceSettings, without=("compile",))


def run(options: Namespace) -> None:
    """Label texts: a line for each, with its likeliest label and the probabilities."""
    settings, reading = chosen(options, ClassifySettings), chosen(options, PrepareSettings)
    if (settings.data is None) == (not settings.text):
        raise ValueError("what to label is not clear: give either --data or --text")
    if settings.confusion is not None and settings.data is None:
        raise ValueError("--confusion needs --data with labels: add it, or leave --confusion out")
    if settings.confusion is not None and not settings.confusion.parent.is_dir():
        raise ValueError(f"no folder {settings.confusion.parent} for --confusion: create it first")
    if settings.confusion is not None and settings.confusion.is_dir():
        raise ValueError(f"{settings.confusion} is a folder: name a file for --confusion")
    _, model, tokenizer = open_model(options, options.model, labels=True)
    if tokenizer is None:
        raise ValueError(
            f"{options.model} has no tokenizer.json, which reading text needs: add one"
        )
    from ..evaluation.classification import Confusion
    from ..evaluation.drawing import draw_confusion
    from ..evaluation.labels import predict

    tally = Tally(Confusion(model.labels))
    texts = tally.remembering(texts_of(settings, reading))
    for found in predict(model, tokenizer, texts, unknown=reading.unknown):
        print(json.dumps(found.to_json(), ensure_ascii=False) if settings.json else line_of(found))
        tally.add(found)
    sys.stdout.flush()  # before the figures
    for line in tally.lines(model.config.context_length):
        tell(line)
    if settings.confusion is not None:
        if not tally.confusion.texts:
            raise ValueError(f"{settings.data} has no labels of this model: leave --confusion out")
        draw_confusion(tally.confusion, settings.confusion)


def texts_of(settings: ClassifySettings, reading: PrepareSettings) -> Iterator[Any]:
    """Return the texts to label, with their labels where the data has them."""
    from ..data.texts import LabelledText, read_texts

    if settings.data is None:
        return (LabelledText(text, None) for text in settings.text)
    columns = settings.columns.split(",") if settings.columns else None
    return read_texts(settings.data, reading, label_field=settings.label_field, header=columns)


def line_of(found: Any) -> str:
    """Return a prediction as a line: the labels with their probabilities, likeliest first."""
    likeliest = sorted(found.probabilities.items(), key=lambda each: -each[1])
    more = "  ..." if len(likeliest) > SHOWN else ""
    return "  ".join(f"{label} {p:.4f}" for label, p in likeliest[:SHOWN]) + more


class Tally:
    """Compares predictions with the labels that the data has, and counts what to tell of."""

    def __init__(self, confusion: Any) -> None:
        self.confusion = confusion
        self.numbers = {label: number for number, label in enumerate(confusion.labels)}
        self.wanted: deque[str | None] = deque()  # labels of texts that were read
        self.foreign, self.such = 0, ""  # texts with a label that the model does not have
        self.cut = 0

    def remembering(self, texts: Iterable[Any]) -> Iterator[str]:
        """Yield the texts, and remember their labels until they are predicted."""
        for text, label in texts:
            self.wanted.append(label)
            yield text

    def add(self, found: Any) -> None:
        """Count the prediction of the next text."""
        self.cut += found.left_out > 0
        wanted = self.wanted.popleft()
        if wanted in self.numbers:
            self.confusion.add(self.numbers[wanted], self.numbers[found.label])
        elif wanted is not None:
            self.foreign, self.such = self.foreign + 1, wanted

    def lines(self, context_length: int) -> Iterator[str]:
        """Yield what there is to tell at the end."""
        if self.cut:
            yield (
                f"{count(self.cut, 'text')} longer than the context of {context_length:,} tokens: "
                "read from the beginning"
            )
        if self.foreign:
            yield (
                f"{count(self.foreign, 'text')} not counted, with a label that the model does not "
                f"have, such as '{self.such}'"
            )
        if self.confusion.texts:
            yield str(self.confusion)
