"""Trains a tiny run in several processes, whose workers are killed, and tells what became of it.

Run by test_workers.py as a program, with the number of runs to kill and a seed. It imports PyTorch
once and forks `torchrun`'s agent for each run; the agent forks the workers, and starts them again
when one dies. At a chosen moment, a worker kills itself, another worker, all of them or the agent;
or it stops, and is there but does not answer. Prints a JSON object with what became of all.
"""

import json
import logging
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist
import torch.distributed.fsdp  # once here, rather than by every worker
from filelock import FileLock
from matplotlib.figure import Figure
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing.spawn import ProcessContext

from gptsmith.checkpoint import training_state
from gptsmith.cli.main import main as run_command
from gptsmith.training import buckets, loop, run
from gptsmith.training.train import next_run_folder
from tests.conftest import until
from tests.training.killing import command_line, half_file, outcome

STEPS = 12
STOP_AFTER = 5  # of the runs that are killed when they go on
KINDS = ("step", "sum", "evaluation", "save")
PASS = "pass"  # of a micro-batch
WAIT = ("--process-timeout", "2")  # seconds, for a worker that was stopped


class Kill(NamedTuple):
    """A moment at which something is killed."""

    start: int  # how many kills were before
    rank: int  # of the worker that gets there
    kind: str
    number: int  # of the moments of this kind in that worker
    victim: str  # the rank of a worker; all; agent; or what the worker does: hang, memory, mistake


class Watch:
    """Counts the moments of each kind, before and after functions, and strikes at the named one."""

    def __init__(self, rank: int, kill: Kill | None) -> None:
        self.rank, self.kill = rank, kill
        self.counts = dict.fromkeys((*KINDS, PASS), 0)

    def is_due(self, kind: str) -> bool:
        self.counts[kind] += 1
        return self.kill is not None and self.kill[2:4] == (kind, self.counts[kind])

    def of(self, kind: str, owner: Any, name: str, halfway: Callable | None = None) -> None:
        """Make a function pass moments of a kind; `halfway` makes its result half of one."""
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.is_due(kind):
                strike(self.rank, self.kill.victim)
            result = original(*args, **kwargs)
            if self.is_due(kind):
                if halfway is not None and self.kill.victim in (str(self.rank), "all"):
                    halfway(*args)  # this worker, which wrote it, dies
                strike(self.rank, self.kill.victim)
            return result

        setattr(owner, name, wrapped)


def strike(rank: int, victim: str) -> None:
    """Kill the victim, the worker itself last, or do what it says."""
    Path(f"struck.{uuid4().hex}").touch()
    if victim == "memory":
        raise torch.OutOfMemoryError
    if victim == "mistake":
        raise ValueError("something is wrong here alone")
    pids = {path.suffix[1:]: int(path.read_text()) for path in Path().glob("pid.*")}
    if victim == "agent":
        os.kill(os.getppid(), signal.SIGKILL)
    elif victim == "hang":
        os.kill(pids[str(rank)], signal.SIGSTOP)
    else:
        chosen = sorted(pids) if victim == "all" else [victim]
        for each in sorted(chosen, key=lambda name: name == str(rank)):
            os.kill(pids[each], signal.SIGKILL)


def work(words: list[str], kills: list[Kill]) -> None:
    """What a worker does: `gptsmith` with these words."""
    rank, start = int(os.environ["RANK"]), len(list(Path().glob("struck.*")))
    Path(f"pid.{rank}").write_text(str(os.getpid()))
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Neither changes what SIGKILL leaves, and both take longer than all the rest.
    Figure.savefig = lambda self, path, **how: Path(path).write_bytes(b"a picture")
    os.fsync = lambda file: None
    buckets.BUCKET_BYTES = 1000  # several, though the model is tiny
    mine = [kill for kill in kills if (kill.start, kill.rank) == (start, rank)]
    watch = Watch(rank, mine[0] if mine else None)
    watch.of(PASS, loop, "autocast")
    watch.of("step", loop.Trainer, "step")
    watch.of("sum", dist, "all_reduce")
    watch.of("evaluation", run, "validate")
    watch.of("save", training_state, "write_safetensors", half_file)
    watch.of("save", os, "replace")
    watch.of("save", Path, "write_text", half_file)
    status = run_command(words)
    Path(f"ended.{rank}").write_text(json.dumps({"status": status, "counts": watch.counts}))
    if status:
        sys.exit(status)


