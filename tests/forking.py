"""Processes of Python that begin with their imports done, which takes seconds elsewhere.

Run as a program, it imports what it is told to and then forks the processes that each line of its
input orders. A forked process has its own folder, environment and standard streams.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_SECONDS = 300

Done = subprocess.CompletedProcess[str]


class Forking:
    """The program, as tests see it."""

    def __init__(self, program: subprocess.Popen[str], folder: Path) -> None:
        self.program, self.folder = program, folder

    def __call__(
        self,
        code: str,
        *words: str,
        folder: Path,
        environments: Sequence[Mapping[str, str]],
    ) -> list[Done]:
        """Run code as `python -c` does, in a process for each environment; what became of them.

        One that fails ends the others. What importing wrote to stderr comes before their own.
        """
        order = {"code": code, "words": words, "folder": str(folder.resolve())}
        order |= {"environments": [*map(dict, environments)], "output": str(self.folder)}
        assert self.program.stdin
        assert self.program.stdout
        self.program.stdin.write(json.dumps(order) + "\n")
        self.program.stdin.flush()
        imported = (self.folder / "imports").read_text
        answer = self.program.stdout.readline()
        assert answer, imported()
        done = []
        for number, code in enumerate(json.loads(answer)):
            out, err = ((self.folder / f"{name}-{number}").read_text() for name in ("out", "err"))
            done.append(Done(["-c", *words], code, out, imported() + err))
        return done


@contextlib.contextmanager
def forking(*modules: str, **environment: str) -> Iterator[Forking]:
    """The program, which ends with its input."""
    words = [sys.executable, "-m", "tests.forking", *modules]
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/imports", "w") as imports:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": imports}
        where: Any = {"cwd": Path(__file__).parents[1], "env": environment, "text": True}
        with subprocess.Popen(words, **streams, **where) as program:
            yield Forking(program, Path(folder))


def run_code(number: int, order: dict[str, Any]) -> int:
    """What a forked process does; its exit status."""
    os.chdir(order["folder"])
    for descriptor, name in ((1, "out"), (2, "err")):
        path = f"{order['output']}/{name}-{number}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    signal.alarm(MOST_SECONDS)
    os.environ.clear()
    os.environ.update(order["environments"][number])
    sys.argv[:] = ["-c", *order["words"]]
    sys.path[0] = ""
    try:
        exec(order["code"], {"__name__": "__main__"})
    except SystemExit as exit:
        return int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(order: dict[str, Any]) -> list[int]:
    """Fork the processes and wait for them; their exit statuses."""
    numbers: dict[int, int] = {}
    for number in range(len(order["environments"])):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = run_code(number, order)
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(status)
        numbers[pid] = number
    codes, running = [0] * len(numbers), {*numbers}
    while running:
        pid, status = os.wait()
        running.remove(pid)
        codes[numbers[pid]] = os.waitstatus_to_exitcode(status)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return codes


def main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in sys.argv[1:]:
            importlib.import_module(module)
    gc.freeze()  # a child's collections would copy all that is shared
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
