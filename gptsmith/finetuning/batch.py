"""The first batch of a run, as it is learned: prompt, answer and padding.

Shapes:  R rows    T tokens
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..config.settings import RunSettings
from ..data.example_batches import ExampleBatches
from ..machine.terminal import Display
from ..model.loss import NOT_LEARNED
from .tasks import TASKS, open_examples

PROMPT, ANSWER, PADDING = "prompt", "answer", "padding"


def first_batch(settings: RunSettings, display: Display) -> Iterator[dict[str, Any]]:
    """Yield the rows of a fresh run's first batch, without training.

    Each has "pieces", a list of {"kind", "text", "tokens"}: the kind is prompt, answer (what is
    learned) or padding. A text to classify has its "label"; of two preferences, "answer" says which
    one it is.
    """
    assert settings.finetune.task in TASKS
    with TemporaryDirectory() as folder:
        examples = open_examples(Path(folder), settings, display)
        rows = examples.split("train")
        at_once = min(settings.finetune.batch_rows, len(rows))
        group = TASKS[settings.finetune.task].group
        batches = ExampleBatches(rows, at_once, seed=settings.training.seed, group=group)
        numbers = batches.numbers(0)
        longest = int(rows.lengths[numbers].max())
        for number in numbers:
            for place, (tokens, targets) in enumerate(rows.read(int(number))):
                row: dict[str, Any] = {}
                ids, wanted = tokens.tolist(), targets.tolist()
                if examples.task == "classify":
                    row["label"], wanted = examples.labels[wanted[-1]], [NOT_LEARNED] * len(ids)
                else:  # a target stands at the token before it
                    last = [wanted[-1]] if wanted[-1] != NOT_LEARNED else []
                    ids, wanted = [*ids, *last], [NOT_LEARNED, *wanted][: len(ids) + len(last)]
                if examples.task == "preference":
                    row["answer"] = ("chosen", "rejected")[place]
                yield row | {"pieces": pieces(examples.tokenizer, ids, wanted, longest + 1)}


def pieces(tokenizer: Any, ids: list[int], wanted: list[int], length: int) -> list[dict[str, Any]]:
    """Return a row in pieces of one kind each, filled up to `length`."""
    found: list[dict[str, Any]] = []
    start = 0
    for place in range(1, len(ids) + 1):
        learned = wanted[place - 1] != NOT_LEARNED
        if place == len(ids) or (wanted[place] != NOT_LEARNED) != learned:
            part = ids[start:place]
            kind = ANSWER if learned else PROMPT
            found.append({"kind": kind, "text": shown(tokenizer, part), "tokens": len(part)})
            start = place
    if len(ids) < length:
        found.append({"kind": PADDING, "text": "", "tokens": length - len(ids)})
    return found


def shown(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of ids; a special token is shown by its name."""
    text, plain = "", list[int]()
    for id in ids:
        if id in tokenizer.specials:
            text, plain = text + tokenizer.decode(plain) + tokenizer.specials[id], []
        else:
            plain.append(id)
    return text + tokenizer.decode(plain)
