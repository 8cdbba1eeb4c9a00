"""What the loop and a run need of a task: its data, its objective, and how it is judged and shown.

`text.py` is the task of learning text; the room `finetuning` has the others. Knows nothing of how
a step works.

Shapes:  R rows of this process's share of a batch    T tokens
"""

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..config.settings import RunSettings
from ..evaluation.heldout import evaluation_of
from ..machine.terminal import Display
from ..model.gpt import GPT
from ..model.loss import NOT_LEARNED
from ..tokenizers import Tokenizer


class Batches(Protocol):
    """The batch of any step, by its number alone."""

    rows: int  # of the global batch
    rank: int
    mine: np.ndarray  # the rows of this process, (R,)

    @property
    def row_tokens(self) -> int:
        """The most tokens that a row has."""
        ...

    def at(self, step: int) -> tuple[np.ndarray, ...]:
        """Return this process's part of a step's batch: arrays whose first axis is R."""
        ...

    def tokens(self, step: int) -> int:
        """Return how many tokens a step's global batch has, without padding."""
        ...


class Objective(Protocol):
    """What training minimizes: a mean over what is counted."""

    def loss(self, model: GPT, *batch: Tensor) -> Tensor:
        """Return the mean loss of a batch of (R, ...) tensors, the last the seeds if any.  -> ()"""
        ...

    def counted(self, *batch: Tensor) -> Tensor:
        """Return how much a batch of (R, ...) tensors counts.  -> ()"""
        ...


class CountedTargets:
    """The mean cross entropy of the targets that are not -1, which every model computes itself."""

    def loss(self, model: GPT, *batch: Tensor) -> Tensor:
        """Return the model's loss for tokens (R, T), targets (R, T) and maybe seeds.  -> ()"""
        return model.loss(*batch)

    def counted(self, *batch: Tensor) -> Tensor:
        """Return the number of targets (R, T) that are not -1.  -> ()"""
        return (batch[1] != NOT_LEARNED).sum()


def token_figures(
    sums: np.ndarray, tokenizer: Tokenizer | None, device: torch.device
) -> dict[str, Any]:
    """Return the fields of a record from this process's nats, targets and their bytes, (3,)."""
    found = evaluation_of(sums, tokenizer, device)
    return {
        "validation_loss": found.loss,
        "validation_tokens": found.tokens,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
    }


class Evaluating(Protocol):
    """What an evaluation needs of a trainer."""

    model: GPT
    device: torch.device
    dtype: str
    sharded: bool  # all processes must make equally many passes: `sharding.in_step` sees to it


class Task(Protocol):
    """One task, opened for one run."""

    settings: RunSettings  # completed by what the data says
    tokenizer: Tokenizer | None
    objective: Objective

    @property
    def folder(self) -> Path:
        """The folder of the data."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this data from other data, wherever it lies."""
        ...

    @property
    def held_out(self) -> int:
        """The tokens that an evaluation reads; 0 if nothing is held out."""
        ...

    @property
    def worst_loss(self) -> float:
        """The loss of a model that has learned nothing, in nats."""
        ...

    def damage(self) -> str:
        """Return what is wrong with the data since it was written, or ""."""
        ...

    def make_model(self, device: torch.device) -> GPT:
        """Return the model to train: resumed, to start from, or with fresh weights."""
        ...

    def batches(self, model: GPT) -> Batches:
        """Return the batches of this process."""
        ...

    def begin(self, trainer: Evaluating, display: Display) -> None:
        """Do what needs the run's precision and the weights before the first step."""
        ...

    def check(self, *, fresh: bool) -> None:
        """Raise ValueError for what would fail only later; warn of what would spoil a fresh run."""
        ...

    def plan(self, done: int) -> dict[str, str]:
        """Return the rows of the plan about the data and the steps."""
        ...

    def sums(self, trainer: Evaluating) -> Generator[np.ndarray, None, None]:
        """Evaluate this process's share of what is held out; yield sums (N,), at least one."""
        ...

    def figures(self, sums: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Return the fields of a record from the sums; "validation_loss" is one of them."""
        ...

    def sample(self, model: GPT, step: int) -> Iterator[str]:
        """Yield what samples.md shows after a step, piece by piece; nothing without samples."""
        ...


# Opens the task of a run: (the run's folder, its settings, the checkpoint to resume from, the
# display, whether the data was moved).
OpenTask = Callable[[Path, RunSettings, Path | None, Display, bool], Task]
