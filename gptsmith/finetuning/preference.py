"""The task of preferring: of two answers, the better one becomes likelier (DPO).

The reference, the model before its first step, is asked once; its log-probabilities are kept on
disk, so that one model is in memory while the other learns.

Shapes:  N pairs    P pairs of a batch, of 2 rows    T tokens
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..config.fields import SettingError
from ..config.settings import RunSettings
from ..data.encoded import Examples
from ..data.example_batches import ExampleBatches
from ..machine.devices import autocast
from ..machine.environment import rank, world_size
from ..machine.files import DamagedError, file_written_whole
from ..machine.processes import my_share, sum_of_numbers, sum_over_processes, wait_for_processes
from ..machine.terminal import Display
from ..model.gpt import GPT
from ..model.preference import PreferenceLoss, answer_logprobs, preference_loss
from ..training.sharding import in_step
from ..training.task import Evaluating
from .chat import SHOWN, answered, shown
from .task import ExampleTask, cut


class PreferredPairs(PreferenceLoss):
    """DPO's loss of pairs without their padding."""

    def loss(self, model: GPT, *batch: Tensor) -> Tensor:
        """Return the mean loss of pairs.  (P, 2, T), (P, 2, T), (P, 2), maybe (P, K) -> ()"""
        return super().loss(model, *cut(*batch))


class PairBatches(ExampleBatches):
    """Batches of pairs with what the reference thinks of them."""

    reference: np.ndarray | None = None  # (N, 2), once it is known

    def at(self, step: int) -> tuple[np.ndarray, ...]:
        """Return this process's part: tokens and targets (P, 2, T), and the reference (P, 2)."""
        mine = self.numbers(step)[self.mine]
        known = np.zeros((len(mine), 2)) if self.reference is None else self.reference[mine]
        return *super().at(step), known


class PreferenceTask(ExampleTask):
    """The better of two answers to each prompt."""

    unit: ClassVar[str] = "pair"

    def __init__(
        self, run: Path, settings: RunSettings, examples: Examples, checkpoint: Path | None
    ) -> None:
        super().__init__(run, settings, examples, checkpoint)
        self.objective = PreferredPairs(settings.finetune.beta)
        self.reference: dict[str, np.ndarray] = {}  # (N, 2) of each split, once they are known

    @property
    def worst_loss(self) -> float:
        """The loss of a model that prefers neither answer, in nats per pair."""
        return math.log(2)

    def describe(self) -> str:
        """Return what is learned, in a line of the plan."""
        same = self.examples.info["counts"]["same_answers"]
        doubt = f"; {same:,} pairs of equal answers teach nothing" if same else ""
        return f"preference: the chosen answers, beta {self.settings.finetune.beta}{doubt}"

    def make_model(self, device: torch.device) -> GPT:
        """As every task does; SettingError on MPS, which has no float64 for small differences."""
        if device.type == "mps":
            raise SettingError("device", "is mps, where preferences cannot be learned: take cpu")
        return super().make_model(device)

    # -- the reference

    def batches(self, model: GPT) -> ExampleBatches:
        """Return batches of pairs, with what the reference thinks of them once that is known."""
        training, rows = self.settings.training, self.settings.finetune.batch_rows
        self.pairs = PairBatches(
            self.splits["train"], rows, seed=training.seed, rank=rank(), world_size=world_size()
        )
        return self.pairs

    def reference_file(self, split: str) -> Path:
        """Return the file of what the reference thinks of a split's answers."""
        return self.run / f"reference-{split}.npy"

    def read_reference(self, split: str) -> np.ndarray:
        """Read what the reference thinks of a split's answers, (N, 2); DamagedError in one line."""
        path, pairs = self.reference_file(split), len(self.splits[split])
        try:
            known = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise DamagedError(f"{path} is damaged ({error}): start another run") from error
        if known.shape != (pairs, 2):
            raise DamagedError(
                f"{path} is not about the {pairs} pairs of {split}: start another run"
            )
        return known

    def begin(self, trainer: Evaluating, display: Display) -> None:
        """Ask the reference about every pair, in the run's precision, or read what it said.

        ValueError after the first step, when the model is no reference any more.
        """
        for split, rows in self.splits.items():
            path = self.reference_file(split)
            if not path.exists() and self.checkpoint is not None:
                raise ValueError(
                    f"{self.run} has lost {path.name}, what the model thought before it learned: "
                    "start another run"
                )
            if self.checkpoint is None:
                display.open_bar(f"reference, {split}", len(rows))
                known = self.asked(trainer, split, display)
                display.close_bar()
                if rank() == 0:
                    path.unlink(missing_ok=True)  # of a run that was killed before its first step
                    with file_written_whole(path) as temporary, temporary.open("wb") as file:
                        np.save(file, known)
                wait_for_processes()
            self.reference[split] = self.read_reference(split)
        self.pairs.reference = self.reference["train"]

    def asked(self, trainer: Evaluating, split: str, display: Display) -> np.ndarray:
        """Return the log-probabilities of the answers in a split.  -> (N, 2)"""
        rows = self.splits[split]
        known = torch.zeros(len(rows), 2, dtype=torch.float64, device=trainer.device)
        with in_step(trainer.model, trainer.sharded):
            for numbers in my_share(self.batches_of(split)):
                known[numbers] = self.logprobs(trainer, split, numbers)
                display.move_bar(int(known[:, 0].count_nonzero()), "")
        return sum_over_processes(known).cpu().numpy()

    @torch.inference_mode()
    def logprobs(self, trainer: Evaluating, split: str, numbers: np.ndarray) -> Tensor:
        """Return the log-probabilities of the answers of some pairs.  (P,) -> (P, 2)"""
        tokens, targets = self.read(split, numbers, trainer.device)
        with autocast(trainer.device, trainer.dtype):
            return answer_logprobs(trainer.model, tokens, targets)

    # -- judging

    no_sums: ClassVar[np.ndarray] = np.zeros(4)

    def batch_sums(self, trainer: Evaluating, split: str, numbers: np.ndarray) -> np.ndarray:
        """Return nats, pairs, those whose chosen answer is preferred, and margins.  (P,) -> (4,)"""
        reference = torch.from_numpy(self.reference[split][numbers]).to(trainer.device)
        logprobs = self.logprobs(trainer, split, numbers)
        found = preference_loss(logprobs, reference, self.settings.finetune.beta)
        right = (found.margins > 0).sum()
        nats = found.loss * len(numbers)
        return np.array([float(nats), len(numbers), int(right), float(found.margins.sum())])

    def figures(self, sums: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Return the fields of an evaluation's record from the sums (4,)."""
        nats, pairs, right, margins = sum_of_numbers(sums.tolist(), device)
        return {
            "validation_loss": nats / pairs,
            "validation_accuracy": right / pairs,
            "reward_margin": margins / pairs,
        }

    def sample(self, model: GPT, step: int) -> Iterator[str]:
        """Yield held-out prompts with the chosen answer in the data and the model's."""
        limit = self.settings.report.sample_tokens
        if limit:
            yield from map(shown, answered(self, model, "validation", SHOWN, max_tokens=limit))
