"""What would quietly spoil a run: refused or warned of before its first step.

A warning where the run still makes sense, an error where it cannot. Knows nothing of how a run
trains.
"""

import warnings
from collections.abc import Iterator

import psutil
import torch

from ..config import cost
from ..config.fields import SettingError
from ..config.lora import learned_count
from ..config.settings import RunSettings, TrainingSettings
from ..data.shards import Dataset
from ..machine import devices
from ..machine.environment import rank, world_size
from ..machine.terminal import count, size
from .memory import needed_memory
from .schedules import learning_rate

# Validation tokens below which the loss is known to a tenth of a nat at best: the loss of a token
# varies by about three nats.
FEW_TOKENS = 1000


def check_run(settings: RunSettings, dataset: Dataset, *, own_data: bool) -> None:
    """Raise ValueError or warn of what would spoil a run that has not begun.

    `own_data` says that the run prepared its data itself, with its own settings.
    """
    check_rates(settings.training)
    if rank() == 0:
        for doubt in (*doubts_of_warmup(settings.training), *doubts_of_split(dataset, own_data)):
            warnings.warn(doubt, stacklevel=2)


def check_rates(training: TrainingSettings) -> None:
    """Raise SettingError if the learning rate would rise where it should decay."""
    lowest, peak = training.min_learning_rate, training.learning_rate
    if lowest is not None and lowest > peak and training.schedule != "constant":
        raise SettingError(
            "min_learning_rate", f"is {lowest}, above the peak learning rate {peak}: lower it"
        )


def doubts_of_warmup(training: TrainingSettings) -> Iterator[str]:
    """Yield a warning if the warmup takes the whole run."""
    if training.warmup_steps >= training.steps:
        last, peak = learning_rate(training.steps - 1, training), training.learning_rate
        yield (
            f"the warmup of {count(training.warmup_steps, 'step')} takes the whole run of "
            f"{count(training.steps, 'step')}, which ends at a learning rate of {last:.2g} instead "
            f"of rising to {peak:.2g} and decaying: use --warmup-steps {training.steps // 10}"
        )


def doubts_of_split(dataset: Dataset, own_data: bool) -> Iterator[str]:
    """Yield warnings if the validation split is very small, or not the share that was asked for."""
    if dataset.validation is None:
        return
    held_out, all_tokens = len(dataset.validation), len(dataset.validation) + len(dataset.train)
    share, again = held_out / all_tokens, "" if own_data else "prepare the text again and "
    asked = dataset.info.get("split", {}).get("fraction")
    if asked and not asked / 2 <= share <= 2 * asked:
        yield (
            f"{share:.1%} of the tokens are held out for validation, but {asked:.1%} were asked "
            f"for, as there are few documents or very different ones: {again}join them in one text "
            "file, whose end is then held out"
        )
    if held_out < FEW_TOKENS:
        more = "use more text"
        if all_tokens >= 2 * FEW_TOKENS:
            more = f"use --validation-fraction {1.1 * FEW_TOKENS / all_tokens:.2g}"
        yield (
            f"only {count(held_out, 'token')} are held out for validation, so that its loss says "
            f"little: {again}{more}"
        )


def check_memory(settings: RunSettings, device: torch.device) -> None:
    """Raise ValueError or warn if what training adds to the weights exceeds the free memory.

    Gradients and at least one number of the optimizer's for each weight are certain; AdamW's second
    one and the activations are an estimate. On a GPU the micro-batch is reduced as needed.
    """
    config, machine = settings.model, settings.machine
    assert machine.micro_batch is not None
    shards, on_cpu = world_size() if machine.shard == "yes" else 1, device.type == "cpu"
    learned = learned_count(config, settings.finetune)  # the others have neither of both
    certain = 2 * learned * cost.FLOAT32 // shards
    free, swap = devices.available_memory(device), psutil.swap_memory().free if on_cpu else 0
    processes = world_size() if on_cpu else 1  # which share the memory
    if certain * processes > free + swap:
        raise ValueError(
            f"training {learned:,} parameters needs {size(certain)} for "
            f"gradients and the optimizer, but {size(free / processes)} are free: use a smaller "
            "model"
        )
    rows = machine.micro_batch if on_cpu else 1
    weights = cost.weight_bytes(config) // shards

    def needed(rows: int) -> int:
        return (needed_memory(machine, config, rows, learned) - weights) * processes

    if needed(rows) > free and rank() == 0:
        fits = next((fewer for fewer in range(rows - 1, 0, -1) if needed(fewer) <= free), 0)
        smaller = f"--micro-batch {fits} or a smaller model" if fits else "a smaller model"
        warnings.warn(
            f"training needs about {size(needed(rows))} more memory, but {size(free)} are free: "
            f"the machine may become slow or end the run; use {smaller}",
            stacklevel=2,
        )
