"""The part of bench that measures a server: one that runs, or a model's, served for as long."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import IO, Any, NoReturn

import psutil

from ..checkpoint.folder import find_model, read_config
from ..config.recipe import updated
from ..config.settings import LoadSettings, MachineSettings
from ..machine.environment import api_key
from .flags import given
from .turns import flag

HOST = "127.0.0.1"
STARTING = 600.0  # seconds that a server may take to load its model
ENDING = 10.0  # seconds that it may take to go


def bench_serve(options: Namespace) -> None:
    """Measure a server at an address, or serve a model and measure that."""
    from .client import Server
    from .crowd import measure, render

    asked = {name: each for name, each in given(options, LoadSettings).items() if each is not None}
    settings = updated(LoadSettings(), asked)
    key = options.api_key or api_key()
    if "://" in options.model:
        server = Server.at(options.model, key)
        ours = given(options, MachineSettings) | {"slots": options.slots, "dtype": options.dtypes}
        if chosen := [flag(name) for name, each in ours.items() if each]:
            raise ValueError(f"{' and '.join(chosen)}: a server that runs has chosen already")
        found = measure(server, settings)
    else:
        settings = fitted(options.model, settings, asked)
        with served(program(options)) as (address, memory):
            found = measure(Server.at(address, key), settings, memory)
    if options.json:
        print(json.dumps({"model": options.model, **found}))
        return
    print(f"serve: {options.model}")
    print(render(found))


def fitted(model: str, settings: LoadSettings, asked: dict[str, Any]) -> LoadSettings:
    """The settings with prompt and new tokens as asked for, or as a model's context holds them."""
    from .timing import fitting

    names = ("prompt_tokens", "max_tokens")
    wanted = [getattr(settings, name) if name in asked else None for name in names]
    found = fitting(read_config(find_model(model)), *wanted)
    return replace(settings, **dict(zip(names, found, strict=True)))


def program(options: Namespace) -> list[str]:
    """The command line that serves the model at a free port, with the flags that are for it."""
    if len(options.dtypes) > 1:
        raise ValueError("bench serve measures one dtype at a time")
    flags = given(options, MachineSettings) | {
        "dtype": next(iter(options.dtypes), None),
        "slots": options.slots,
        "api_key": options.api_key,
    }
    words = [word for name, each in flags.items() if each for word in (flag(name), str(each))]
    place = ("--host", HOST, "--port", "0")
    return [sys.executable, "-m", "gptsmith", "serve", options.model, *place, *words]


# -- a server of our own


@contextmanager
def served(words: Sequence[str]) -> Iterator[tuple[str, Callable[[], int]]]:
    """The address of a server that these words start, and what tells its resident bytes.

    It is ended in every case; ValueError with its last line where it ends by itself.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as said, ending_whole():
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        process = psutil.Process(child.pid)

        def memory() -> int:
            check_running(child, said)
            return process.memory_info().rss

        try:
            yield wait_until_ready(child, process, said), memory
        finally:
            child.terminate()
            try:
                child.wait(ENDING)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextmanager
def ending_whole() -> Iterator[None]:
    """Let SIGTERM end this process as an exception does, so that what it started is ended too."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def check_running(child: subprocess.Popen[bytes], said: IO[str]) -> None:
    """ValueError with the last line that a server said, where it has ended."""
    if child.poll() is None:
        return
    said.seek(0)
    lines = said.read().strip().splitlines() or [f"with status {child.returncode}"]
    raise ValueError(f"the server ended: {lines[-1].removeprefix('gptsmith: ')}")


def wait_until_ready(child: subprocess.Popen[bytes], process: psutil.Process, said: IO[str]) -> str:
    """The address at which a server that was started answers that it is well."""
    from .client import Failure, Server, answered

    until = time.monotonic() + STARTING
    while time.monotonic() < until:
        check_running(child, said)
        for port in listening(process):
            address = f"http://{HOST}:{port}"
            try:
                with answered(Server.at(address), "/health"):
                    return address
            except Failure:
                pass  # not yet
        time.sleep(0.1)
    raise ValueError(f"the server was not ready within {STARTING:g} s")


def listening(process: psutil.Process) -> list[int]:
    """The ports at which a process listens; none where it is about to end."""
    try:
        found = process.net_connections("tcp4")
    except psutil.Error:
        return []
    return [each.laddr.port for each in found if each.status == psutil.CONN_LISTEN]
