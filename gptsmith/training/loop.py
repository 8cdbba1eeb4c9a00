"""The training step, and the loop over steps.

The loop yields a report per step; evaluating, saving and displaying are the caller's. Knows nothing
of files or terminals.

Shapes:  R rows of this process's share of the batch    T tokens    V vocabulary
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..config.settings import TrainingSettings
from ..machine.devices import autocast, seed_device
from ..machine.environment import keep_compiled_code, world_size
from ..machine.processes import most_of_processes, noticing_loss, sum_over_processes
from ..model.dropout import dropout_seeds
from ..model.gpt import GPT
from . import sharding
from .buckets import GradientSums
from .optimizers import Optimizer
from .rollback import Rollback, batch_number, rate_factor
from .schedules import learning_rate
from .spikes import Recent
from .task import Batches, CountedTargets, Objective
from .update import CompiledUpdate

# Steps in a row without a finite gradient after which the run has diverged. With fp16, the gradient
# scaler may first have to halve its scale many times, from 65,536.
MOST_SKIPPED = {"float32": 5, "bf16": 5, "fp8": 5, "fp16": 25}

Compiled = Literal["no", "yes", "max-autotune"]


class DivergedError(ValueError):
    """The loss or the gradient was not finite, or a spike, for several steps in a row."""


class SpikeError(ValueError):
    """A step that, by `on_spike`, ends the run or takes it back; the weights are not updated."""

    def __init__(self, step: int, problem: str) -> None:
        super().__init__(f"step {step:,}: {problem}")
        self.step = step  # its number, from 1


@dataclass(frozen=True)
class StepReport:
    """The figures of one optimizer step."""

    step: int  # its number, from 1
    loss: float  # nats per counted token, over the global batch
    grad_norm: float  # of all gradients, before clipping
    learning_rate: float
    tokens: int  # of the global batch
    seconds: float
    micro_batch: int  # rows per forward pass
    skipped: bool  # the weights were not updated: no finite gradient, or a spike
    spike: str | None  # what is unusual about the loss or the norm
    batch: int  # its number, from 0; another than the step's after a rollback


@dataclass
class Trainer:
    """A model, its objective, optimizers and batches, with the settings of a training step."""

    model: GPT
    optimizers: list[Optimizer]
    batches: Batches
    settings: TrainingSettings
    device: torch.device
    dtype: str
    micro_batch: int  # rows; halved when the GPU runs out of memory
    scaler: torch.amp.GradScaler
    compiled: Compiled = "no"
    # Whether dropout is drawn for each row of the global batch, whatever process computes it; else
    # each process draws from PyTorch's generator.
    dropout_by_row: bool = True
    objective: Objective = field(default_factory=CountedTargets)
    recent: Recent | None = None  # what spikes are told by; None where nothing is a spike
    rollbacks: Sequence[Rollback] = ()  # of the run so far
    sharded: bool = False  # the model is, so that all processes must make equally many passes

    def __post_init__(self) -> None:
        self.compile(self.compiled)
        self.update: CompiledUpdate | None = None  # clips the gradients
        self.done = 0  # steps before the one that is computed
        # Those that learn; finding them takes 30 microseconds.
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.sums: GradientSums | None = None
        if world_size() > 1 and not self.sharded:  # else the backward pass sums
            self.sums = GradientSums(self.parameters)
        self.computing_gradient = False  # in a step, whose weights are not changed yet
        self.ready: dict[int, tuple[Tensor, ...]] = {}  # the next step's batch, loaded ahead

    def compile(self, mode: Compiled) -> None:
        """Turn torch.compile on or off for the loss."""
        self.compiled, loss = mode, partial(self.objective.loss, self.model)
        self.loss: Callable[..., Tensor] = loss
        if mode != "no":
            keep_compiled_code()
            self.loss = torch.compile(self.loss, mode=None if mode == "yes" else mode)

    def gradient(self, *batch: Tensor) -> Tensor:
        """Accumulate the gradient of the global batch's mean loss; return that loss.

        (R, ...) each -> (). All that is counted weighs the same, however the rows are divided into
        micro-batches and processes: each micro-batch's mean loss is weighted by its share of what
        the global batch counts, and dropout is drawn for each row of the global batch. If any
        process runs out of memory, OutOfMemoryError in all of them.
        """
        self.forget_gradients()
        if self.sharded:
            return self.sharded_gradient(*batch)
        counted = sum_over_processes(self.objective.counted(*batch)).clamp(min=1)
        loss, failed = torch.zeros((), device=self.device), False
        try:
            loss = self.gradient_of_rows(counted, *batch)
        except torch.OutOfMemoryError:
            if self.sums is None:
                raise
            failed = True
        if self.sums is None:
            return loss
        if failed:  # not in the handler, where the error's traceback keeps tensors alive
            self.forget_gradients()
        self.sums.finish()
        loss, failures = sum_over_processes(torch.stack((loss, loss.new_tensor(failed))))
        if failures:  # this waits for the GPU
            raise torch.OutOfMemoryError
        return loss

    def sharded_gradient(self, *batch: Tensor) -> Tensor:
        """Compute `gradient` where each backward pass sums the gradients into the shards.

        A process that runs out of memory misses a sum, so that nothing can be repeated.
        """
        counted = sum_over_processes(self.objective.counted(*batch)).clamp(min=1)
        try:
            with noticing_loss():
                loss = self.gradient_of_rows(counted, *batch)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"the GPU's memory is too small for micro-batches of {self.micro_batch} rows: give "
                "a smaller --micro-batch or --recompute yes (sharded, it is not halved by itself)"
            ) from None
        return sum_over_processes(loss)

    def gradient_of_rows(self, counted: Tensor, *batch: Tensor) -> Tensor:
        """Accumulate the part of `gradient` that this process's rows have, and of the loss.

        (), (R, ...) each -> ()
        """
        total = torch.zeros((), device=self.device)
        parts = *batch, *self.seeds(len(batch[0]))
        micros = list(zip(*(part.split(self.micro_batch) for part in parts), strict=True))
        own = len(micros)
        if self.sharded:  # a process with fewer passes repeats a row, which does not count
            micros += [tuple(part[:1] for part in parts)] * (most_of_processes(own) - own)
        for number, micro in enumerate(micros, start=1):
            if self.compiled == "max-autotune":  # its CUDA graphs reuse the memory of the last pass
                torch.compiler.cudagraph_mark_step_begin()
            with autocast(self.device, self.dtype):
                loss = self.loss(*micro)
            loss = loss * (self.objective.counted(*micro) / counted if number <= own else 0.0)
            if self.sums is not None and number == len(micros):
                self.sums.last_pass()
            self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def seeds(self, rows: int) -> tuple[Tensor, ...]:
        """Return dropout's seeds for the first of this process's rows.  -> (R, P), or nothing

        PyTorch's generator is seeded instead where it draws the masks. No generator's state has to
        be saved for a resume, and evaluating or sampling between two steps does not change them.
        """
        config, lora, seed = self.model.config, self.model.lora, self.settings.seed
        if not (config.dropout or (lora and lora.dropout)):
            return ()
        if not self.dropout_by_row:
            seed_device(self.device, step_seed(seed, self.done, self.batches.rank))
            return ()
        mine = torch.from_numpy(self.batches.mine[:rows])
        return (dropout_seeds(seed, self.done, mine, config.n_layer).to(self.device),)

    @property
    def dropout_from(self) -> str:
        """What a checkpoint calls the way in which dropout is drawn."""
        return "rows" if self.dropout_by_row else "processes"

    def forget_gradients(self) -> None:
        """Free the gradients, so that the next backward pass need not add to them."""
        for parameter in self.parameters:
            parameter.grad = None

    def gradient_in_memory(self, *batch: Tensor) -> Tensor:
        """Compute `gradient`, halving the micro-batch as often as a GPU runs out of memory."""
        while True:
            try:
                return self.gradient(*batch)
            except torch.OutOfMemoryError:
                if self.micro_batch == 1:
                    raise ValueError(
                        "one row of the batch does not fit the GPU's memory: "
                        "use a smaller context_length or model"
                    ) from None
                self.micro_batch = math.ceil(self.micro_batch / 2)
            # Not in the handler, where the error's traceback keeps the pass's tensors alive.
            self.forget_gradients()
            torch.cuda.empty_cache()

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return this process's part of a step's batch, from 0.  -> (R, ...) each"""
        return self.ready.pop(step, None) or self.load(step)

    def load(self, step: int) -> tuple[Tensor, ...]:
        """Read a batch and start copying it to the device.  -> (R, ...) each"""
        numbered = batch_number(step, self.rollbacks)
        parts = [torch.from_numpy(array) for array in self.batches.at(numbered)]
        if self.device.type == "cuda":  # copies from pinned memory are asynchronous
            parts = [part.pin_memory() for part in parts]
        return tuple(part.to(self.device, non_blocking=True) for part in parts)

    def update_by(self, compiled: CompiledUpdate | None) -> None:
        """Clip gradients and update weights in C++ from now on, or, with None, by PyTorch."""
        self.update = compiled
        for optimizer in self.optimizers:
            optimizer.compiled = compiled

    def clip(self) -> Tensor:
        """Scale the gradients to the norm grad_clip if theirs is larger.  -> (), their norm"""
        if self.sharded:
            return sharding.clip(self.parameters, self.settings.grad_clip or math.inf)
        clip = torch.nn.utils.clip_grad_norm_ if self.update is None else self.update.clip
        return clip(self.parameters, self.settings.grad_clip or math.inf)

    def step(self, done: int) -> StepReport:
        """Run the step that follows `done` steps: forward, backward, clip, update."""
        started = time.perf_counter()
        rate = learning_rate(done, self.settings) * rate_factor(done, self.rollbacks)
        for group in chain.from_iterable(each.param_groups for each in self.optimizers):
            group["lr"] = rate * group["times"]
        self.done, self.computing_gradient = done, True
        loss = self.gradient_in_memory(*self.batch(done))
        self.computing_gradient = False
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)  # type: ignore[arg-type]
        norm = self.clip()
        if done + 1 < self.settings.steps:  # load the next batch while the GPU is still busy
            self.ready[done + 1] = self.load(done + 1)
        numbers = torch.stack((loss, norm)).tolist()  # a single process's only wait for the GPU
        # Of values that are summed over the processes, so that all come to the same decision.
        skipped, spike = not all(map(math.isfinite, numbers)), None
        if self.recent is not None and not skipped:
            spike = self.recent.spike(*numbers)
            skipped = spike is not None and self.settings.on_spike is not None
        if not skipped:
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)  # type: ignore[arg-type]
            if self.recent is not None:
                self.recent.add(*numbers)
        self.scaler.update()
        number = batch_number(done, self.rollbacks)
        return StepReport(
            step=done + 1,
            loss=numbers[0],
            grad_norm=numbers[1],
            learning_rate=rate,
            tokens=self.batches.tokens(number),
            seconds=time.perf_counter() - started,
            micro_batch=self.micro_batch,
            skipped=skipped,
            spike=spike,
            batch=number,
        )


