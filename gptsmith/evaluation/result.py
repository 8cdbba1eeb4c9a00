"""What an evaluation found, of one model and of two compared, as text and as JSON.

Knows nothing of models.

Shapes:  N documents    T tokens (the context length)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..config.tables import columns
from .documents import Documents
from .intervals import (
    Interval,
    conclusion,
    documents_to_settle,
    mean_interval,
    paired_interval,
    verdict,
)


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation; whole texts have a loss of each document and position, too."""

    loss: float  # nats per token
    tokens: int  # number of targets
    bytes: int | None  # of their text; None without a tokenizer
    documents: Documents | None = field(default=None, repr=False)
    nats: np.ndarray | None = field(default=None, repr=False)  # of each document, (N,)
    by_position: np.ndarray | None = field(default=None, repr=False)  # nats and targets, (2, T)

    @property
    def perplexity(self) -> float:
        """exp(loss): as uncertain as a choice among that many equally likely tokens."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per byte of text, which is comparable between tokenizers."""
        if not self.bytes:
            return None
        return self.loss * self.tokens / math.log(2) / self.bytes

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95% confidence interval of the bits per byte; None for fewer than two documents."""
        if not self.bytes or self.documents is None or len(self.documents) < 2:
            return None
        _, low, high = mean_interval(self.bits_by_document, self.documents.bytes)
        return low, high

    @property
    def bits_by_document(self) -> np.ndarray:
        """The bits per byte of each document, (N,)."""
        assert self.nats is not None
        assert self.documents is not None
        return self.nats / math.log(2) / self.documents.bytes

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        names = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")
        figures: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.documents is not None:
            figures["documents"] = len(self.documents)
            figures["block_bytes"] = self.documents.block_bytes
            figures["interval"] = self.interval
        return figures

    def __str__(self) -> str:
        bits = "unknown" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"
        if self.interval:
            bits += " (95% interval {:.4f} to {:.4f})".format(*self.interval)
        return (
            f"loss           {self.loss:.4f} nats per token\n"
            f"perplexity     {self.perplexity:.2f}\n"
            f"bits per byte  {bits}\n"
            f"tokens         {self.tokens:,}"
            + (f"\ndocuments      {self.documents}" if self.bytes and self.documents else "")
        )


@dataclass(frozen=True)
class Comparison:
    """A model and another, of which both were evaluated on the same documents."""

    name: str
    found: Evaluation
    other_name: str
    other: Evaluation

    @property
    def differences(self) -> np.ndarray:
        """The model's bits per byte less the other's, of each document: (N,)."""
        return self.found.bits_by_document - self.other.bits_by_document

    @cached_property
    def interval(self) -> Interval:
        """The difference of the whole text, with its interval; negative where the model is better.

        ValueError for fewer than two documents.
        """
        assert self.found.documents is not None
        return paired_interval(self.differences, self.found.documents.bytes)

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain values."""
        return {
            "model": self.other_name,
            "bits_per_byte": self.other.bits_per_byte,
            "difference": self.interval.mean,
            "interval": [self.interval.low, self.interval.high],
            "verdict": verdict(self.interval),
            "documents_to_settle": documents_to_settle(self.interval, len(self.differences)),
        }

    def __str__(self) -> str:
        assert self.found.documents is not None
        return conclusion(
            self.name,
            self.other_name,
            self.interval,
            len(self.differences),
            noun="blocks" if self.found.documents.block_bytes else "documents",
        )


def table(found: Mapping[str, Evaluation]) -> Iterator[str]:
    """Yield a line for each model, and one on the documents, which are the same for all."""
    rows: list[tuple[str, ...]] = [
        ("model", "loss", "perplexity", "bits per byte", "95% interval", "tokens")
    ]
    for name, each in found.items():
        bits = "unknown" if each.bits_per_byte is None else f"{each.bits_per_byte:.4f}"
        interval = "{:.4f} to {:.4f}".format(*each.interval) if each.interval else "unknown"
        figures = (f"{each.loss:.4f}", f"{each.perplexity:.2f}", bits, interval, f"{each.tokens:,}")
        rows.append((name, *figures))
    yield from columns(rows, "<>>>>>")
    documents = next(iter(found.values())).documents
    if documents is not None and documents.bytes.any():
        yield f"documents: {documents}"