def launch(
    processes: int,
    words: list[str],
    kills: list[Kill],
    *,
    machines: int = 1,
    static: bool = False,
    restarts: int = 3,
) -> list[int]:
    """Start the agents, and return their exit statuses when they and all workers have ended.

    `static` is the rendezvous of a plain `torchrun`, the other one that of --standalone and of
    several machines.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = LaunchConfig(
        min_nodes=machines,
        max_nodes=machines,
        nproc_per_node=processes // machines,
        run_id="none" if static else uuid4().hex,
        rdzv_backend="static" if static else "c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"rank": 0} if static else {},
        local_addr="127.0.0.1",
        max_restarts=restarts,
        monitor_interval=0.02,
        start_method="fork",
    )
    agents = [start_agent(config, words, kills) for _ in range(machines)]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(agent, 0)[1]) for agent in agents]
    for path in Path().glob("pid.*"):
        until(partial(has_ended, int(path.read_text())), 60)
        path.unlink()
    for path in Path().glob("struck.*"):
        path.unlink()
    return statuses


def has_ended(pid: int) -> bool:
    """Whether there is no such process."""
    return not psutil.pid_exists(pid)


def start_agent(config: LaunchConfig, words: list[str], kills: list[Kill]) -> int:
    """Fork an agent; return its process number."""
    agent = os.fork()
    if agent:
        return agent
    logging.disable()  # its first line of a killed worker would import a second of PyTorch
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    # It waits half a minute for a worker that was stopped, before it kills it.
    wait = ProcessContext._join_procs_with_timeout
    ProcessContext._join_procs_with_timeout = lambda self, timeout: wait(self, min(timeout, 1))
    try:
        elastic_launch(config, work)(words, kills)
        status = 0
    except ChildFailedError:
        status = 1
    os._exit(status)


class Scenario:
    """Who is killed when, in what run; the first six have every victim and every kind of run."""

    def __init__(self, index: int, counts: dict[int, list[dict[str, int]]], seed: int) -> None:
        chosen = random.Random(f"{seed} {index}")
        self.processes = 2 + (index + index // 4) % 2
        self.resumed, self.named = index // 2 % 2 == 1, index % 4 > 0
        self.static = index % 5 == 3
        self.machines = self.processes if index % 5 == 4 else 1
        victims = ["1", "0", "all", "agent", "1", "hang", "0"]
        if self.machines > 1:
            victims[3] = "all"  # without one of the agents, the others would wait for it
        self.kills = []
        for start in range(1 + index % 3 // 2):  # every third run is killed again on its way back
            kind = KINDS[(index + start) % len(KINDS)]
            rank = 0 if kind == "save" else chosen.randrange(self.processes)
            most = counts[self.processes][rank][kind] // (2 if self.resumed or start else 1)
            victim = victims[index % len(victims)] if start == 0 else str(rank)
            self.kills.append(Kill(start, rank, kind, chosen.randint(1, most), victim))

    def play(self, fresh: list[str], name: str) -> dict[str, Any]:
        """Train the run to its end, and return what became of it."""
        folder = Path(name)
        if self.resumed:
            shutil.copytree(f"stopped-{self.processes}", folder)
            words = ["train", "--resume", name, *WAIT]
        elif self.named:
            words = [*fresh, *WAIT, "--out", name]
        else:
            words, folder = [*fresh, *WAIT], next_run_folder("text")
        where = {"machines": self.machines, "static": self.static}
        statuses = launch(self.processes, words, self.kills, **where)
        if -signal.SIGKILL in statuses:  # nobody was left to start the workers again
            begun = (folder / "config.toml").exists()
            statuses += launch(self.processes, ["train", "--resume", name] if begun else words, [])
        ended = len(list(Path("runs").glob("*"))) if not (self.named or self.resumed) else 1
        return {**vars(self), "statuses": statuses, "folders": ended, **outcome(folder)}


def ended(processes: int) -> list[dict[str, Any]]:
    """Return how the workers ended."""
    return [json.loads(Path(f"ended.{rank}").read_text()) for rank in range(processes)]


def refused(words: list[str], kills: list[Kill]) -> dict[str, Any]:
    """Return what two workers say of a mistake, and the exit statuses of those that their agent
    has not ended before."""
    Path("log.txt").unlink()
    for path in Path().glob("ended.*"):
        path.unlink()
    launch(2, words, kills, restarts=0)
    said = Path("log.txt").read_text().splitlines()
    statuses = [json.loads(path.read_text())["status"] for path in Path().glob("ended.*")]
    return {"said": said, "statuses": statuses}


def refusals(fresh: list[str]) -> dict[str, dict[str, Any]]:
    """What cannot be trained, before and after the processes have joined, in all or in one."""
    new = [*fresh, "--out", "new"]
    found = {
        "setting": refused([*new, "--n-embd", "9"], []),
        "batch": refused([*new, "--batch-tokens", "8"], []),
        "folder": refused([*fresh, "--out", "one"], []),
        "alone": refused(new, [Kill(0, 1, "evaluation", 1, "mistake")]),
    }
    with FileLock("one/.lock"):
        found["lock"] = refused(["train", "--resume", "one"], [])
    return found


def main() -> None:
    number, seed = int(sys.argv[1]), int(sys.argv[2])
    fresh = command_line("text")
    assert run_command([*fresh, "--out", "one"]) == 0
    counts: dict[int, list[dict[str, int]]] = {}
    for processes in (2, 3):
        assert launch(processes, [*fresh, "--out", f"whole-{processes}"], []) == [0]
        counts[processes] = [each["counts"] for each in ended(processes)]
        stopped = ["--out", f"stopped-{processes}", "--stop-after", str(STOP_AFTER)]
        assert launch(processes, [*fresh, *stopped], []) == [0]
    killed = []
    for index in range(number):
        began = time.monotonic()
        killed.append(Scenario(index, counts, seed).play(fresh, f"run-{index}"))
        killed[-1]["seconds"] = time.monotonic() - began
        shutil.rmtree("runs", ignore_errors=True)
    small = [*fresh, "--out", "small"]
    statuses = launch(2, small, [Kill(0, 1, PASS, counts[2][1][PASS] - 9, "memory")])
    memory = {"statuses": statuses, "events": Path("small/events.jsonl").read_text()}
    sharded = [*fresh, "--shard", "yes", "--out", "sharded"]
    told = launch(2, sharded, [Kill(0, 1, "step", 9, "1"), Kill(1, 0, "save", 25, "0")])
    found = {
        "sharded": {
            "statuses": told,
            "events": Path("sharded/events.jsonl").read_text(),
            **outcome(Path("sharded")),
        },
        "one": outcome(Path("one")),
        "whole": {processes: outcome(Path(f"whole-{processes}")) for processes in (2, 3)},
        "killed": killed,
        "memory": {**memory, **outcome(Path("small"))},
        "refused": refusals(fresh),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
