"""The processes of one run (data parallelism): joining, dividing work, sums over all, failing.

What they have to agree on besides numbers goes through the store of `torchrun`, which is a small
table of keys and values. Knows nothing of models. In a single process, none of this does anything.
"""

import json
import math
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from . import environment
from .environment import AnotherProcessFailedError

Item = TypeVar("Item")
LOOK_EVERY = 0.02  # seconds, at a key of the store that is waited for


class LostProcessError(ConnectionError):
    """Another process of the run ended, or did not answer in time."""


# -- joining and leaving


@contextmanager
def joined_processes(device: torch.device, timeout: int) -> Iterator[None]:
    """Join the process group, if `torchrun` started several processes, and leave it at the end.

    A process that waits for the others for `timeout` seconds gives up. An error in any process ends
    all of them: the first one that fails raises its own, for all, and every other
    AnotherProcessFailedError. Neither is ended by SIGTERM while it says so and clears up.
    """
    environment.end_with_launcher()
    if environment.world_size() == 1 or dist.is_initialized():
        yield
        return
    with noticing_loss():
        join(device, timedelta(seconds=timeout))
    try:
        yield
    except Exception as error:
        with suppress(ValueError):  # in the main thread alone; torchrun ends all when one has ended
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not fails_first():
            raise AnotherProcessFailedError("another process of the run has failed") from error
        error.add_note(f"(in process {dist.get_rank()} of {dist.get_world_size()}, from 0)")
        raise
    finally:
        dist.destroy_process_group()


def join(device: torch.device, timeout: timedelta) -> None:
    """Join the process group of this start."""
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    start = PrefixStore(name_of_start(store, rank, world_size, timeout), store)
    has_nccl = device.type == "cuda" and dist.is_nccl_available()  # not on Windows
    backend = "nccl" if has_nccl else "gloo"
    dist.init_process_group(backend, store=start, rank=rank, world_size=world_size, timeout=timeout)


def name_of_start(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Return a name on which all processes of this start agree, and which no earlier start had.

    `torchrun` keeps its store when it starts the processes again. Under the same keys, they would
    find the addresses of processes that are dead. Its count of restarts is no name, because each
    machine counts its own. So the first process makes one up, and confirms it to each process that
    has read it: one that has read the name of an earlier start is not answered, and reads again.
    """
    mine = uuid4().hex
    if rank == 0:
        store.set("gptsmith/start", mine)
        for other in range(1, world_size):
            word = store.get(f"gptsmith/{mine}/{other}").decode()
            store.set(f"gptsmith/{mine}/{word}", "")
        return mine
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        name = store.get("gptsmith/start").decode()
        store.set(f"gptsmith/{name}/{rank}", mine)
        time.sleep(LOOK_EVERY)
        if store.check([f"gptsmith/{name}/{mine}"]):
            return name
    raise lost()


def fails_first() -> bool:
    """Whether no other process has failed before this one, so that this one says why."""
    mine = str(dist.get_rank())
    try:
        return group_store().compare_set("failed", "", mine).decode() == mine
    except RuntimeError:  # the store is gone, with the machine that has it
        return True


@contextmanager
def noticing_loss() -> Iterator[None]:
    """Raise LostProcessError where PyTorch cannot reach the other processes or the store."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise lost() from error


def lost() -> LostProcessError:
    """Return the error of a process that waits for others in vain."""
    return LostProcessError(
        "another process of the run ended or does not answer: torchrun starts all again, if "
        "--max-restarts lets it; or resume the run"
    )


def group_store() -> Store:
    """Return the part of the store that is of this start alone."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD.get_group_store()


# -- dividing work, and sums


def my_share(items: Iterable[Item]) -> Iterator[Item]:
    """Return this process's share of items that all processes list in the same order."""
    if not dist.is_initialized():
        return iter(items)
    return islice(items, dist.get_rank(), None, dist.get_world_size())


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Sum a tensor of any shape over all processes, in place; return it."""
    if dist.is_initialized():
        with noticing_loss():
            dist.all_reduce(tensor)
    return tensor


@dataclass(frozen=True)
class Pending:
    """What processes do with a tensor together, in the background; all begin it in one order."""

    work: dist.Work

    def wait(self) -> None:
        """Wait until the tensor has the result; on a GPU, let what follows wait."""
        with noticing_loss():
            self.work.wait()


def begin_sum(tensor: Tensor) -> Pending:
    """Begin to sum a tensor of any shape over all processes, in place."""
    with noticing_loss():
        work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    return Pending(work)


def begin_shares(items: Iterable[Sequence[Tensor]]) -> list[Pending]:
    """Begin to give all processes the tensors, of any shapes, that each one's `my_share` holds.

    They are received in place; nothing begins in a single process.
    """
    if not dist.is_initialized():
        return []
    with noticing_loss():
        works = [
            dist.broadcast(tensor, number % dist.get_world_size(), async_op=True)
            for number, tensors in enumerate(items)
            for tensor in tensors
        ]
    return [Pending(work) for work in works if work is not None]


def sum_of_numbers(numbers: Sequence[float], device: torch.device) -> list[float]:
    """Sum each number over all processes, in float64."""
    if not dist.is_initialized():
        return list(numbers)
    return sum_over_processes(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all get the same answer."""
    return most_of_processes(int(flag)) > 0


def most_of_processes(number: int) -> int:
    """Return the largest of the numbers that the processes have."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number, device=device_of_numbers())
    with noticing_loss():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


def number_from_first(number: int) -> int:
    """Return the first process's number in all of them."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number, device=device_of_numbers())
    with noticing_loss():
        dist.broadcast(tensor, 0)
        return int(tensor)


def device_of_numbers() -> str:
    """Return the kind of device on which the processes can exchange tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def exchange(tensor: Tensor) -> Tensor:
    """Send row k of a tensor to process k; return the rows received, by sender.  (N, ...)"""
    received = torch.empty_like(tensor)
    with noticing_loss():
        dist.all_to_all_single(received, tensor)
    return received


def from_first_process(value: Item) -> Item:
    """Return the first process's value in all of them; it must be made of JSON's types."""
    if not dist.is_initialized():
        return value
    store = group_store()
    with noticing_loss():
        number = store.add(f"asked/{dist.get_rank()}", 1)  # how often this process has asked
        if dist.get_rank() == 0:
            store.set(f"answer/{number}", json.dumps(value))
        return json.loads(store.get(f"answer/{number}"))


def wait_for_processes(*, for_hours: bool = False) -> None:
    """Wait until all processes have called this; `for_hours` is without the time-out, where one of
    them has much to do before."""
    if not dist.is_initialized():
        return
    store, world_size = group_store(), dist.get_world_size()
    timeout: timedelta = store.timeout  # type: ignore[attr-defined]
    end = math.inf if for_hours else time.monotonic() + timeout.total_seconds()
    with noticing_loss():
        arrived = store.add("arrived", 1)
        last = -(-arrived // world_size) * world_size  # the number that the last one will get
        if arrived == last:
            store.set(f"all/{last}", "")
        while not store.check([f"all/{last}"]):
            if store.check(["failed"]) or time.monotonic() > end:
                raise lost()
            time.sleep(LOOK_EVERY)
