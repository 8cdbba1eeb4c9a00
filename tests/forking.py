"""Several processes of `gptsmith`, as `torchrun` starts them, without its seconds of importing.

Run as a program, it imports everything once and then forks the processes that each line of its
input orders. They find each other by the environment variables that torchrun sets.
"""

import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What `gptsmith train` and `gptsmith finetune` import.
IMPORTED = "gptsmith.cli.train gptsmith.cli.finetune gptsmith.finetuning.finetune matplotlib.figure"
MOST_SECONDS = 300


class Forking:
    """The program, as tests see it."""

    def __init__(self, program: subprocess.Popen[str]) -> None:
        self.program = program

    def __call__(self, processes: int, *words: str) -> None:
        """Run `gptsmith` in several processes in the current folder; all must succeed."""
        order = {
            "folder": os.getcwd(),
            "environment": dict(os.environ),
            "processes": processes,
            "words": words,
        }
        assert self.program.stdin
        assert self.program.stdout
        self.program.stdin.write(json.dumps(order) + "\n")
        self.program.stdin.flush()
        codes = json.loads(self.program.stdout.readline())
        said = "\n".join(Path(f"rank-{rank}.txt").read_text() for rank in range(processes))
        assert codes == [0] * processes, f"{codes}\n{said[-2000:]}"


@contextmanager
def forking() -> Iterator[Forking]:
    """The program, which ends with its input."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.forking"],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as program:
        yield Forking(program)


def rank_main(rank: int, port: int, order: dict[str, Any]) -> int:
    """What a forked process does; its exit status."""
    os.chdir(order["folder"])
    said = os.open(f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    signal.alarm(MOST_SECONDS)
    os.environ.clear()
    os.environ |= order["environment"]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(order["processes"])}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from gptsmith.cli.main import main

    return main(order["words"])


def run(order: dict[str, Any]) -> list[int]:
    """Fork the processes and wait for them; their exit statuses. One that fails ends the others."""
    with socket.socket() as held:  # so that nobody else is given the port
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        ranks: dict[int, int] = {}
        for rank in range(order["processes"]):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    status = rank_main(rank, held.getsockname()[1], order)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(status)
            ranks[pid] = rank
        codes = [0] * len(ranks)
        running = set(ranks)
        while running:
            pid, status = os.wait()
            running.remove(pid)
            codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
            if status:
                for other in running:
                    os.kill(other, signal.SIGKILL)
        return codes


def main() -> None:
    for module in IMPORTED.split():
        importlib.import_module(module)
    gc.freeze()  # a child's collections would copy all that is shared
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
