"""How many items of a task a model has right, how sure that is, and how two models differ.

Knows nothing of models or texts.

Shapes:  N items
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .intervals import (
    Interval,
    conclusion,
    documents_to_settle,
    mcnemar,
    paired_interval,
    verdict,
)


class Outcome(NamedTuple):
    """What a model makes of one item."""

    right: bool
    right_norm: bool | None = None  # by the likelihood divided by the choice's length
    logprob: float | None = None  # of the only continuation, in nats
    cut: bool = False  # whether the context could not hold the whole prompt


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
            unit=f"in {self.name}",
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
