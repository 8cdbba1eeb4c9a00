"""How well are texts labelled: accuracy, precision and recall of each label, and two baselines.

Knows nothing of models: it counts wanted and given labels, by their numbers.

Shapes:  K labels    W words
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config.tables import columns

WORD = re.compile(r"\b\w\w+\b")  # two letters or more, as in scikit-learn's CountVectorizer

LabelledTexts = Iterable[tuple[str, int]]  # texts and the numbers of their labels


class Confusion:
    """Counts of labelled texts: `matrix` (K, K) has a row for each wanted label, a column for each
    given one."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.matrix = np.zeros((len(labels), len(labels)), np.int64)

    def add(self, wanted: int, given: int) -> None:
        """Count a text, by the numbers of its wanted and its given label."""
        self.matrix[wanted, given] += 1

    @property
    def texts(self) -> int:
        """Number of texts."""
        return int(self.matrix.sum())

    @property
    def accuracy(self) -> float:
        """Share of the texts that got the wanted label; 0 without texts."""
        return float(self.matrix.trace() / max(1, self.texts))

    def of_each_label(self) -> list["LabelFigures"]:
        """Return the figures of each label."""
        right, wanted, given = self.matrix.diagonal(), self.matrix.sum(1), self.matrix.sum(0)
        return [
            LabelFigures(label, int(n), share(r, g), share(r, n), share(2 * r, n + g))
            for label, r, n, g in zip(self.labels, right, wanted, given, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return {
            "accuracy": self.accuracy,
            "texts": self.texts,
            "labels": {
                each.label: {
                    "texts": each.texts,
                    "precision": each.precision,
                    "recall": each.recall,
                    "f1": each.f1,
                }
                for each in self.of_each_label()
            },
            "confusion": self.matrix.tolist(),
        }

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("label", "texts", "precision", "recall", "F1")]
        for each in self.of_each_label():
            figures = (each.precision, each.recall, each.f1)
            rows.append((each.label, f"{each.texts:,}", *map(shown, figures)))
        lines = [f"accuracy {self.accuracy:.4f} of {self.texts:,} texts"]
        return "\n".join([*lines, *columns(rows, "<>>>>")])


@dataclass(frozen=True)
class LabelFigures:
    """How well one label is given; a share of nothing is None."""

    label: str
    texts: int  # that should have it
    precision: float | None  # of the texts that got it, the share that should have
    recall: float | None  # of the texts that should have it, the share that got it
    f1: float | None  # the harmonic mean of the two


def share(part: int, whole: int) -> float | None:
    """Return a part's share; None of nothing."""
    return float(part / whole) if whole else None


def shown(figure: float | None) -> str:
    """Return a share as it is printed."""
    return "-" if figure is None else f"{figure:.4f}"


# -- baselines: what a classifier must do better than


@dataclass(frozen=True)
class Baselines:
    """The accuracies of two simple ways, on the same texts."""

    most_frequent: float  # always the label that is the most frequent in training
    naive_bayes: float  # naive Bayes on words

    def __str__(self) -> str:
        return (
            f"baselines: {self.most_frequent:.4f} always the most frequent label, "
            f"{self.naive_bayes:.4f} naive Bayes on words"
        )


def baselines(training: LabelledTexts, test: LabelledTexts, labels: int) -> Baselines:
    """Learn both baselines from the training texts, and measure them on the test texts."""
    bayes = NaiveBayes(training, labels)
    frequent = int(bayes.texts.argmax())
    right, count = np.zeros(2, np.int64), 0
    for text, wanted in test:
        right += (frequent == wanted, bayes.label(text) == wanted)
        count += 1
    shares = right / max(1, count)
    return Baselines(float(shares[0]), float(shares[1]))


class NaiveBayes:
    """Multinomial naive Bayes on words, with Laplace smoothing of one.

    The probability of a label is that of its share of the training texts, times that of each word
    of the text among all words of the label's texts. Words that training had not are left out.
    """

    def __init__(self, training: LabelledTexts, labels: int) -> None:
        """ValueError if there are no texts, or no words in them."""
        counts = [Counter[str]() for _ in range(labels)]
        self.texts = np.zeros(labels, np.int64)  # (K,)
        for text, label in training:
            counts[label].update(words(text))
            self.texts[label] += 1
        self.numbers = {word: number for number, word in enumerate(dict.fromkeys(chained(counts)))}
        if not self.numbers:
            raise ValueError("there are no words to learn from: texts of some words are needed")
        times = np.ones((len(self.numbers), labels))  # (W, K), with one more of each
        for label, count in enumerate(counts):
            times[[self.numbers[word] for word in count], label] += list(count.values())
        with np.errstate(divide="ignore"):  # a label without texts has the logarithm of 0
            self.log_prior = np.log(self.texts / self.texts.sum())
        self.log_likelihood = np.log(times / times.sum(0))

    def log_probabilities(self, text: str) -> np.ndarray:
        """Return the log-probability of each label of a text.  -> (K,)"""
        known = [self.numbers[word] for word in words(text) if word in self.numbers]
        joint = self.log_prior + self.log_likelihood[known].sum(0)
        return joint - np.logaddexp.reduce(joint)

    def label(self, text: str) -> int:
        """Return the number of the likeliest label."""
        return int(self.log_probabilities(text).argmax())


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case."""
    return WORD.findall(text.lower())


def chained(counts: Iterable[Counter[str]]) -> Iterator[str]:
    """Yield the words of all counters."""
    for count in counts:
        yield from count
