"""C++ files of the package as libraries: compiled once per machine, in seconds, and kept on disk.

Knows nothing of what is in them.
"""

import ctypes
import hashlib
import re
import subprocess
import tempfile
import warnings
from pathlib import Path

from . import environment
from .files import replace

FLAGS = "-O3 -march=native -fopenmp -ffp-contract=fast -fno-math-errno -shared -fPIC -w".split()

# Of these, what a compiler may not know: Apple's clang has no OpenMP, and some no -march=native.
OPTIONAL = ("-fopenmp", "-march=native")


def open_library(source: Path) -> ctypes.CDLL:
    """Load a C++ file's library for this processor; compile the file first if it is not on disk.

    ValueError where there is no compiler, or it fails; OSError where the library cannot be loaded.
    """
    made_from = repr((contents(source), FLAGS, environment.processor()))
    name = f"{source.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:20]}.so"
    path = environment.cache_folder("native") / name
    if path.is_file() and not is_whole(path):
        warnings.warn(f"{path} is damaged and will be compiled again", stacklevel=2)
        path.unlink()
    if not path.is_file():
        compile_library(source, path)
    return ctypes.CDLL(str(path))


def contents(source: Path) -> list[bytes]:
    """Return the text of a C++ file and of the files beside it that it includes."""
    text = source.read_bytes()
    included = re.findall(rb'^#include "(.+)"', text, re.MULTILINE)
    return [text, *(part for name in included for part in contents(source.parent / name.decode()))]


def is_whole(path: Path) -> bool:
    """Whether a library ends with the digest of its content; loading a damaged one would crash."""
    content = path.read_bytes()
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def compile_library(source: Path, path: Path) -> None:
    """Compile `source` to `path`, complete or not at all; ValueError if that is not possible."""
    compiler = environment.compiler()
    if compiler is None:
        raise ValueError(
            f"{source.name} cannot be compiled: there is no g++ or clang++; install one"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            library = Path(folder) / path.name
            run_compiler(compiler, source, library)
            with library.open("ab") as file:  # after the content, which the loader ignores
                file.write(hashlib.sha256(library.read_bytes()).digest())
            replace(library, path)
    except OSError as error:
        raise ValueError(f"{source.name} could not be compiled: {error}") from error


def run_compiler(compiler: str, source: Path, library: Path) -> None:
    """Compile `source` to `library`, without flags that the compiler does not know; ValueError if
    that fails.

    Without OpenMP, the C++ runs in one thread, and a warning says so.
    """
    flags = FLAGS
    for left_out in (None, *OPTIONAL):
        flags = [flag for flag in flags if flag != left_out]
        command = [compiler, *flags, "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, errors="replace", check=False)
        if done.returncode == 0:
            break
    else:
        reason = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[0]
        raise ValueError(f"{compiler} could not compile {source.name}: {reason}")
    if "-fopenmp" in FLAGS and "-fopenmp" not in flags:
        warnings.warn(
            f"{compiler} has no OpenMP: {source.name} runs in one thread; CXX names another "
            "compiler",
            stacklevel=2,
        )