def step_seed(seed: int, done: int, rank: int) -> int:
    """Return the seed of a process's random numbers in a step."""
    return int(np.random.SeedSequence((seed, done, rank)).generate_state(1, np.uint64)[0])


def steps(trainer: Trainer, done: int) -> Iterator[StepReport]:
    """Run the steps that follow the first `done`, yielding a report for each.

    DivergedError when MOST_SKIPPED steps in a row had no finite loss or gradient, or were spikes
    that were skipped; SpikeError for a spike that is to stop the run or to take it back, and for a
    run that diverged where spikes take it back.
    """
    skipped_in_a_row, policy = 0, trainer.settings.on_spike
    trainer.model.train()
    while done < trainer.settings.steps:
        report = trainer.step(done)
        if report.spike is not None and policy in ("stop", "rollback"):
            raise SpikeError(report.step, report.spike)
        done = report.step
        yield report
        skipped_in_a_row = skipped_in_a_row + 1 if report.skipped else 0
        if skipped_in_a_row >= MOST_SKIPPED[trainer.dtype]:
            problem = (
                f"the loss or gradient was {'not finite' if report.spike is None else 'a spike'} "
                f"for {skipped_in_a_row} steps in a row "
                f"(learning rate {report.learning_rate:.3g})"
            )
            if policy == "rollback":
                raise SpikeError(done, problem)
            raise DivergedError(f"step {done}: {problem}")
