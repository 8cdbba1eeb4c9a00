"""Processes of Python that begin with their imports done, which takes seconds elsewhere.

Run as a program, it imports what it is told to and then forks a process for each line of its input
that orders one, with a folder, an environment and standard streams of its own.
"""

import contextlib
import gc
import importlib
import json
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MOST_SECONDS = 300

Done = subprocess.CompletedProcess[str]


class Forked:
    """A forked process, as `subprocess.Popen` shows one."""

    def __init__(self, program: "Forking", words: Sequence[str], pid: int, output: str) -> None:
        self.program, self.words, self.pid, self.output = program, words, pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative where a signal ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self.program.order({"ended": self.pid})
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = MOST_SECONDS) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired([*self.words], timeout)
            time.sleep(0.005)
        return status

    def done(self, timeout: float = MOST_SECONDS) -> Done:
        """What became of it. What importing wrote to stderr comes before its own."""
        status = self.wait(timeout)
        imports = self.program.imports.read_text()
        out, err = (Path(f"{self.output}.{name}").read_text() for name in ("out", "err"))
        return Done(["-c", *self.words], status, out, imports + err)


class Forking:
    """The program, as tests see it."""

    def __init__(self, program: subprocess.Popen[str], folder: Path) -> None:
        self.program, self.folder, self.imports = program, folder, folder / "imports"
        self.started = 0

    def order(self, order: dict[str, Any]) -> Any:
        """Have the program do something; its answer."""
        assert self.program.stdin
        assert self.program.stdout
        self.program.stdin.write(json.dumps(order) + "\n")
        self.program.stdin.flush()
        answer = self.program.stdout.readline()
        assert answer, self.imports.read_text()
        return json.loads(answer)

    @contextlib.contextmanager
    def start(
        self, code: str, *words: str, folder: Path, environment: Mapping[str, str]
    ) -> Iterator[Forked]:
        """Run code as `python -c` does, in a process that is killed in the end if it still runs."""
        self.started += 1
        output = str(self.folder / str(self.started))
        where = {"folder": str(folder.resolve()), "environment": dict(environment)}
        pid = self.order({"code": code, "words": words, "output": output} | where)
        process = Forked(self, words, pid, output)
        try:
            yield process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    def together(
        self, code: str, *words: str, folder: Path, environments: Sequence[Mapping[str, str]]
    ) -> list[Done]:
        """Run code in a process for each environment. One that fails ends the others."""
        with contextlib.ExitStack() as stack:
            processes = [
                stack.enter_context(self.start(code, *words, folder=folder, environment=each))
                for each in environments
            ]
            end = time.monotonic() + MOST_SECONDS
            while None in (statuses := [process.poll() for process in processes]):
                assert time.monotonic() < end, f"they did not end in {MOST_SECONDS} s"
                if any(statuses):
                    break
                time.sleep(0.01)
        return [process.done() for process in processes]


@contextlib.contextmanager
def forking(*modules: str, **environment: str) -> Iterator[Forking]:
    """The program, which ends with its input."""
    words = [sys.executable, "-m", "tests.forking", *modules]
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/imports", "w") as imports:
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": imports}
        where: Any = {"cwd": Path(__file__).parents[1], "env": environment, "text": True}
        with subprocess.Popen(words, **streams, **where) as program:
            yield Forking(program, Path(folder))


def run_code(order: dict[str, Any]) -> int:
    """What a forked process does; its exit status."""
    os.chdir(order["folder"])
    for descriptor, name in ((1, "out"), (2, "err")):
        path = f"{order['output']}.{name}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
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


def fork(order: dict[str, Any]) -> int:
    """Start a process that runs code; its id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        status = run_code(order)
        multiprocessing.util._exit_function()  # or a tracker of its semaphores misses them
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def ended(pid: int) -> int | None:
    """The exit status of a process; None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def main() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for module in sys.argv[1:]:
            importlib.import_module(module)
    gc.freeze()  # a child's collections would copy all that is shared
    for line in sys.stdin:
        order = json.loads(line)
        answer = ended(order["ended"]) if "ended" in order else fork(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
