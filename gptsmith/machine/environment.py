"""Where am I: cores, memory, processes, folders of other tools; the only reader of the environment.

Knows nothing of PyTorch, so that text can be prepared without it; devices.py goes on from here.
"""

import ctypes
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

import psutil

from ..config.fields import SettingError

MOST_THREADS = 16  # per core

# Of glibc's malloc.h; thresholds are in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4

# What `share_cores` and `use_huge_pages` set for PyTorch.
FOR_TORCH = {"GOMP_SPINCOUNT": "2000", "THP_MEM_ALLOC_ENABLE": "1"}


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def checked_threads(name: str, count: int | None) -> int:
    """A number of threads as asked for, or one per core; ValueError for far too many.

    Thousands starve the machine and then end the process.
    """
    if count is not None and count > MOST_THREADS * cores():
        raise SettingError(name, f"is {count}, but there are {cores()} cores: leave it out")
    return cores() if count is None else count


def rank() -> int:
    """This process's number among those that `torchrun` started, or 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's number on its own machine, which is also its GPU's."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes `torchrun` started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def available_memory() -> int:
    """Bytes that can still be used without swapping, by this machine or its container's limit."""
    free = psutil.virtual_memory().available
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2; "max" where there is no limit
    used = Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        return free


def peak_memory() -> int:
    """Most bytes that this process has had in memory so far."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    status = Path("/proc/self/status")  # Linux; its getrusage may report the parent's peak
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def share_cores() -> None:
    """Let idle OpenMP threads sleep soon rather than spin; works only before PyTorch is imported.

    By default they spin for milliseconds at every barrier, and two programs on the same cores then
    slow each other down more than tenfold. So they share the cores evenly.
    """
    set_for_torch("GOMP_SPINCOUNT")


def keep_freed_memory() -> None:
    """Let the C library keep the memory that a step frees for the next, where it can be told so.

    It would return each large buffer to the system, which hands it out again page by page: a
    quarter of the time of a step of GPT-2 on a CPU.
    """
    tell_malloc({M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0})


def return_freed_memory() -> None:
    """Let the C library return large buffers at once, where it can be told so.

    Weights that are read one after another otherwise leave holes, of half a model's size in all.
    """
    tell_malloc({M_MMAP_THRESHOLD: 2**20})


def tell_malloc(options: dict[int, int]) -> None:
    """Set options of glibc's allocator; other systems have none of them."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


def use_huge_pages() -> None:
    """Let PyTorch ask for memory in huge pages; works only before it is imported.

    Reading weights is a quarter faster on a CPU. Whoever set the variable is left in charge.
    """
    set_for_torch("THP_MEM_ALLOC_ENABLE")


def set_for_torch(name: str) -> None:
    """Set a variable of the environment as we want it, unless somebody has."""
    os.environ.setdefault(name, FOR_TORCH[name])


def cache_folder() -> Path:
    """Where compiled code is kept between runs: it can be made again, so it may be removed."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gptsmith"


def processor() -> str:
    """What the processor calls itself, with what it can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    kept = dict(line.split(":", 1) for line in lines if line.startswith(("model name", "flags")))
    return " ".join(kept.values()) or platform.processor()


def compiler() -> str | None:
    """The C++ compiler to call: what CXX says, or the first that there is."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def allow_deterministic_cuda() -> None:
    """Give cuBLAS the workspace without which PyTorch refuses to be deterministic on CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def api_key() -> str | None:
    """What callers of the server have to send, where it was not given as a flag."""
    return os.environ.get("GPTSMITH_API_KEY") or None


def decline_telemetry() -> None:
    """Ask huggingface_hub not to report on its user; works only before it is imported.

    It would name the version of PyTorch in every request, and ask its server for a list of coding
    assistants to look for in the environment. Whoever set the variable is left in charge.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def tiktoken_cache_folders() -> list[Path]:
    """Where tiktoken keeps the vocabulary files that it once downloaded."""
    named = [os.environ.get(name) for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")]
    folders = [Path(name) for name in named if name]
    return [*folders, Path(tempfile.gettempdir()) / "data-gym-cache"]
