"""One optimizer step, and the stream of steps.

Yields a report per step and leaves evaluating, saving and showing to the caller; knows nothing of
files or terminals.

Shapes:  R rows of this process's share of the batch    T tokens    V vocabulary
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..config.settings import TrainingSettings
from ..data.batches import Batches
from ..machine.devices import autocast, seed_device
from ..machine.processes import sum_over_processes
from ..model.gpt import GPT
from ..model.loss import NOT_LEARNED
from .optimizers import Optimizer
from .schedules import learning_rate

# So many steps in a row without a finite gradient mean that the run is lost. With fp16 the scaler
# may first have to halve its way down from 65,536.
MOST_SKIPPED = {"float32": 5, "bf16": 5, "fp8": 5, "fp16": 25}


Compiled = Literal["no", "yes", "max-autotune"]


class DivergedError(ValueError):
    """The loss or the gradient was not a finite number for several steps in a row."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int  # how many steps are done, this one included
    loss: float  # nats per counted token, over the global batch
    grad_norm: float  # of all gradients, before clipping
    learning_rate: float
    tokens: int  # of the global batch
    seconds: float
    micro_batch: int  # rows that were computed at once
    skipped: bool  # the gradient was not finite, and nothing was learned


@dataclass
class Trainer:
    """What a step works on; the weights and the optimizer's state change, the rest stays."""

    model: GPT
    optimizers: list[Optimizer]
    batches: Batches
    settings: TrainingSettings
    device: torch.device
    dtype: str
    micro_batch: int  # rows; halved where the GPU's memory runs out
    scaler: torch.amp.GradScaler
    compiled: Compiled = "no"

    def __post_init__(self) -> None:
        self.compile(self.compiled)
        self.ready: tuple[int, Tensor, Tensor] | None = None  # a step's batch, already loaded

    def compile(self, how: Compiled) -> None:
        """Go on with torch.compile, or without."""
        self.compiled, self.loss = how, self.model.loss
        if how != "no":
            self.loss = torch.compile(self.loss, mode=None if how == "yes" else how)

    def forget_gradients(self) -> None:
        """Let the memory of the gradients go."""
        for parameter in self.model.parameters():
            parameter.grad = None

    def gradient(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Leave the gradient of the global batch's mean loss in the parameters; return that loss.

        (R, T), (R, T) -> (). Every counted token weighs the same, however rows are divided into
        micro-batches and processes: each part's mean is weighted by its share of the whole count.
        """
        self.forget_gradients()
        whole = sum_over_processes((targets != NOT_LEARNED).sum()).clamp(min=1)
        total = torch.zeros((), device=self.device)
        for rows, wanted in zip(
            tokens.split(self.micro_batch), targets.split(self.micro_batch), strict=True
        ):
            if self.compiled == "max-autotune":  # its CUDA graphs reuse the last pass's memory
                torch.compiler.cudagraph_mark_step_begin()
            with autocast(self.device, self.dtype):
                loss = self.loss(rows, wanted)
            loss = loss * ((wanted != NOT_LEARNED).sum() / whole)
            self.scaler.scale(loss).backward()
            total += loss.detach()
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                sum_over_processes(parameter.grad)
        return sum_over_processes(total)

    def gradient_in_memory(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """`gradient`, with the micro-batch halved for as long as the GPU has no room for it."""
        while True:
            try:
                return self.gradient(tokens, targets)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise ValueError(
                        "one row of the batch does not fit the GPU's memory: "
                        "use a smaller context_length or model"
                    ) from None
                self.micro_batch = math.ceil(self.micro_batch / 2)
            # Outside the handler, which would keep the failed pass's tensors alive.
            self.forget_gradients()
            torch.cuda.empty_cache()

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's tokens and targets of the step after `step` others.  -> (R, T), (R, T)"""
        if self.ready is not None and self.ready[0] == step:
            return self.ready[1:]
        return self.load(step)

    def load(self, step: int) -> tuple[Tensor, Tensor]:
        """Read a batch and start its way to the device.  -> (R, T), (R, T)"""
        tokens, targets = (torch.from_numpy(part) for part in self.batches.at(step))
        if self.device.type == "cuda":  # from pinned memory, a copy does not wait
            tokens, targets = tokens.pin_memory(), targets.pin_memory()
        return (
            tokens.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
        )

    def step(self, done: int) -> StepReport:
        """Do the step that comes after `done` steps."""
        started = time.perf_counter()
        seed_device(self.device, step_seed(self.settings.seed, done, self.batches.rank))
        rate = learning_rate(done, self.settings)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["times"]
        loss = self.gradient_in_memory(*self.batch(done))
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)  # type: ignore[arg-type]
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.settings.grad_clip or math.inf
        )
        if done + 1 < self.settings.steps:  # while a GPU is still at work on this one
            self.ready = (done + 1, *self.load(done + 1))
        numbers = torch.stack((loss, norm)).tolist()  # the one wait of a step
        skipped = not all(map(math.isfinite, numbers))
        if not skipped:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)  # type: ignore[arg-type]
        self.scaler.update()
        return StepReport(
            step=done + 1,
            loss=numbers[0],
            grad_norm=numbers[1],
            learning_rate=rate,
            tokens=self.batches.rows * self.batches.context_length,
            seconds=time.perf_counter() - started,
            micro_batch=self.micro_batch,
            skipped=skipped,
        )


def step_seed(seed: int, done: int, rank: int) -> int:
    """What seeds the randomness (dropout) of a step: a function of the run's seed and the step.

    So no generator's state has to survive a resume, and evaluating or sampling between two steps
    cannot disturb them.
    """
    return int(np.random.SeedSequence((seed, done, rank)).generate_state(1, np.uint64)[0])


def steps(trainer: Trainer, done: int) -> Iterator[StepReport]:
    """The steps after the first `done`, to the last; DivergedError where the run is lost."""
    skipped_in_a_row = 0
    trainer.model.train()
    while done < trainer.settings.steps:
        report = trainer.step(done)
        done = report.step
        yield report
        skipped_in_a_row = skipped_in_a_row + 1 if report.skipped else 0
        if skipped_in_a_row >= MOST_SKIPPED[trainer.dtype]:
            raise DivergedError(
                f"step {done}: the loss or gradient was not finite for {skipped_in_a_row} steps "
                f"in a row (learning rate {report.learning_rate:.3g})"
            )
