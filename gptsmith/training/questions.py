"""The questions of `--evaluate-tasks`: files of items that each evaluation of a run measures.

Knows nothing of how an item is scored, which is in `evaluation/tasks.py`.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config.fields import SettingError
from ..evaluation.accuracy import perplexity
from ..evaluation.task_forms import TASKS, Item, read_items
from ..evaluation.task_requests import Judged, fitted_requests
from ..evaluation.tasks import measure
from ..machine.devices import autocast
from ..machine.processes import my_share, sum_of_numbers
from ..model.classifier import Classifier
from ..tokenizers import Tokenizer
from .task import Evaluating

TAKEN = ("validation",)  # whose figures have the same names


@dataclass(frozen=True)
class Questions:
    """The items of a file."""

    name: str  # of the file, without its suffix
    task: str
    items: Sequence[Item]


def open_questions(
    files: Sequence[str], model: Any, tokenizer: Tokenizer | None
) -> list[Questions]:
    """Read files of items; ValueError for what a run could measure at no evaluation."""
    found = list[Questions]()
    for file in files:
        task, items = read_items(file)
        name = Path(file).stem
        if name in (*TAKEN, *(each.name for each in found)):
            raise SettingError(
                "evaluate_tasks",
                f"is {file}, whose figures would be named '{name}' as others are: rename the file",
            )
        if (TASKS[task].measure == "label") != isinstance(model, Classifier):
            kind = "a classifier" if isinstance(model, Classifier) else "a model that writes text"
            raise SettingError(
                "evaluate_tasks",
                f"is {file}, which has items of the task {task}: that is not for {kind}",
            )
        assert tokenizer is not None
        fitted_requests(Judged(model, tokenizer), items)
        found.append(Questions(name, task, items))
    return found


def question_sums(
    questions: Sequence[Questions], trainer: Evaluating, tokenizer: Tokenizer | None
) -> Generator[np.ndarray, None, None]:
    """Measure this process's share of all items; yield what each adds to the sums, (Q, 4).

    The sums are, for each file: items, right ones, right ones by `accuracy_norm`, and nats.
    """
    yield np.zeros((len(questions), 4))  # a process may have no item
    precision = autocast(trainer.device, trainer.dtype)
    for row, each in enumerate(questions):
        assert tokenizer is not None
        judged = Judged(trainer.model, tokenizer, precision=precision)
        for _, outcome in measure(judged, each.task, [*my_share(each.items)]):
            sums = np.zeros((len(questions), 4))
            sums[row] = 1, outcome.right, outcome.right_norm or 0, outcome.logprob or 0
            yield sums


def question_figures(
    questions: Sequence[Questions], sums: np.ndarray, device: torch.device
) -> dict[str, float]:
    """Return the fields of a record from the sums of this process, (Q, 4)."""
    found, total = dict[str, float](), sum_of_numbers(sums.ravel().tolist(), device)
    for each, (count, right, norm, nats) in zip(
        questions, np.reshape(total, (-1, 4)).tolist(), strict=True
    ):
        found[f"{each.name}_accuracy"] = right / count
        match TASKS[each.task].measure:
            case "choose":
                found[f"{each.name}_accuracy_norm"] = norm / count
            case "continue":
                found[f"{each.name}_perplexity"] = perplexity(nats / count)
    return found
