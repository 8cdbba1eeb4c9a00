"""What the tasks that learn from examples share: opening them, the model, the batches, the plan.

Knows nothing of what a model is asked for (`chat.py`, `classify.py`, `preference.py`).

Shapes:  R rows    T tokens
"""

from collections.abc import Generator, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..config.classifier import check_writes
from ..config.settings import RunSettings
from ..data.encoded import Examples
from ..data.example_batches import ExampleBatches, padded
from ..data.examples import SPLITS
from ..evaluation.batching import batches_by_length
from ..machine.environment import rank, world_size
from ..machine.files import DamagedError
from ..machine.processes import my_share
from ..machine.terminal import Display, count
from ..model.gpt import GPT
from ..model.growing import grow_vocabulary
from ..model.loss import NOT_LEARNED
from ..tokenizers import Tokenizer
from ..training.checks import check_rates
from ..training.task import CountedTargets, Evaluating, Objective
from .weights import choose_weights, load_to_learn


def cut(*batch: Tensor) -> tuple[Tensor, ...]:
    """Cut off the columns after the last target of a micro-batch, which change nothing.

    (R, ..., T), (R, ..., T), others -> (R, ..., U), (R, ..., U), others

    With dropout, whose seeds (R, P) are the last of the others, nothing is cut: what is dropped
    depends on a row's length.
    """
    tokens, targets, *others = batch
    learned = (targets != NOT_LEARNED).flatten(0, -2).any(0).nonzero()
    if any(other.dtype == torch.int32 for other in others) or not len(learned):
        return batch
    end = int(learned[-1]) + 1
    return (tokens[..., :end].contiguous(), targets[..., :end].contiguous(), *others)


class CountedExamples(CountedTargets):
    """The mean cross entropy of the targets that are learned, of examples without their padding."""

    def loss(self, model: GPT, *batch: Tensor) -> Tensor:
        """Return the model's loss for tokens (R, T), targets (R, T) and maybe seeds.  -> ()"""
        return super().loss(model, *cut(*batch))


