"""Measure a model on the items of a task: which of them it has right.

The definitions are those of lm-evaluation-harness, so that the numbers can be compared. Knows
nothing of files.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..generation.answers import AT_ONCE, answers
from ..generation.writing import prompt_ids
from ..model.classifier import Classifier
from ..tokenizers.chat import open_template
from .intervals import (
    Interval,
    conclusion,
    documents_to_settle,
    mcnemar,
    paired_interval,
    verdict,
)
from .labels import predict
from .task_forms import TASKS, Item
from .task_requests import Judged, scored

SPACES = 8  # tokens of an answer that may be white space around it


class Outcome(NamedTuple):
    """What a model makes of one item."""

    right: bool
    right_norm: bool | None = None  # by the likelihood divided by the choice's length
    logprob: float | None = None  # of the only continuation, in nats
    cut: bool = False  # whether the context could not hold the whole prompt


Outcomes = Iterator[tuple[int, Outcome]]  # by the number of the item, in any order


def measure(judged: Judged, task: str, items: Sequence[Item]) -> Outcomes:
    """Yield the number and the outcome of each item, as they become known.

    The model is in evaluation mode meanwhile. ValueError in one line for an item that it cannot be
    asked.
    """
    was_training = judged.model.training
    judged.model.eval()
    try:
        yield from MEASURES[TASKS[task].measure](judged, items)
    finally:
        judged.model.train(was_training)


# -- one function for each way to measure


def choose(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Choose the likeliest continuation, and the likeliest for its length.

    The length is in characters without the delimiter or, in llm.c's form, in tokens.
    """
    for each in scored(judged, items):
        item, nats = items[each.number], [choice.logprob for choice in each.choices]
        lengths = each.tokens if item.by_tokens else [*map(len, item.choices)]
        # A choice may lose all its characters with the marks of WikiHow.
        per = [n / length if length else -math.inf for n, length in zip(nats, lengths, strict=True)]
        right = best(nats) == item.answer, best(per) == item.answer
        yield each.number, Outcome(*right, cut=each.cut)


