"""What a run will do and cost, said before its first step.

The time is measured on this machine, the memory estimated; nothing of the run is changed.
"""

import time

import torch

from .. import accounting, devices
from ..runtime import world_size
from .loop import Trainer
from .progress import duration, size
from .run import Run


def show_plan(run: Run) -> None:
    """Say what will happen, before the first step."""
    settings, trainer = run.settings, run.trainer
    config, machine, training = settings.model, settings.machine, settings.training
    assert machine.micro_batch is not None
    tokens = training.steps * training.batch_tokens
    held_out = run.dataset.validation
    memory = accounting.training_memory(config, machine.micro_batch)
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
        "memory": f"about {size(memory)}",
        "time": f"about {duration(left * step_seconds(trainer))} for {left:,} steps",
        "run": str(run.folder),
    }
    title = "Resuming" if run.done else "Training"
    run.display.table(title, rows)


def step_seconds(trainer: Trainer) -> float:
    """Seconds that a step should take, by doing one micro-batch of the first twice.

    Leaves no trace: the gradient is discarded, and each step seeds its own randomness.
    """
    mine = len(trainer.batches.mine)
    tokens, targets = (
        torch.from_numpy(part[: trainer.micro_batch]).to(trainer.device)
        for part in trainer.batches.at(0)
    )
    trainer.model.train()
    for _ in range(2):  # the first pays for what is only set up once
        started = time.perf_counter()
        trainer.gradient_in_memory(tokens, targets)
        devices.synchronize(trainer.device)
    trainer.optimizer.zero_grad(set_to_none=True)
    return (time.perf_counter() - started) * -(-mine // trainer.micro_batch)
