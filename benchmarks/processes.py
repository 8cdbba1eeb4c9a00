"""What a training step in several processes takes, and what it waits for, beside PyTorch's DDP.

    python benchmarks/processes.py --processes 2 --layers 6 --channels 384

In each round, the gradient of one batch is computed in turn without summing it (alone), with a sum
for each parameter after the backward pass (after), with sums in buckets during it (buckets, which
`gptsmith train` does), and by torch.nn.parallel.DistributedDataParallel (ddp), which weighs tokens
and micro-batches likewise. Then Muon updates the weights, all of them in each process (update
alone) or each process its share (update shared, which `gptsmith train` does). The cores are divided
among the processes.

With --memory, two steps are trained whole and sharded, each way in processes of their own, and what
each process needs at most beyond its imports is shown, with the seconds of the second step.
"""

import copy
import json
import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from results import Results, carry_out, over, parser, ratios

WAYS = ("alone", "after", "buckets", "ddp", "update alone", "update shared")


def trainer_of(options: Any) -> Any:
    """A trainer of a fresh GPT-2 on random tokens, as `gptsmith train` makes one for a CPU."""
    import numpy as np
    import torch

    from gptsmith import GPT, GPTConfig
    from gptsmith.config.settings import MachineSettings, RunSettings, TrainingSettings
    from gptsmith.data.batches import Batches
    from gptsmith.training.task import CountedTargets
    from gptsmith.training.trainer import make_trainer

    class Stream:
        """Random tokens."""

        def __len__(self) -> int:
            return 100_000

        def read(self, start: int, stop: int) -> Any:
            return np.random.default_rng(start).integers(0, options.vocabulary, stop - start)

    torch.manual_seed(1)
    config = GPTConfig(
        vocab_size=options.vocabulary,
        context_length=options.context,
        n_layer=options.layers,
        n_head=options.channels // 64,
        n_embd=options.channels,
    )
    machine = MachineSettings(
        device="cpu", dtype="float32", fused="no" if options.memory else "yes", compile="no",
        attention="kernel", micro_batch=options.micro_batch, recompute=options.recompute,
        shard="yes" if options.memory == "sharded" else "no",
    )  # fmt: skip
    training = TrainingSettings(
        batch_tokens=options.rows * options.context,
        optimizer=options.optimizer,
        muon_learning_rate=1e-5,
    )
    settings = RunSettings(model=config, machine=machine, training=training)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    batches = Batches(
        Stream(), options.context, options.rows, seed=1, rank=rank, world_size=processes
    )
    device = torch.device("cpu")
    return make_trainer(GPT(config).train(), settings, batches, CountedTargets(), device)


def after(trainer: Any, batch: Any) -> None:
    """Compute the gradient, then sum it parameter by parameter."""
    from gptsmith.machine.processes import sum_over_processes

    alone(trainer, batch, counted=True)
    for parameter in trainer.parameters:
        sum_over_processes(parameter.grad)


def alone(trainer: Any, batch: Any, counted: bool = False) -> None:
    """Compute the gradient of this process's rows; with `counted`, sum the small numbers."""
    from gptsmith.machine.processes import sum_over_processes

    trainer.forget_gradients()
    sums, trainer.sums = trainer.sums, None
    count = trainer.objective.counted(*batch)
    loss = trainer.gradient_of_rows(sum_over_processes(count) if counted else count, *batch)
    if counted:
        sum_over_processes(loss)
    trainer.sums = sums


def update_alone(trainer: Any, batch: Any) -> None:
    """Update all weights in this process."""
    from gptsmith.training import muon

    kept = muon.my_share, muon.begin_shares
    muon.my_share, muon.begin_shares = iter, lambda items: []
    for optimizer in trainer.optimizers:
        optimizer.step()
    muon.my_share, muon.begin_shares = kept


