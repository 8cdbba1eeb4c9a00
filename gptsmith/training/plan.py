"""What a run will do and cost, said before its first step.

The time is measured on this machine, the memory estimated; nothing of the run is changed.
"""

import time

import torch

from .. import accounting, devices
from ..devices import number_bytes
from ..runtime import world_size
from .loop import Trainer
from .progress import Display, duration, size
from .run import Run

LEAST_TRIALS, MOST_TRIALS = 2, 5  # micro-batches, of which the fastest tells the time of a step


def show_plan(run: Run, step: float) -> None:
    """Say what will happen, before the first step, where each takes `step` seconds."""
    settings, trainer = run.settings, run.trainer
    config, machine, training = settings.model, settings.machine, settings.training
    assert machine.micro_batch is not None
    tokens = training.steps * training.batch_tokens
    held_out = run.dataset.validation
    bytes_each = number_bytes(machine.dtype)
    memory = accounting.training_memory(config, machine.micro_batch, dtype_bytes=bytes_each)
    left = training.steps - run.done
    rows = {
        "model": f"{accounting.parameter_count(config):,} parameters: {config.n_layer} layers, "
        f"{config.n_head} heads, {config.n_embd} channels, context {config.context_length}, "
        f"vocabulary {config.vocab_size:,}",
        "data": f"{len(run.dataset.train):,} tokens to learn from, "
        + (f"{len(held_out):,} held out" if held_out is not None else "none held out"),
        "steps": f"{training.steps:,} of {training.batch_tokens:,} tokens: {tokens:,} in all, "
        f"{tokens / len(run.dataset.train):.1f} times the text"
        + (f"; {run.done:,} are done" if run.done else ""),
        "machine": f"{trainer.device}, {machine.dtype}, {machine.threads} threads, "
        f"micro-batch of {machine.micro_batch} rows"
        + (", compiled" if machine.compile == "yes" else "")
        + (f", {world_size()} processes" if world_size() > 1 else ""),
        "memory": f"about {size(memory)} on the device, besides PyTorch itself",
        "time": f"about {duration(run_seconds(run, step))} for {left:,} steps",
        "run": str(run.folder),
    }
    title = "Resuming" if run.done else "Training"
    run.display.table(title, rows)


def try_out(trainer: Trainer, display: Display) -> float:
    """Seconds that a step should take, by doing one micro-batch of the first a few times.

    Leaves no trace: the gradient is discarded, and each step seeds its own randomness. What cannot
    work shows here: a micro-batch too large for the GPU is halved, and where torch.compile fails
    (as without a C++ compiler) the run goes on without it, which is said.
    """
    mine = len(trainer.batches.mine)
    tokens, targets = (
        torch.from_numpy(part[: trainer.micro_batch]).to(trainer.device)
        for part in trainer.batches.at(0)
    )
    trainer.model.train()
    if trainer.compiled:
        try:
            trainer.gradient_in_memory(tokens, targets)
        except Exception as error:  # the compiler's errors have no common class of their own
            trainer.stop_compiling()
            display.say(f"torch.compile failed, so the run is not compiled: {first_line(error)}")
    seconds: list[float] = []
    while len(seconds) < LEAST_TRIALS or (sum(seconds) < 0.5 and len(seconds) < MOST_TRIALS):
        started = time.perf_counter()
        trainer.gradient_in_memory(tokens, targets)
        devices.synchronize(trainer.device)
        seconds.append(time.perf_counter() - started)
    trainer.forget_gradients()
    # The first pays for what is set up only once, and others may share the machine: the least.
    return min(seconds) * -(-mine // trainer.micro_batch)


def first_line(error: Exception) -> str:
    """What an error says, without its long explanation."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run_seconds(run: Run, step: float) -> float:
    """Seconds that the rest of a run should take: its steps, and its passes over the held-out text.

    A pass does a third of a step's work per token, as it has no backward.
    """
    settings, held_out = run.settings, run.dataset.validation
    tokens = 0 if held_out is None else len(held_out)
    if settings.report.evaluate_tokens is not None:
        tokens = min(tokens, settings.report.evaluate_tokens)
    left = settings.training.steps - run.done
    passes = -(-left // settings.report.evaluate_every)
    return step * (left + passes * tokens / settings.training.batch_tokens / 3)
