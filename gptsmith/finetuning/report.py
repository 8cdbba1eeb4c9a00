"""The test after fine-tuning: the best checkpoint on the examples that were kept for it.

Writes test.json and, by task, answers.jsonl or confusion.png into the run's folder. Knows nothing
of training.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import building
from ..checkpoint.finding import find_model
from ..config.recipe import read_toml
from ..evaluation.classification import Confusion, baselines
from ..evaluation.drawing import draw_confusion
from ..machine.devices import find_device
from ..machine.files import write_text
from ..machine.terminal import Display
from ..model.gpt import GPT
from ..training.records import CONFIG_TOML
from .chat import answered, has_ends
from .classify import ClassifyTask
from .preference import PreferenceTask
from .task import ExampleTask
from .tasks import TASKS, open_examples

TEST, ANSWERS, CONFUSION = "test.json", "answers.jsonl", "confusion.png"
MOST_ANSWERS = 200  # that are generated


@dataclass
class Judged:
    """A model that is evaluated."""

    model: GPT
    device: torch.device
    dtype: str
    sharded: bool = False


def test_run(run: Path, display: Display) -> dict[str, Any]:
    """Test the best checkpoint of a finished run, and return what test.json says.

    It is {} for a run that has no test examples, as one that learns text.
    """
    settings = read_toml(run / CONFIG_TOML)
    if settings.finetune.task not in TASKS:
        return {}
    examples = open_examples(run, settings, display)
    checkpoint = find_model(run)
    task = TASKS[settings.finetune.task](run, settings, examples, checkpoint)
    if not len(task.splits["test"]):
        return {}
    device = find_device(settings.machine.device)
    model, _ = building.load_folder(checkpoint, device=device)
    found = {"checkpoint": checkpoint.name, "examples": len(task.splits["test"])}
    judged = Judged(model, device, settings.machine.dtype)
    found |= TESTS.get(type(task), test_answers)(task, judged)
    write_text(run / TEST, json.dumps(found, indent=2) + "\n")
    return found


def loss_of(task: ExampleTask, judged: Judged) -> dict[str, Any]:
    """Return the fields of an evaluation on the test examples, without "validation_"."""
    sums: Any = sum(task.sums_of(judged, "test"), np.zeros(1))
    figures = task.figures(sums, judged.device)
    return {name.removeprefix("validation_"): value for name, value in figures.items()}


def test_answers(task: ExampleTask, judged: Judged) -> dict[str, Any]:
    """Compare the model's answers with those wanted, and write both to answers.jsonl."""
    limit = task.settings.report.sample_tokens
    found = [*answered(task, judged.model, "test", MOST_ANSWERS, max_tokens=limit)] if limit else []
    rows = [{**each._asdict(), "exact": each.exact} for each in found]
    write_text(task.run / ANSWERS, "".join(json.dumps(row) + "\n" for row in rows))
    counted = {"answers": len(found)}
    keys = ("ended", "exact") if has_ends(task.examples) else ("exact",)
    counted |= {key: sum(row[key] for row in rows) for key in keys}
    return loss_of(task, judged) | counted


def test_preferences(task: ExampleTask, judged: Judged) -> dict[str, Any]:
    """Return how often the chosen answer has the larger reward."""
    assert isinstance(task, PreferenceTask)
    task.reference["test"] = task.read_reference("test")
    return loss_of(task, judged)


def test_labels(task: ExampleTask, judged: Judged) -> dict[str, Any]:
    """Return figures of each label and both baselines, and draw confusion.png."""
    assert isinstance(task, ClassifyTask)
    confusion = Confusion(task.examples.labels)
    for numbers in task.batches_of("test"):
        scores, wanted = task.scores(judged, "test", numbers)
        for right, given in zip(wanted.tolist(), scores.argmax(1).tolist(), strict=True):
            confusion.add(right, given)
    draw_confusion(confusion, task.run / CONFUSION)
    simple = baselines(texts(task, "train"), texts(task, "test"), len(confusion.labels))
    others = {"most_frequent": simple.most_frequent, "naive_bayes": simple.naive_bayes}
    return loss_of(task, judged) | confusion.to_json() | {"baselines": others}


def texts(task: ExampleTask, split: str) -> Iterator[tuple[str, int]]:
    """Yield the texts of a split with the numbers of their labels."""
    rows = task.splits[split]
    for number in range(len(rows)):
        ((tokens, targets),) = rows.read(number)
        yield task.examples.tokenizer.decode(tokens), int(targets[-1])


TESTS = {ClassifyTask: test_labels, PreferenceTask: test_preferences}


def summary(found: dict[str, Any]) -> Iterator[str]:
    """Yield what a test found, in lines."""
    if not found:
        return
    line = f"Test on {found['examples']:,} examples: loss {found['loss']:.4f}"
    if "accuracy" in found:
        line += f", {found['accuracy']:.1%} right"
    if "reward_margin" in found:
        line += f", reward margin {found['reward_margin']:.3f}"
    yield line
    for label, figures in list(found.get("labels", {}).items())[:10]:
        shown = {key: figures[key] for key in ("precision", "recall")}
        yield f"  {label}: {figures['texts']:,} texts" + "".join(
            f", {key} {'-' if value is None else format(value, '.3f')}"
            for key, value in shown.items()
        )
    if "baselines" in found:
        simple = found["baselines"]
        yield (
            f"  to compare: {simple['most_frequent']:.1%} by the most frequent label, "
            f"{simple['naive_bayes']:.1%} by naive Bayes on words"
        )
    if found.get("answers"):
        ended = f"{found['ended']:,} ended by themselves and " if "ended" in found else ""
        yield (
            f"  of {found['answers']:,} answers, {ended}{found['exact']:,} are exactly those wanted"
        )
