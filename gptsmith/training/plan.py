"""What a run will do and cost, said before its first step.

The time is measured on this machine, the memory estimated; nothing of the run is changed.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from ..config import cost
from ..machine import devices
from ..machine.dtypes import number_bytes
from ..machine.environment import world_size
from ..machine.processes import sum_of_numbers
from ..machine.terminal import Display, duration, size
from .loop import Trainer
from .run import Run

LEAST_TRIALS, MOST_TRIALS = 2, 8
# Seconds of a run, by device, from which compiling for half a minute may repay itself: a GPU saves
# a third of a step, a CPU little where matrix products are large and a sixth where they are small.
WORTH_COMPILING = {"cuda": 120.0, "cpu": 600.0}
FASTER = 0.95  # of the eager time; less is not worth another way of rounding


@dataclass(frozen=True)
class Trial:
    """Seconds that a step should take, by its two parts."""

    gradient: float  # forward and backward of this process's rows
    update: float  # clipping, and the optimizers

    @property
    def step(self) -> float:
        """Seconds of a whole step."""
        return self.gradient + self.update


def show_plan(run: Run, trial: Trial) -> None:
    """Say what will happen, before the first step."""
    settings, trainer = run.settings, run.trainer
    config, machine, training = settings.model, settings.machine, settings.training
    assert machine.micro_batch is not None
    tokens = training.steps * training.batch_tokens
    held_out = run.dataset.validation
    bytes_each = number_bytes(machine.dtype)
    memory = cost.training_memory(config, machine.micro_batch, dtype_bytes=bytes_each)
    left = training.steps - run.done
    rows = {
        "model": f"{cost.parameter_count(config):,} parameters: {config.n_layer} layers, "
        f"{config.n_head} heads, {config.n_embd} channels, context {config.context_length}, "
        f"vocabulary {config.vocab_size:,}",
        "data": f"{len(run.dataset.train):,} tokens to learn from, "
        + (f"{len(held_out):,} held out" if held_out is not None else "none held out"),
        "steps": f"{training.steps:,} of {training.batch_tokens:,} tokens: {tokens:,} in all, "
        f"{tokens / len(run.dataset.train):.1f} times the text"
        + (f"; {run.done:,} are done" if run.done else ""),
        "machine": f"{trainer.device}, {machine.dtype}, {machine.threads} threads, "
        f"micro-batch of {machine.micro_batch} rows"
        + ("" if machine.compile == "no" else ", compiled")
        + (f", {world_size()} processes" if world_size() > 1 else ""),
        "memory": f"about {size(memory)} on the device, besides PyTorch itself",
        "time": f"about {duration(run_seconds(run, trial))} for {left:,} steps",
        "run": str(run.folder),
    }
    title = "Resuming" if run.done else "Training"
    run.display.table(title, rows)


def try_out(trainer: Trainer, display: Display) -> Trial:
    """How long a step should take, by doing the parts of the first a few times.

    Leaves no trace: gradients and updates are discarded, and each step seeds its own randomness.
    To be called before the optimizers are given the state of a run. What cannot work shows here: a
    micro-batch too large for the GPU is halved, and where torch.compile fails (as without a C++
    compiler) the run goes on without it, which is said.
    """
    mine = len(trainer.batches.mine)
    tokens, targets = (part[: trainer.micro_batch] for part in trainer.load(0))
    trainer.model.train()
    if trainer.compiled != "no":
        try:
            trainer.gradient_in_memory(tokens, targets)
        except Exception as error:  # the compiler's errors have no common class of their own
            trainer.compile("no")
            display.say(f"torch.compile failed, so the run is not compiled: {first_line(error)}")
    each = timed(lambda: trainer.gradient_in_memory(tokens, targets), trainer.device)
    update = timed(partial(dry_update, trainer), trainer.device)
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    trainer.forget_gradients()
    seconds = each * -(-mine // trainer.micro_batch), update
    together = sum_of_numbers(seconds, trainer.device)  # so that all decide alike
    return Trial(*(total / world_size() for total in together))


def dry_update(trainer: Trainer) -> None:
    """What a step does with its gradients, done to copies of the weights."""
    weights = list(trainer.model.parameters())
    kept = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.clone()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in trainer.optimizers:
        optimizer.step()
    for weight, data in zip(weights, kept, strict=True):
        weight.data = data


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that work takes: the median of a few times after a first, which sets things up."""
    seconds: list[float] = []
    # Processes that work together must do so equally often, whatever their clocks say.
    most = MOST_TRIALS if world_size() == 1 else LEAST_TRIALS
    while len(seconds) < LEAST_TRIALS or (sum(seconds) < 0.3 and len(seconds) < most):
        started = time.perf_counter()
        work()
        devices.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def compile_if_it_pays(trainer: Trainer, display: Display, left: int, eager: Trial) -> Trial:
    """Compile where the steps that are left take long enough, and it turns out faster.

    Returns the trial of what was chosen.
    """
    if eager.step * left < WORTH_COMPILING.get(trainer.device.type, math.inf):
        return eager
    display.say("trying torch.compile, as the run is long")
    trainer.compile("yes")
    compiled = try_out(trainer, display)
    if trainer.compiled == "yes" and compiled.step > FASTER * eager.step:
        trainer.compile("no")
    return compiled if trainer.compiled == "yes" else eager


def first_line(error: Exception) -> str:
    """What an error says, without its long explanation."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run_seconds(run: Run, trial: Trial) -> float:
    """Seconds that the rest of a run should take: its steps, and its passes over the held-out text.

    A pass does a third of a step's work per token, as it has no backward.
    """
    settings, held_out = run.settings, run.dataset.validation
    tokens = 0 if held_out is None else len(held_out)
    if settings.report.evaluate_tokens is not None:
        tokens = min(tokens, settings.report.evaluate_tokens)
    left = settings.training.steps - run.done
    passes = -(-left // settings.report.evaluate_every)
    share = tokens / settings.training.batch_tokens
    return trial.step * left + trial.gradient / 3 * share * passes
