"""The processes of one run (data parallelism): joining, dividing work, and sums over all of them.

Knows nothing of models. In a single process, none of this does anything.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import environment

Item = TypeVar("Item")


def join_processes(device: torch.device) -> None:
    """Join the process group, if `torchrun` started several processes."""
    if environment.world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave_processes() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def my_share(items: Iterable[Item]) -> Iterator[Item]:
    """Return this process's share of items that all processes list in the same order."""
    if not dist.is_initialized():
        return iter(items)
    return islice(items, dist.get_rank(), None, dist.get_world_size())


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor of any shape over all processes, in place; return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_of_numbers(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Sum each number over all processes, in float64."""
    if not dist.is_initialized():
        return list(numbers)
    return sum_over_processes(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all get the same answer."""
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(sum_over_processes(torch.tensor(int(flag), device=device)))


def from_first_process(value: Item) -> Item:
    """Return the first process's value in all of them; it must be made of JSON's types."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def wait_for_processes() -> None:
    """Wait until all processes have called this."""
    if dist.is_initialized():
        dist.barrier()
