"""The library that step.cpp becomes: compiled once per machine, in seconds, and kept on disk.

Knows nothing of what is in it.
"""

import ctypes
import hashlib
import subprocess
import tempfile
import warnings
from pathlib import Path

from ..machine import environment

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = "-O3 -march=native -fopenmp -ffp-contract=fast -fno-math-errno -shared -fPIC -w".split()


def open_library() -> ctypes.CDLL:
    """Load the library for this processor; compile step.cpp first if it is not on disk yet."""
    made_from = repr((SOURCE.read_bytes(), FLAGS, environment.processor()))
    name = f"step-{hashlib.sha256(made_from.encode()).hexdigest()[:20]}.so"
    path = environment.cache_folder("decode") / name
    if path.is_file() and not is_whole(path):
        warnings.warn(f"{path} is damaged and will be compiled again", stacklevel=2)
        path.unlink()
    if not path.is_file():
        compile_library(path)
    return ctypes.CDLL(str(path))


def is_whole(path: Path) -> bool:
    """Whether a library ends with the digest of its content; loading a damaged one would crash."""
    content = path.read_bytes()
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def compile_library(path: Path) -> None:
    """Compile step.cpp to `path`, complete or not at all; ValueError if that is not possible."""
    compiler = environment.compiler()
    if compiler is None:
        raise ValueError("step.cpp cannot be compiled: there is no g++ or clang++; install one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            library = Path(folder) / path.name
            command = [compiler, *FLAGS, "-o", str(library), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[0]
                raise ValueError(
                    f"{compiler} could not compile step.cpp: {reason}; leave compile out"
                )
            with library.open("ab") as file:  # after the content, which the loader ignores
                file.write(hashlib.sha256(library.read_bytes()).digest())
            library.replace(path)
    except OSError as error:
        raise ValueError(f"step.cpp could not be compiled: {error}; leave compile out") from error