def prefer(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Choose the likelier sentence, whatever its length."""
    for number, outcome in choose(judged, items):
        yield number, outcome._replace(right_norm=None)


def best(values: Sequence[float]) -> int:
    """Return the number of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def continues(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Compare the only continuation with the likeliest tokens."""
    for number, (found,), _, cut in scored(judged, items):
        yield number, Outcome(found.greedy, logprob=found.logprob, cut=cut)


def label(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Compare labels with those that a classifier gives."""
    model: Classifier = judged.model
    for item in items:
        if item.answer not in model.labels:
            known = ", ".join(model.labels[:8]) + (", ..." if len(model.labels) > 8 else "")
            raise ValueError(
                f"{item.place} has the label '{item.answer}', which the model does not know: one "
                f"of {known} is needed"
            )
    texts = (item.prompt for item in items)
    given = predict(model, judged.tokenizer, texts, unknown=judged.unknown)
    for number, (item, each) in enumerate(zip(items, given, strict=True)):
        yield number, Outcome(each.label == item.answer, cut=each.left_out > 0)


def write(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Compare answers with those that the model writes greedily.

    The model's answer ends at an end token or, unless the right one has several lines, with its
    line; white space around it does not count. A model with a chat template is asked by it.
    """
    model, tokenizer = judged.model, judged.tokenizer
    template = open_template(Path("the model"), tokenizer)
    order = sorted(range(len(items)), key=lambda number: -len(str(items[number].answer)))
    for start in range(0, len(order), AT_ONCE):
        numbers = order[start : start + AT_ONCE]
        prompts = [
            template.ids([{"role": "user", "content": items[number].prompt}])
            if template
            else prompt_ids(tokenizer, items[number].prompt)
            for number in numbers
        ]
        wanted = [str(items[number].answer) for number in numbers]
        # Every token but those of white space has at least a byte of the answer.
        limit = max(len(text.encode()) for text in wanted) + SPACES
        stop = () if any("\n" in text for text in wanted) else ("\n",)
        given = answers(model, tokenizer, prompts, max_tokens=limit, stop=stop)
        for number, prompt, text, each in zip(numbers, prompts, wanted, given, strict=True):
            answer = each.text if "\n" in text else each.text.split("\n")[0]
            cut = len(prompt) > model.config.context_length
            yield number, Outcome(answer.strip() == text, cut=cut)


MEASURES: dict[str, Callable[[Judged, Sequence[Item]], Outcomes]] = {
    "choose": choose,
    "prefer": prefer,
    "continue": continues,
    "label": label,
    "write": write,
}


# -- figures


@dataclass(frozen=True)
class Measured:
    """The outcomes of all items of a task, and what follows from them."""

    outcomes: Sequence[Outcome] = field(repr=False)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Whether each item is right, 0 or 1, by the name of each accuracy; (N,) each."""
        found = {"accuracy": np.array([each.right for each in self.outcomes], float)}
        norm = [each.right_norm for each in self.outcomes]
        return found if None in norm else found | {"accuracy_norm": np.array(norm, float)}

    @property
    def cut(self) -> int:
        """How many items were cut to fit the context."""
        return sum(each.cut for each in self.outcomes)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values; "stderr" are standard errors."""
        figures = dict[str, Any]()
        for name, values in self.values.items():
            figures[name], figures[f"{name}_stderr"] = mean_and_error(values)
        logprobs = [each.logprob for each in self.outcomes if each.logprob is not None]
        if logprobs:
            mean, error = mean_and_error(np.array(logprobs))
            figures["perplexity"] = perplexity(mean)
            # That of the mean, times the derivative of exp there.
            figures["perplexity_stderr"] = None if error is None else perplexity(mean) * error
        return figures | {"items": len(self.outcomes), "cut": self.cut}


def perplexity(mean_logprob: float) -> float:
    """Return the perplexity of words whose log-probability has this mean, in nats."""
    return math.exp(min(-mean_logprob, 700.0))


def mean_and_error(values: np.ndarray) -> tuple[float, float | None]:
    """Return the mean of values (N,) and its standard error; None for a single value."""
    if len(values) < 2:
        return float(values.mean()), None
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


# -- two models


@dataclass(frozen=True)
class Paired:
    """How two models differ on the same items, by one of the accuracies."""

    name: str  # of the accuracy
    interval: Interval  # of the difference
    only_first: int  # items that the first model has right, and the second wrong
    only_second: int
    items: int

    @property
    def p_value(self) -> float:
        """McNemar's exact p-value, two-sided."""
        return mcnemar(self.only_first, self.only_second)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values, with keys that end as the accuracy's name."""
        suffix = self.name.removeprefix("accuracy")
        figures = {
            "difference": self.interval.mean,
            "interval": [self.interval.low, self.interval.high],
            "verdict": verdict(self.interval, lower_is_better=False),
            "items_to_settle": documents_to_settle(self.interval, self.items),
            "p_value": self.p_value,
        }
        return {name + suffix: value for name, value in figures.items()}

    def sentence(self, first: str, second: str) -> str:
        """Return what it means for the models of these names."""
        said = conclusion(
            first,
            second,
            self.interval,
            self.items,
            unit=f"of {self.name}",
            noun="items",
            lower_is_better=False,
        )
        return (
            f"{said} Only {first} is right on {self.only_first:,} items, only {second} on "
            f"{self.only_second:,}: McNemar's exact p is {self.p_value:.2g}."
        )


def compare(first: Measured, second: Measured) -> list[Paired]:
    """Compare two models on the same items, by each accuracy; ValueError for fewer than two."""
    found = list[Paired]()
    for name, values in first.values.items():
        differences = values - second.values[name]
        only = int((differences > 0).sum()), int((differences < 0).sum())
        found.append(Paired(name, paired_interval(differences), *only, len(values)))
    return found
