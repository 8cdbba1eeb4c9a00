"""The processes that share one run's work, and what they add up.

Knows nothing of models; one process alone needs none of this and pays nothing for it.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import environment

Item = TypeVar("Item")


# -- many processes


def join_processes(device: torch.device) -> None:
    """Meet the other processes that `torchrun` started, if any."""
    if environment.world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave_processes() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def my_share(items: Iterable[Item]) -> Iterator[Item]:
    """Of work that every process lists in the same order, the items that this one does."""
    if not dist.is_initialized():
        return iter(items)
    return islice(items, dist.get_rank(), None, dist.get_world_size())


def sum_over_processes(tensor: Tensor) -> Tensor:
    """The sum of every process's tensor, in place; the same shape."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def sum_of_numbers(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sums over all processes of a few numbers, in float64."""
    if not dist.is_initialized():
        return list(numbers)
    return sum_over_processes(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process: the same answer in all."""
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(sum_over_processes(torch.tensor(int(flag), device=device)))


def wait_for_processes() -> None:
    """Return once every process is here."""
    if dist.is_initialized():
        dist.barrier()
