"""A trainer from a run's settings: how the batch is divided, and what the loop needs.

Knows nothing of a run's folder.
"""

import warnings
from dataclasses import replace

import torch

from ..config.fields import SettingError
from ..config.model import GPTConfig
from ..config.settings import MachineSettings, RunSettings, TrainingSettings
from ..machine.environment import world_size
from ..machine.native import open_library
from ..model import fused
from ..model.attention import WAYS
from ..model.gpt import GPT
from ..model.recompute import recompute_blocks
from . import sharding, update
from .loop import Trainer
from .muon import Muon
from .optimizers import make_optimizers
from .task import Batches, Objective


def batch_rows(settings: TrainingSettings, config: GPTConfig) -> int:
    """Return the rows of the global batch; ValueError where they are not whole or too few."""
    T, tokens = config.context_length, settings.batch_tokens
    if tokens % T:
        near = max(1, round(tokens / T)) * T
        raise SettingError(
            "batch_tokens", f"{tokens:,} is not a multiple of context_length {T}: try {near}"
        )
    rows = tokens // T
    if rows < world_size():
        raise SettingError(
            "batch_tokens",
            f"{tokens:,} is {rows} rows of {T} tokens, fewer than the {world_size()} processes: "
            f"raise it to at least {world_size() * T}",
        )
    return rows


def choose_fused(
    machine: MachineSettings, config: GPTConfig, device: torch.device
) -> MachineSettings:
    """Return the settings with `fused` "yes" or "no"; "auto" is "yes" where that is possible.

    SettingError where it is "yes" and cannot be. A warning says why "auto" does without a compiler.
    """
    if machine.fused == "no":
        return machine
    possible = device.type == "cpu" and not config.modern and machine.compile in ("auto", "no")
    if not possible and machine.fused == "yes":
        raise SettingError(
            "fused", "is yes, which needs GPT-2's block on a CPU without torch.compile: take no"
        )
    try:
        if possible:
            for source in (fused.SOURCE, update.SOURCE):
                open_library(source)
    except (ValueError, OSError) as error:
        if machine.fused == "yes":
            raise SettingError("fused", f"is yes, but {error}; go on with --fused no") from error
        warnings.warn(
            f"training does without its C++ pieces, which is slower: {error}", stacklevel=2
        )
        possible = False
    return replace(machine, fused="yes" if possible else "no")


def make_trainer(
    model: GPT,
    settings: RunSettings,
    batches: Batches,
    objective: Objective,
    device: torch.device,
) -> Trainer:
    """Return what the loop trains: a model, moved to its device or divided over the devices of all
    processes, by its batches and an objective."""
    machine = settings.machine
    assert machine.micro_batch is not None
    if machine.dtype == "fp8":
        if model.lora is not None:
            raise SettingError("dtype", "is fp8, in which adapters cannot learn: take bf16")
        multiply_in_float8(model)
    if machine.shard == "yes":
        sharding.shard(model, device)
    else:
        model.to(device)
    trainer = Trainer(
        model=model,
        optimizers=make_optimizers(model, settings.training),
        batches=batches,
        objective=objective,
        settings=settings.training,
        device=device,
        dtype=machine.dtype,
        micro_batch=machine.micro_batch,
        scaler=torch.amp.GradScaler(device.type, enabled=False),
        compiled="no" if machine.compile == "auto" else machine.compile,
        # On CUDA, the attention kernel's own dropout is faster.
        dropout_by_row=device.type != "cuda" or machine.deterministic,
        sharded=machine.shard == "yes",
    )
    use(trainer, machine)
    return trainer


def use(trainer: Trainer, machine: MachineSettings) -> None:
    """Let a trainer compute in the precision, pieces, attention and micro-batch of the settings.

    All must be chosen, and fp8 stays as `make_trainer` made it.
    """
    assert machine.micro_batch is not None
    trainer.model.attend_by(WAYS[machine.attention])
    if trainer.model.config.block == "gpt2" and not trainer.sharded:
        fused.fuse(trainer.model, open_library(fused.SOURCE) if machine.fused == "yes" else None)
    recompute_blocks(trainer.model, machine.recompute == "yes")
    bf16 = machine.dtype == "bf16"
    trainer.update_by(update.CompiledUpdate(bf16=bf16) if machine.fused == "yes" else None)
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, Muon):
            optimizer.exact = machine.dtype == "float32"
    trainer.dtype, trainer.micro_batch = machine.dtype, machine.micro_batch
    scaled = machine.dtype == "fp16"
    trainer.scaler = torch.amp.GradScaler(trainer.device.type, enabled=scaled)


def multiply_in_float8(model: GPT, *, emulate: bool = False) -> None:
    """Compute the matrix products of the blocks' linear layers in float8; the weights stay.

    Every product scales its two tensors by their current maxima (tensorwise, dynamic scaling). The
    head, whose loss is computed in chunks, stays in bf16. `emulate` runs on devices without float8,
    slowly. ImportError where torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError("dtype fp8 needs an extra: pip install 'gptsmith[fp8]'") from error
    convert_to_float8_training(model.h, config=Float8LinearConfig(emulate=emulate))
