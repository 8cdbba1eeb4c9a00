"""Prepare the parts of a text on a Ray cluster, which starts again what dies, and join them.

Knows nothing of what a part is. All machines must have gptsmith, and see the working folder, the
sources and the folders of the parts under the same names.
"""

import os
import shutil
import socket
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.fields import SettingError
from ..config.settings import PrepareSettings
from .join import joining
from .part_folder import Part
from .parts import prepare_part
from .prepare import Progress, prepare, sources_with_text, timed

RETRIES = 5  # of a part whose process or machine died; an error in the text is not repeated
LEAST_BYTES = 2**20  # of a part: a smaller one takes a process longer to start than to prepare


def prepare_on_ray(
    names: Sequence[str], tokenizer: str, out: Path, address: str, options: PrepareSettings
) -> Iterator[Progress]:
    """Do what `prepare` does on the Ray cluster at an address, and yield the progress.

    "auto" is the cluster that this machine belongs to. The parts, about one per core, are made in
    OUT.parts, which is removed at the end; those that are there already are not made again.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        yield from prepare(names, tokenizer, out, options=options)  # it is there, or cannot be
    else:
        yield from timed(preparing(names, tokenizer, out, address, options))


def preparing(
    names: Sequence[str], tokenizer: str, out: Path, address: str, options: PrepareSettings
) -> Generator[tuple[int, int, int], None, None]:
    """Do the work of `prepare_on_ray`; yield bytes done, all bytes and tokens after each part."""
    ray = connected(address)
    folder, here = out.with_name(f"{out.name}.parts"), Path.cwd()
    size, tokens = sum(source.size for source in sources_with_text(names, options)), 0
    before = [int(part.name.rpartition("-")[2]) for part in folder.glob("[1-9]*-of-[1-9]*")]
    cores = int(ray.cluster_resources().get("CPU", 1))
    of = before[0] if before else max(1, min(cores, size // LEAST_BYTES))
    parts = [folder / f"{number}-of-{of}" for number in range(1, of + 1)]
    make = ray.remote(num_cpus=1, max_retries=RETRIES)(make_part)
    try:
        waiting = [
            make.remote(here, names, tokenizer, part, Part(number, of), options=options)
            for number, part in enumerate(parts, 1)
        ]
        while waiting:
            finished, waiting = ray.wait(waiting)
            tokens += sum(ray.get(finished))
            yield size * (of - len(waiting)) // of, size, tokens
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None  # what is wrong with the text, as without Ray
    except ray.exceptions.RayError as error:
        raise OSError(f"Ray did not finish the parts; the same command goes on: {error}") from error
    finally:
        ray.shutdown()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    yield from joining(parts, out)
    shutil.rmtree(folder)


def connected(address: str) -> Any:
    """Return Ray as a module, connected to a cluster; SettingError if none answers there."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs an extra: pip install 'gptsmith[ray]'") from error
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdecimal():  # Ray would try for minutes
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=5).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except (OSError, RuntimeError, ValueError) as error:
        problem = (
            f"is {address}, where no Ray cluster answers: `ray start --head` starts one, and one "
            "that wants a token needs RAY_AUTH_MODE=token here too"
        )
        raise SettingError("ray", problem) from error
    return ray


def make_part(here: Path, *what: Any, options: PrepareSettings) -> int:
    """Do what `prepare_part` does, by one thread of any machine; return the tokens of the part."""
    os.chdir(here)  # a process of Ray's, which has its own folder
    *_, last = prepare_part(*what, options=replace(options, workers=1))
    return last.tokens
