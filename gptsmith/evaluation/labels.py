"""Label texts with a classifier: many texts, in batches of similar length.

Knows nothing of where texts come from, or of whether the labels are right.

Shapes:  B texts of a batch    T tokens of the longest    K labels
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from ..model.classifier import Classifier
from ..tokenizers import Tokenizer
from ..tokenizers.tokenizer import Unknown
from .batching import batches_by_length

AT_ONCE = 512  # texts that are read before they are sorted into batches of similar length


class Prediction(NamedTuple):
    """What a classifier says of a text."""

    label: str  # the likeliest
    probabilities: dict[str, float]  # of all labels, in the order of their numbers
    tokens: int  # of the text that were read
    left_out: int  # tokens at the end of the text, beyond the context

    def to_json(self) -> dict[str, Any]:
        """Return the label and the probabilities as plain values."""
        return {"label": self.label, "probabilities": self.probabilities}


def predict(
    model: Classifier,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    unknown: Unknown = "error",
) -> Iterator[Prediction]:
    """Yield the prediction of each text, in order; memory does not grow with their number.

    The model reads as much of a text as its context holds, from the beginning, as in training.
    ValueError for a text with a character that the tokenizer does not know, unless `unknown` is
    "skip", and for an empty text if the model has no padding token.
    """
    limit, remaining = model.config.context_length, iter(texts)
    while part := list(islice(remaining, AT_ONCE)):
        rows = [tokenizer.encode(text, unknown=unknown) for text in part]
        found = probabilities(model, [row[:limit] for row in rows])
        for row, each in zip(rows, found, strict=True):
            read = min(limit, len(row))
            yield prediction(model, each, read, len(row) - read)


def prediction(
    model: Classifier, probabilities: Sequence[float], tokens: int, left_out: int = 0
) -> Prediction:
    """Return the prediction with these probabilities, in the order of the labels' numbers."""
    by_label = dict(zip(model.labels, probabilities, strict=True))
    return Prediction(max(by_label, key=by_label.__getitem__), by_label, tokens, left_out)


@torch.inference_mode()
def probabilities(model: Classifier, rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the probability of each label for each row of tokens, in batches of similar length."""
    found, lengths = dict[int, list[float]](), [len(row) for row in rows]
    for numbers in batches_by_length(lengths, alone=model.pad_token_id is None):
        scores = model.scores(*padded(model, [rows[number] for number in numbers]))  # (B, K)
        for number, each in zip(numbers, scores.float().softmax(1).tolist(), strict=True):
            found[number] = each
    return [found[number] for number in range(len(rows))]


def padded(model: Classifier, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of tokens padded on the right, and the mask of what they hold.  (B, T), (B, T)"""
    T, filler = max(1, *map(len, rows)), model.pad_token_id or 0
    tokens = [[*row, *[filler] * (T - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (T - len(row)) for row in rows]
    device = model.device
    return torch.tensor(tokens, device=device), torch.tensor(mask, device=device)
