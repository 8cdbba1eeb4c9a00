"""Code that runs with the transformers of today, or with the older one, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.forking import Done, Forking, forking

OLDER = Path(sys.prefix) / "transformers-4.57"  # `make test` puts it there
# Progress, and what transformers says of every GPT2LMHeadModel that it trains.
NOISE = ("Loading weights", "Writing model shards", "Device set to use", "`loss_type=None`")
# What takes seconds to import.
SLOW = ("torch", "transformers.pipelines", "transformers.models.gpt2.modeling_gpt2")

Ask = Callable[..., list[str]]


def environment_of(version: str, beside: Sequence[Path] = ()) -> dict[str, str]:
    """What finds a version of transformers, and packages beside it."""
    assert OLDER.is_dir(), "transformers 4.57 is missing: `make test` installs it"
    places = [*beside, *([] if version == "5" else [OLDER])]
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return environment | {"PYTHONPATH": os.pathsep.join(map(str, places))}


def printed(done: Done, expected: Sequence[str] = ()) -> list[str]:
    """The lines that code printed. It may complain of what is `expected` alone."""
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line and not any(n in line for n in NOISE)]
    assert [line for line in said if not any(words in line for words in expected)] == []
    return done.stdout.splitlines()


def ask(
    version: str,
    folder: Path,
    code: str,
    *words: str,
    beside: Sequence[Path] = (),
    expected: Sequence[str] = (),
) -> list[str]:
    """Run code with a version of transformers, and packages beside it; what it `printed`."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=environment_of(version, beside),
    )
    return printed(done, expected)


@contextmanager
def asking() -> Iterator[Ask]:
    """The same without packages beside it, and transformers is imported once for all that ask."""
    forks: dict[str, Forking] = {}
    with ExitStack() as stack:

        def run(version: str, folder: Path, code: str, *words: str) -> list[str]:
            environment = environment_of(version)
            if version not in forks:
                forks[version] = stack.enter_context(forking(*SLOW, **environment))
            where = {"folder": folder, "environment": environment}
            with forks[version].start(code, *words, **where) as process:
                return printed(process.done())

        yield run
