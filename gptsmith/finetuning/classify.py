"""The task of classifying: the head scores labels, and the last token of a text is asked.

Shapes:  R rows    T tokens    K labels
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.settings import RunSettings
from ..data.encoded import Examples
from ..machine.devices import autocast, with_float64
from ..machine.processes import sum_of_numbers
from ..model.classifier import Classifier
from ..model.gpt import GPT
from ..model.loss import NOT_LEARNED
from ..training.task import Evaluating
from .task import CountedExamples, ExampleTask, cut

SHOWN = 5  # held-out texts that samples.md shows the labels of
SHOWN_CHARACTERS = 200


class LabelledPrefixes(CountedExamples):
    """The label's cross entropy at a text's last token and, with a weight, at those before it.

    Every beginning of a text is then an example too, and the more of the text it has, the more it
    weighs: a model with random weights has more to learn from where texts are few.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def loss(self, model: GPT, *batch: Tensor) -> Tensor:
        """Return the mean loss of texts.  (R, T), (R, T), maybe seeds (R, P) -> ()"""
        tokens, targets, *seeds = cut(*batch)
        logits = model.lm_head(model.features(tokens, None, *seeds)).float()  # (R, T, K)
        labels, last = targets.max(1)  # (R,), (R,)
        places = torch.arange(tokens.shape[1], device=tokens.device) - last[:, None]  # (R, T)
        everywhere = labels[:, None].where(places <= 0, NOT_LEARNED)
        nats = F.cross_entropy(
            logits.flatten(0, 1), everywhere.flatten(), ignore_index=NOT_LEARNED, reduction="none"
        ).view_as(tokens)
        weights = (places + last[:, None] + 1).where(places <= 0, 0).float()  # 1, 2, 3, ...
        weights *= self.weight / weights.sum(1, keepdim=True)
        weights += (places == 0) * (1 - self.weight)
        return (weights * nats).sum(1).mean()


class ClassifyTask(ExampleTask):
    """Labels of texts."""

    unit: ClassVar[str] = "text"
    # In a batch of texts of one length, the length says nothing of the label: the words have to.
    group: ClassVar[int] = 16

    def __init__(
        self, run: Path, settings: RunSettings, examples: Examples, checkpoint: Path | None
    ) -> None:
        super().__init__(run, settings, examples, checkpoint)
        if weight := settings.finetune.prefix_weight:
            self.objective = LabelledPrefixes(weight)

    @property
    def worst_loss(self) -> float:
        """The loss of a uniform guess, in nats per text."""
        return math.log(len(self.examples.labels))

    def describe(self) -> str:
        """Return what is learned, in a line of the plan."""
        labels = self.examples.labels
        some = ", ".join(labels[:4]) + (", ..." if len(labels) > 4 else "")
        return f"classify: {len(labels)} labels: {some}"

    def first_model(self, device: torch.device) -> GPT:
        """Return the model to start from with a fresh head that scores the labels."""
        assert self.tokenizer is not None
        model = super().first_model(device)
        if isinstance(model, Classifier) and model.labels == self.examples.labels:
            return model
        torch.manual_seed(self.settings.training.seed)
        return Classifier.of(model, self.examples.labels, self.tokenizer.document_end)

    def batch_sums(self, trainer: Evaluating, split: str, numbers: np.ndarray) -> np.ndarray:
        """Return nats, texts, and those whose likeliest label is right.  (R,) -> (3,)"""
        scores, labels = self.scores(trainer, split, numbers)
        scores, labels = with_float64(scores), with_float64(labels)
        nats = F.cross_entropy(scores.double(), labels, reduction="sum")
        return np.array([float(nats), len(labels), int((scores.argmax(1) == labels).sum())])

    @torch.inference_mode()
    def scores(
        self, trainer: Evaluating, split: str, numbers: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of the labels of some texts, and the right ones' numbers.

        (R,) -> (R, K), (R,)
        """
        tokens, targets = self.read(split, numbers, trainer.device)
        asked = targets != NOT_LEARNED
        model = trainer.model
        with autocast(trainer.device, trainer.dtype):
            features = model.features(tokens)[asked]  # (R, C)
            return model.lm_head(features).float(), targets[asked]

    def figures(self, sums: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Return the fields of an evaluation's record from the sums (3,)."""
        nats, texts, right = sum_of_numbers(sums.tolist(), device)
        return {"validation_loss": nats / texts, "validation_accuracy": right / texts}

    def sample(self, model: GPT, step: int) -> Iterator[str]:
        """Yield held-out texts, their labels, and the model's."""
        assert self.tokenizer is not None
        rows, labels = self.splits["validation"], self.examples.labels
        for number in range(min(SHOWN, len(rows))):
            ((tokens, targets),) = rows.read(number)
            with torch.inference_mode():
                features = model.features(torch.from_numpy(tokens).to(model.device)[None])
                chances = model.lm_head(features[0, -1]).float().softmax(0)
            found = int(chances.argmax())
            text = self.tokenizer.decode(tokens)[:SHOWN_CHARACTERS]
            verdict = f"{labels[found]} ({chances[found]:.0%})"
            yield f"{text}\nlabel: {labels[int(targets[-1])]}; the model says {verdict}\n\n"
