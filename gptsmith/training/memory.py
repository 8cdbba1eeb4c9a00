"""What training needs of a device's memory: how many rows fit, and what makes more of them fit.

Estimates by `config/cost.py` and `config/fitting.py`. Knows nothing of how a step works.
"""

from collections.abc import Container
from dataclasses import replace
from typing import NamedTuple

import torch

from ..config.fields import SettingError
from ..config.fitting import MEMORY_SHARE, Devices, Way, memory_parts
from ..config.model import GPTConfig
from ..config.settings import MachineSettings
from ..machine import devices
from ..machine.dtypes import number_bytes
from ..machine.environment import world_size
from ..machine.processes import any_process
from ..machine.terminal import size
from ..model.gpt import GPT

CPU_MICRO_BATCH = 16_384  # tokens; larger ones exceed the CPU's caches and are slower


def learned_in(model: GPT) -> int:
    """Return how many parameters of a model learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def all_learn(model: GPT) -> bool:
    """Whether all parameters of a model learn."""
    return all(parameter.requires_grad for parameter in model.parameters())


def micro_batch_rows(
    machine: MachineSettings,
    config: GPTConfig,
    rows: int,
    device: torch.device,
    learned: int | None = None,
) -> int:
    """Return the rows of a micro-batch: as set, or the most that should fit; `rows` of a batch.

    The context_length of `config` is that of the rows; `learned` parameters learn (default: all).
    """
    own_rows = -(-rows // world_size())
    if machine.micro_batch is not None:
        return min(machine.micro_batch, own_rows)
    chosen, room = own_rows, memory_room(device)
    if device.type == "cpu":
        chosen = min(own_rows, max(1, CPU_MICRO_BATCH // config.context_length))
    while chosen > 1 and needed_memory(machine, config, chosen, learned) > room:
        chosen = -(-chosen // 2)
    return chosen


def needed_memory(
    machine: MachineSettings, config: GPTConfig, rows: int, learned: int | None = None
) -> int:
    """Return the bytes that a step with micro-batches of `rows` needs in this process."""
    return sum(needed_parts(machine, config, rows, learned).values())


def needed_parts(
    machine: MachineSettings, config: GPTConfig, rows: int, learned: int | None = None
) -> dict[str, int]:
    """Return the same by part, as `config/fitting.py` names them.

    `machine` says whether the model is sharded, whether activations are recomputed and how a pass
    is computed; `learned` parameters learn (default: all).
    """
    narrow = number_bytes("bf16" if machine.dtype == "auto" else machine.dtype) == 2
    devices_of_run = Devices(count=world_size(), dtype="bf16" if narrow else "float32")
    way = Way(
        sharded=machine.shard == "yes",
        recomputed=machine.recompute == "yes",
        fused=machine.fused == "yes",
        # Dropout by seeds does so too; a GPU's own attention drops weights without keeping them.
        blocks=machine.attention == "blocks" or config.dropout > 0,
    )
    return memory_parts(config, rows, devices_of_run, way, learned)


def memory_room(device: torch.device) -> float:
    """Return the bytes of free memory that training may take in this process."""
    processes = world_size() if device.type == "cpu" else 1  # which share the memory
    return MEMORY_SHARE * devices.available_memory(device) / processes


def choose_recompute(
    machine: MachineSettings, config: GPTConfig, device: torch.device, learned: int | None = None
) -> MachineSettings:
    """Return the settings with `recompute` "yes" or "no"; "auto" is "yes" where not even one
    row of `config.context_length` tokens would fit without.

    `learned` parameters learn (default: all). Fewer rows at once cost less time than recomputing.
    """
    if machine.recompute != "auto":
        return machine
    kept = replace(machine, recompute="no")
    too_much = any_process(needed_memory(kept, config, 1, learned) > memory_room(device))
    return replace(machine, recompute="yes" if too_much else "no")


class Sharding(NamedTuple):
    """Whether a run's weights, gradients and optimizer state are divided over its processes."""

    on: bool
    reason: str


def choose_sharding(
    machine: MachineSettings,
    config: GPTConfig,
    device: torch.device,
    chosen: Container[str] | None,
    *,
    frozen: bool = False,
) -> Sharding:
    """Return whether to shard a model: as `shard` says or, for "auto", where not even one row would
    fit each device beside the whole state, with activations recomputed if they may be.

    SettingError where it is "yes" and cannot be. `chosen` are the settings given for a run that is
    resumed, as others were chosen for other processes; None for a fresh run. Of a `frozen` model,
    only a part learns.
    """

    def given(name: str) -> bool:
        return chosen is None or name in chosen

    against = obstacle(machine, device, given("compile"), given("fused"))
    if frozen:
        against = "weights that do not learn, as with --lora or --freeze"
    if machine.shard == "yes" and world_size() == 1 and given("shard"):
        raise SettingError(
            "shard", "is yes, but there is one process: start several with torchrun, or take auto"
        )
    if machine.shard == "yes" and against:
        raise SettingError(
            "shard", f"is yes, which cannot go with {against}: leave out one of both"
        )
    if world_size() == 1:
        return Sharding(False, "there is one process")
    if machine.shard != "auto":
        return Sharding(machine.shard == "yes", "as asked for")
    if against:
        return Sharding(False, f"it cannot go with {against}")
    least = machine if machine.recompute == "no" else replace(machine, recompute="yes")
    needed = needed_memory(replace(least, shard="no"), config, 1)
    too_much, room = any_process(needed > memory_room(device)), size(memory_room(device))
    which = "more than" if too_much else "of"
    reason = f"whole, it needs at least {size(needed)} in each process, {which} the {room} for it"
    return Sharding(too_much, reason)


def obstacle(
    machine: MachineSettings, device: torch.device, compile: bool, fused: bool
) -> str | None:
    """Return what a sharded model cannot go with; `compile` and `fused` say whether these settings
    are given."""
    if machine.dtype in ("fp16", "fp8"):
        return f"dtype {machine.dtype}"
    if compile and machine.compile in ("yes", "max-autotune"):
        return f"compile {machine.compile}"
    if fused and machine.fused == "yes":
        return "fused yes"
    return None if device.type in ("cpu", "cuda") else f"device {device.type}"
