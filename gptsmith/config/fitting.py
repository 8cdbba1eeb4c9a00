"""Does training fit N devices: the memory of each, the largest micro-batch, and what they exchange.

Divides the figures of cost.py over devices. Knows nothing of PyTorch or of a device that is there.

When sharded, each device keeps an N-th of the weights, gradients and AdamW's state, and gathers the
weights of a block when it computes with them (FSDP, fully sharded data parallelism).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from . import cost
from .model import GPTConfig
from .tables import columns, human_bytes

MEMORY_SHARE = 0.8  # of the free memory; the estimate is inexact, and others need some
DTYPE_BYTES = {"float32": cost.FLOAT32, "bf16": 2}


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Devices that train one model together, each on its own rows."""

    count: int
    memory: int | None = None  # bytes of each
    dtype: Literal["float32", "bf16"] = "bf16"  # of matrix products; the state is in float32


@dataclass(frozen=True, kw_only=True)
class Way:
    """How training computes, as far as its memory depends on it."""

    sharded: bool
    recomputed: bool  # each block's activations, in the backward pass
    fused: bool = False  # these two: see `cost.Pass`
    blocks: bool = False


def ways() -> Iterator[Way]:
    """Yield every way, as the columns of the table."""
    for sharded in (False, True):
        for recomputed in (False, True):
            yield Way(sharded=sharded, recomputed=recomputed)


def memory_parts(
    config: GPTConfig, micro_batch: int, devices: Devices, way: Way, learned: int | None = None
) -> dict[str, int]:
    """Return the bytes that a training step of full contexts needs on each device, by part.

    `learned` parameters (default: all) have gradients and state. On one device, the parts add up to
    `cost.training_memory`.
    """
    how = cost.Pass(
        dtype_bytes=DTYPE_BYTES[devices.dtype],
        recompute=way.recomputed,
        fused=way.fused,
        blocks=way.blocks,
    )
    weights, loss = cost.weight_bytes(config), cost.loss_bytes(config, micro_batch, how)
    learning = weights if learned is None else learned * cost.FLOAT32
    activations = cost.activation_bytes(config, micro_batch, how)
    whole = cost.training_memory(config, micro_batch, how, learned=learned)
    devices_of_one_copy = devices.count if way.sharded else 1
    share = -(-learning // devices_of_one_copy)
    return {
        "weights": -(-weights // devices_of_one_copy),
        "gradients": share,
        "optimizer": 2 * share,
        "gathered": gathered_bytes(config) if devices_of_one_copy > 1 else 0,
        "activations": activations - loss,
        "loss": loss,
        "fragmentation": whole - weights - 3 * learning - activations,
    }


def gathered_bytes(config: GPTConfig) -> int:
    """Bytes of what a sharded step has whole for a while, at most.

    The weights of the embedding, the final norm and the head with their gradients; the weights of
    the block that is computed, with their gradients, and of the next one, which is on its way.
    """
    block = cost.block_count(config) * cost.FLOAT32
    weights = cost.weight_bytes(config)
    outside = weights - config.n_layer * block
    return min(2 * weights, 2 * outside + 3 * block)


def largest_micro_batch(config: GPTConfig, devices: Devices, way: Way) -> int:
    """Return the most contexts that fit MEMORY_SHARE of a device's memory; 0 if none does."""
    assert devices.memory is not None
    room = MEMORY_SHARE * devices.memory

    def fits(rows: int) -> bool:
        return sum(memory_parts(config, rows, devices, way).values()) <= room

    beyond = 1
    while fits(beyond):
        beyond *= 2
    least = beyond // 2  # fits, and `beyond` does not
    while beyond - least > 1:
        middle = (least + beyond) // 2
        least, beyond = (middle, beyond) if fits(middle) else (least, middle)
    return least


def sent_bytes(config: GPTConfig, devices: Devices, way: Way) -> int:
    """Bytes that each device sends in a step of one micro-batch, in float32, over a ring.

    The sum of the gradients is 2 (N - 1) / N times as large as they are: the N-ths are added up
    from device to device, then handed around. Sharded, the weights are gathered twice, for the
    forward and the backward pass, and the gradients are added up alone: 3 (N - 1) / N.
    """
    times = 3 if way.sharded else 2
    return times * (devices.count - 1) * cost.weight_bytes(config) // devices.count


def devices_json(config: GPTConfig, devices: Devices) -> dict[str, Any]:
    """Return the memory of each device for one context, by way, in bytes."""
    found = []
    for way in ways():
        parts = memory_parts(config, 1, devices, way)
        found.append(
            {
                "sharded": way.sharded,
                "recomputed": way.recomputed,
                "memory": {**parts, "total": sum(parts.values())},
                "largest_micro_batch": None
                if devices.memory is None
                else largest_micro_batch(config, devices, way),
                "sent_per_step": sent_bytes(config, devices, way),
            }
        )
    return {
        "count": devices.count,
        "memory": devices.memory,
        "dtype": devices.dtype,
        "context_length": config.context_length,
        "ways": found,
    }


def devices_lines(config: GPTConfig, devices: Devices) -> list[str]:
    """Return the same as lines of the page, a column for each way."""
    found = devices_json(config, devices)["ways"]
    rows: list[tuple[str, ...]] = [
        ("", "whole", "whole, recomputed", "sharded", "sharded, recomputed")
    ]
    for part in found[0]["memory"]:
        rows.append((f"  {part}", *(human_bytes(way["memory"][part]) for way in found)))
    of_each, note = "", []
    if devices.memory is not None:
        of_each = f" with {human_bytes(devices.memory)} each"
        largest = (way["largest_micro_batch"] for way in found)
        rows.append(
            ("  largest micro-batch", *(f"{each:,}" if each else "none" for each in largest))
        )
        note = [f"  The largest micro-batch takes {MEMORY_SHARE:.0%} of the memory at most."]
    rows.append(("  sent per step", *(human_bytes(way["sent_per_step"]) for way in found)))
    title = f"DEVICES  {devices.count:,}{of_each}; training in {devices.dtype}"
    context = f"one context of {config.context_length:,} tokens on each"
    return [f"{title}, {context}", *columns(rows, "<>>>>"), *note]
