"""Fully sharded training (FSDP): each process keeps its rows of every weight, gradient and state.

PyTorch's `fully_shard` gathers the weights of a block when it computes with them, and sums the
gradients into the shards. Each pass gathers with all processes, so all must make equally many. This
file has everything that only sharded training needs. Knows nothing of steps or runs.

Shapes:  N processes    R rows of a matrix    C columns
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ..machine.environment import rank, return_freed_memory, world_size
from ..machine.processes import (
    any_process,
    exchange,
    noticing_loss,
    number_from_first,
    sum_over_processes,
)
from ..model.gpt import GPT

Gather = Callable[[Tensor], Tensor]  # returns a tensor whole


def shard(model: GPT, device: torch.device) -> None:
    """Divide a model over the processes, block by block, and move it to the device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if device.type == "cpu":
        return_freed_memory()
    mesh = init_device_mesh(device.type, (world_size(),))
    parts: list[Any] = [*model.h, model]
    for part in parts:
        sharded: Any = fully_shard(part, mesh=mesh)
        # Each process weighs its loss by its share of the counted tokens, so that sums are right.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    # The backward pass gathers a block while it computes the one after. Left to itself, it would
    # follow the order of all passes since the last one, in which processes differ (see `in_step`).
    for part, before in zip(parts, [model, *model.h], strict=True):
        part.set_modules_to_backward_prefetch([before])
    # Every pass goes through it once, whether it is for logits, a loss or the next token. What lies
    # outside the blocks stays whole until the backward pass, or until `in_step` is left.
    register_fsdp_forward_method(model, "features")


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a sharded tensor, or the whole of another, of any shape.

    They are no copy. Call it without recording gradients.
    """
    return tensor.to_local() if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> TypeGuard[Any]:
    """Whether a tensor of any shape is sharded: a DTensor, whose class is slow to import."""
    return hasattr(tensor, "to_local")


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor of any shape, sharded as a parameter of the same shape is."""
    sharded = torch.zeros_like(parameter, requires_grad=False)
    mine = local(sharded)
    mine.copy_(tensor[rank() * shard_rows(len(tensor)) :][: len(mine)])
    return sharded


def shard_rows(rows: int) -> int:
    """Return the rows of each process but the last ones, which may have fewer or none."""
    return -(-rows // world_size())


def clip(parameters: Sequence[Tensor], most: float) -> Tensor:
    """Clip sharded gradients of any shapes to a norm; return their norm before.  -> ()"""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    square = torch.nn.utils.get_total_norm(gradients).square()
    norm = sum_over_processes(square).sqrt()
    torch._foreach_mul_(gradients, (most / (norm + 1e-6)).clamp(max=1.0))
    return norm


def of_whole_matrices(
    shards: Sequence[Tensor], rows: Sequence[int], work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply `work`, (R, C) -> (R, C), to sharded matrices; return this process's rows of each.

    `rows` are those of the whole matrices, which all have C columns. Of every N matrices, each
    process gathers one, and sends the others their rows of the result.
    """
    results, N, mine = list[Tensor](), world_size(), rank()
    for start in range(0, len(shards), N):
        some, R = shards[start : start + N], rows[start : start + N]
        sent = some[0].new_zeros(N, shard_rows(max(R)), some[0].shape[1])  # row k is for process k
        for part, rows_here in zip(sent, some, strict=False):
            part[: len(rows_here)] = rows_here
        received = exchange(sent)
        if mine < len(some):
            parts = received[:, : shard_rows(R[mine])]  # of my matrix, by process
            result = torch.zeros_like(parts).flatten(0, 1)
            result[: R[mine]] = work(parts.flatten(0, 1)[: R[mine]])
            parts.copy_(result.view_as(parts))
        results += [
            part[: len(rows_here)]
            for part, rows_here in zip(exchange(received), some, strict=False)
        ]
    return results


@contextmanager
def in_step(model: GPT, sharded: bool) -> Iterator[None]:
    """Let each process make as many passes as it likes, without gradients, and the model evaluate.

    Before a pass, a process says so to all. One that has left makes passes of a single token until
    no other needs them.
    """
    was_training = model.training
    model.eval()
    if not sharded:
        yield
        model.train(was_training)
        return
    of_training, features = model.features, partial(type(model).features, model)

    def announced(*inputs: Any, **more: Any) -> Tensor:
        any_process(True)
        return features(*inputs, **more)

    sharded_model: Any = model
    with noticing_loss(), torch.inference_mode():
        sharded_model.unshard()  # what lies outside the blocks
        sharded_model.features = announced
        try:
            yield
        finally:
            sharded_model.features = of_training
        while any_process(False):
            features(torch.zeros(1, 1, dtype=torch.long, device=model.device))
        sharded_model.reshard()
    model.train(was_training)


@torch.no_grad()
def gather_for_first(tensors: Sequence[Tensor], write: Callable[[Gather], None]) -> None:
    """Let the first process `write` with a function that returns one of the tensors, sharded or
    not and of any shapes, whole; all gather it together, and none keeps it."""
    if rank():
        while (number := number_from_first(0)) >= 0:
            whole(tensors[number])
        return
    numbers = {tensor: number for number, tensor in enumerate(tensors)}

    def gather(tensor: Tensor) -> Tensor:
        number_from_first(numbers[tensor])
        return whole(tensor)

    write(gather)
    number_from_first(-1)


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor, of any shape, whole in all processes; another as it is."""
    with noticing_loss():
        return tensor.full_tensor() if is_sharded(tensor) else tensor.detach()