class ExampleTask:
    """A task that learns from a folder of examples."""

    unit: ClassVar[str] = "example"
    objective: Objective = CountedExamples()
    # Batches at a time whose examples are sorted by length. Examples of one length are often of one
    # kind, so that conversations are drawn at random.
    group: ClassVar[int] = 1

    def __init__(
        self, run: Path, settings: RunSettings, examples: Examples, checkpoint: Path | None
    ) -> None:
        self.run, self.settings, self.examples = run, settings, examples
        self.checkpoint = checkpoint  # to resume from
        self.tokenizer: Tokenizer | None = examples.tokenizer
        self.splits = {name: examples.split(name) for name in SPLITS}
        if checkpoint is None:
            self.settings = with_steps(settings, len(self.splits["train"]))

    @property
    def folder(self) -> Path:
        """The folder of the examples."""
        return self.examples.folder

    @property
    def identity(self) -> dict[str, Any]:
        """What tells these examples from others."""
        return self.examples.identity

    @property
    def held_out(self) -> int:
        """The tokens that an evaluation reads."""
        return int(self.splits["validation"].lengths.sum())

    @property
    def worst_loss(self) -> float:
        """The loss of a uniform guess, in nats."""
        raise NotImplementedError

    def damage(self) -> str:
        """Return what is wrong with a file that was changed since it was written, or ""."""
        try:
            self.examples.verify()
        except DamagedError as error:
            return str(error)
        return ""

    # -- the model

    def make_model(self, device: torch.device) -> GPT:
        """Return the checkpoint's model, or the one to begin with, of which a part may learn."""
        assert self.tokenizer is not None
        if self.checkpoint is not None:
            model = load_to_learn(self.checkpoint, self.settings, device)
        else:
            model = self.first_model(device)
        choose_weights(model, self.settings, self.tokenizer, self.checkpoint)
        return model

    def first_model(self, device: torch.device) -> GPT:
        """Return the model to start from, or one with fresh weights, with a row for every token."""
        assert self.tokenizer is not None
        training, vocab_size = self.settings.training, self.tokenizer.vocab_size
        if training.start_from is None:
            torch.manual_seed(training.seed)
            return GPT(replace(self.settings.model, vocab_size=vocab_size)).to(device)
        model = load_to_learn(Path(training.start_from), self.settings, device)
        if not self.examples.labels:
            check_writes(model.config, training.start_from)
        grow_vocabulary(model, vocab_size)
        return model

    # -- learning

    def batches(self, model: GPT) -> ExampleBatches:
        """Return the batches of examples of this process."""
        finetune = self.settings.finetune
        return ExampleBatches(
            self.splits["train"],
            finetune.batch_rows,
            seed=self.settings.training.seed,
            group=self.group,
            rank=rank(),
            world_size=world_size(),
        )

    def begin(self, trainer: Evaluating, display: Display) -> None:
        """Do what must be done with the trained model's precision before the first step."""

    def check(self, *, fresh: bool) -> None:
        """Raise ValueError for what would spoil a fresh run."""
        if fresh:
            check_rates(self.settings.training)

    def plan(self, done: int) -> dict[str, str]:
        """Return the rows of the plan about the examples and the steps."""
        info, training = self.examples.info, self.settings.training
        rows = self.settings.finetune.batch_rows
        sizes = {name: len(part) for name, part in self.splits.items()}
        epochs = training.steps * rows / sizes["train"]
        return {
            "task": self.describe(),
            "examples": f"{sizes['train']:,} to learn from, {sizes['validation']:,} for "
            f"validation, {sizes['test']:,} for test"
            + "".join(f"; {each}" for each in doubts(info["counts"])),
            "steps": f"{training.steps:,} of {count(rows, self.unit)}: {epochs:.1f} epochs"
            + (f"; {count(done, 'step')} done" if done else ""),
        }

    def describe(self) -> str:
        """Return what is learned, in a line of the plan."""
        raise NotImplementedError

    # -- judging

    def sums(self, trainer: Evaluating) -> Generator[np.ndarray, None, None]:
        """Evaluate this process's share of the validation examples; yield sums, (N,) each."""
        yield from self.sums_of(trainer, "validation")

    def sums_of(self, trainer: Evaluating, split: str) -> Generator[np.ndarray, None, None]:
        """Evaluate this process's share of a split's examples; yield sums, (N,) each."""
        model, was_training = trainer.model, trainer.model.training
        model.eval()
        try:
            yield self.no_sums
            for numbers in my_share(self.batches_of(split)):
                yield self.batch_sums(trainer, split, numbers)
        finally:
            model.train(was_training)

    def batches_of(self, split: str) -> Iterator[np.ndarray]:
        """Yield the numbers of all examples of a split, as many at once as fit a forward pass."""
        yield from map(np.array, batches_by_length(self.splits[split].lengths.tolist()))

    no_sums: ClassVar[np.ndarray] = np.zeros(3)

    def batch_sums(self, trainer: Evaluating, split: str, numbers: np.ndarray) -> np.ndarray:
        """Evaluate some examples of a split; return sums.  (R,) -> (N,)"""
        raise NotImplementedError

    def figures(self, sums: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Return the fields of an evaluation's record from the sums (N,) of this process."""
        raise NotImplementedError

    def sample(self, model: GPT, step: int) -> Iterator[str]:
        """Yield what the model makes of a few held-out examples."""
        raise NotImplementedError

    def read(self, split: str, numbers: np.ndarray, device: torch.device) -> list[Tensor]:
        """Read examples of a split as tensors on a device: tokens and targets, (R, T) each."""
        examples = [self.splits[split].read(int(number)) for number in numbers]
        return [torch.from_numpy(part).to(device) for part in padded(examples)]


def with_steps(settings: RunSettings, examples: int) -> RunSettings:
    """Return settings whose steps are those of their epochs, if these are given."""
    epochs, rows = settings.finetune.epochs, settings.finetune.batch_rows
    if epochs is None:
        return settings
    steps = max(1, round(epochs * (examples // rows)))
    warmup = min(settings.training.warmup_steps, steps // 10)
    return replace(
        settings,
        training=replace(settings.training, steps=steps, warmup_steps=warmup),
        finetune=replace(settings.finetune, epochs=None),
    )


def doubts(counts: Mapping[str, int]) -> Iterator[str]:
    """Yield what was lost or is doubtful in the examples."""
    if counts["bad_rows"]:
        yield f"{count(counts['bad_rows'], 'bad row')} skipped"
    if counts["cut_prompts"]:
        yield f"{counts['cut_prompts']:,} cut to fit the context"
    if counts["cut_answers"]:
        yield f"{count(counts['cut_answers'], 'answer')} cut, whose end is not learned"
    if counts["repeats"]:
        yield f"{count(counts['repeats'], 'repeated prompt')}, kept in one split each"