def ddp_way(trainer: Any) -> Callable[[Any], None]:
    """DDP of a copy of the trainer's model."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from gptsmith.machine.processes import sum_over_processes

    class Loss(nn.Module):
        """The model's loss as a module's forward, which DDP needs."""

        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(trainer.model)
            for parameter in self.model.parameters():
                parameter._post_accumulate_grad_hooks = None

        def forward(self, *batch: Any) -> Any:
            return trainer.objective.loss(self.model, *batch)

    wrapped = DistributedDataParallel(Loss(), gradient_as_bucket_view=True)
    processes = int(os.environ["WORLD_SIZE"])

    def work(batch: Any) -> None:
        wrapped.zero_grad(set_to_none=True)
        counted = sum_over_processes(trainer.objective.counted(*batch))
        total = torch.zeros(())
        parts = zip(*(part.split(trainer.micro_batch) for part in batch), strict=True)
        micros = list(parts)
        for number, micro in enumerate(micros):
            wrapped.require_backward_grad_sync = number == len(micros) - 1
            share = trainer.objective.counted(*micro) / counted
            loss = wrapped(*micro) * (share * processes)  # DDP takes the mean
            loss.backward()
            total += loss.detach() / processes
        sum_over_processes(total)

    return work


def timed(work: Callable[..., Any], spent: dict[str, float], name: str) -> Callable[..., Any]:
    """The same work, which adds the seconds that it takes to those spent on `name`."""

    def wrapped(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return work(*arguments)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - started

    return wrapped


def measure(options: Any) -> None:
    """Measure all ways in this process; the first one prints the rows."""
    import torch

    from gptsmith.machine.processes import joined_processes, wait_for_processes
    from gptsmith.training import buckets, loop

    buckets.BUCKET_BYTES = options.bucket_bytes or buckets.BUCKET_BYTES
    torch.set_num_threads(max(1, options.cores // options.processes))
    with joined_processes(torch.device("cpu"), 300):
        trainer = trainer_of(options)
        ways = {"alone": partial(alone, trainer)}
        batch = trainer.load(0)
        if options.processes > 1:
            ways["after"] = partial(after, trainer)
            ways["buckets"] = lambda batch: trainer.gradient(*batch)
            ways["ddp"] = ddp_way(trainer)
            ways["update alone"] = partial(update_alone, trainer)
        ways["update shared" if options.processes > 1 else "update alone"] = lambda batch: [
            optimizer.step() for optimizer in trainer.optimizers
        ]
        waits: dict[str, float] = {}
        if trainer.sums is not None:
            trainer.sums.finish = timed(trainer.sums.finish, waits, "buckets")
            loop.sum_over_processes = timed(loop.sum_over_processes, waits, "numbers")
        for round in range(-1, options.rounds):
            for way, work in ways.items():
                wait_for_processes()
                waits.clear()
                started = time.perf_counter()
                work(batch)
                row = {"way": way, "round": round, "seconds": time.perf_counter() - started}
                if round >= 0 and os.environ["RANK"] == "0":
                    print(json.dumps(row | {"waited": waits}), flush=True)


def measure_memory(options: Any) -> None:
    """Train two steps in this process; the first one prints the rows of all."""
    import psutil
    import torch

    from gptsmith.machine.processes import joined_processes, sum_of_numbers
    from gptsmith.training import sharding

    torch.set_num_threads(max(1, options.cores // options.processes))
    with joined_processes(torch.device("cpu"), 300):
        if options.memory == "sharded":
            import torch.distributed.fsdp
        before = psutil.Process().memory_info().rss
        trainer = trainer_of(options)
        reports = [trainer.step(step) for step in range(2)]
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        held = sum(sharding.local(p).nbytes for p in trainer.parameters)
        rank = int(os.environ["RANK"])
        for name, value in {"peak": peak, "weights": held}.items():
            numbers = [0.0] * options.processes
            numbers[rank] = value
            row = {
                "way": options.memory,
                "what": name,
                "bytes": sum_of_numbers(numbers, trainer.device),
            }
            if rank == 0:
                print(json.dumps(row | {"seconds": reports[-1].seconds}), flush=True)


def show_memory(options: Any, results: Results) -> None:
    """Measure memory both ways, and show it."""
    for way in ("whole", "sharded"):
        for row in run([*sys.argv[1:], "--memory", way], options.processes):
            results.add({**vars(options), "out": None, **row})
            each = ", ".join(f"{number / 1e6:,.0f}" for number in row["bytes"])
            print(f"{way}: {row['what']} {each} MB; a step takes {row['seconds']:.2f} s")


def run(words: list[str], processes: int) -> list[dict[str, Any]]:
    """Start the processes, and return the rows of the first one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *words, "--worker"],
            env={**shared, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    answers = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise ValueError("a process failed, as it says above")
    return [json.loads(line) for line in answers[0].splitlines()]


def main() -> None:
    """Measure, and show seconds and ratios."""
    known = parser(__doc__)
    known.add_argument("--processes", type=int, default=2)
    known.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    known.add_argument("--layers", type=int, default=6)
    known.add_argument("--channels", type=int, default=384, help="a multiple of 64")
    known.add_argument("--vocabulary", type=int, default=65)
    known.add_argument("--context", type=int, default=128)
    known.add_argument("--rows", type=int, default=16, help="of the batch of all processes")
    known.add_argument("--micro-batch", type=int, default=4, help="rows")
    known.add_argument("--bucket-bytes", type=int, default=None, help="(default: the package's)")
    known.add_argument("--rounds", type=int, default=7)
    known.add_argument("--memory", nargs="?", const="both", choices=("both", "whole", "sharded"))
    known.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    known.add_argument("--recompute", choices=("yes", "no"), default="no")
    known.add_argument("--worker", action="store_true", help="for this program itself")
    options = known.parse_args()
    if options.worker:
        (measure_memory if options.memory else measure)(options)
        return
    results = Results(options.out)
    if options.memory:
        show_memory(options, results)
        return
    rows = run(sys.argv[1:], options.processes)
    seconds: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    for row in rows:
        results.add({**vars(options), "out": None, **row})
        seconds[row["way"]][row["round"]] = row["seconds"]
    for way, rounds in seconds.items():
        if rounds:
            print(f"{way}: {over(rounds.values())} s")
    waited = [row["waited"] for row in rows if row["way"] == "buckets"]
    if waited:
        for what in waited[0]:
            print(f"buckets: waits for {what} {over(each[what] for each in waited)} s")
        print(f"ddp / buckets: {over(ratios(seconds['ddp'], seconds['buckets']))}")
        print(f"after / buckets: {over(ratios(seconds['after'], seconds['buckets']))}")


if __name__ == "__main__":
    carry_out(main)
