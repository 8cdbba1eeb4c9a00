"""The only reader of environment variables; also cores, memory, ranks and cache folders.

Works without PyTorch, so that text can be prepared without it; devices.py has what needs PyTorch.
"""

import ctypes
import gc
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from ..config.fields import SettingError

MOST_THREADS = 16  # per core

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h

# From glibc's malloc.h; thresholds are in bytes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4

# What `share_cores` and `use_huge_pages` set for PyTorch.
FOR_TORCH = {"GOMP_SPINCOUNT": "2000", "THP_MEM_ALLOC_ENABLE": "1"}


class AnotherProcessFailedError(RuntimeError):
    """Another process of the run has failed, and says why."""


def cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def checked_threads(name: str, count: int | None) -> int:
    """Return the number of threads, by default one per core; ValueError for far too many.

    Thousands of threads would block the machine and crash the process.
    """
    if count is not None and count > MOST_THREADS * cores():
        raise SettingError(name, f"is {count}, but there are {cores()} cores: leave it out")
    return cores() if count is None else count


def rank() -> int:
    """This process's rank among those that `torchrun` started, or 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its own machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes that `torchrun` started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launch() -> str | None:
    """A name for the `torchrun` command that started this process, or None.

    It stays the same when `torchrun` starts its processes again: the --rdzv-id, or what its own
    process is. A name that is given for another command, as when a cluster runs a job again, means
    the same launch.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name != "none":  # its default; with --standalone, it is random
        return name
    launcher = psutil.Process(os.getppid())
    return f"{launcher.pid} of {launcher.create_time()}"


def end_with_launcher() -> None:
    """Let Linux kill this process when `torchrun`, which started it, is killed.

    It would go on without it, and keep the run's lock. SIGTERM would ask the processes on other
    machines, too, to stop; so they start again.
    """
    if sys.platform == "linux" and launch() is not None:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def peak_memory() -> int:
    """Peak memory of this process so far, in bytes."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    status = Path("/proc/self/status")  # Linux; its getrusage may report the parent's peak
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text("utf-8").splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024
    import resource  # Unix only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


def share_cores() -> None:
    """Let idle OpenMP threads sleep early instead of spinning; call before importing PyTorch.

    By default they spin for milliseconds at every barrier, and two programs on the same cores then
    slow each other down more than tenfold. A variable that is already set stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", FOR_TORCH["GOMP_SPINCOUNT"])


def keep_freed_memory() -> None:
    """Let malloc keep the memory that a step frees for the next one, on Linux with glibc.

    It would return each large buffer to the system and get it back page by page, which takes a
    quarter of GPT-2's step time on a CPU.
    """
    set_malloc_options({M_TRIM_THRESHOLD: 2**31 - 1, M_MMAP_MAX: 0})


def return_freed_memory() -> None:
    """Let malloc return large buffers to the system at once, on Linux with glibc.

    Reading weights one after another would otherwise leave holes of half the model's size in all,
    and gathering the weights of sharded blocks, holes of as much as the whole model.
    """
    limits = {M_TRIM_THRESHOLD: 2**17, M_MMAP_MAX: 2**16}  # glibc's own
    set_malloc_options({M_MMAP_THRESHOLD: 2**20, **limits})


def set_malloc_options(options: dict[int, int]) -> None:
    """Set options of glibc's malloc; do nothing on other systems, which do not have them."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)


@contextmanager
def without_collecting() -> Iterator[None]:
    """Pause Python's garbage collector.

    While modules are imported or a model is loaded, it would search all objects that there are so
    far again and again: a tenth of PyTorch's import.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Pause the garbage collector while modules are imported, and spare it their objects later."""
    with without_collecting():
        yield
    gc.freeze()


def use_huge_pages() -> None:
    """Let PyTorch allocate memory in huge pages; call before importing it.

    Reading weights is a quarter faster on a CPU. A variable that is already set stays.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", FOR_TORCH["THP_MEM_ALLOC_ENABLE"])


def cache_folder(kind: str) -> Path:
    """Folder of one kind of compiled code or measurements; it may be removed at any time.

    Where the user has no home, or the usual folder belongs to someone else or cannot be written, it
    is in the system's folder of temporary files.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # neither HOME nor an account
        return temporary_cache() / kind
    folder = base / "gptsmith" / kind
    place = next(each for each in (folder, *folder.parents) if os.path.exists(each))
    ours = place not in (folder, folder.parent) or is_ours(place)
    return folder if ours and may_write(place) else temporary_cache() / kind


def temporary_cache() -> Path:
    """Folder of this user among the temporary files, which no other user can prepare or change."""
    user = os.geteuid() if hasattr(os, "geteuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"gptsmith-{user}"
    with suppress(FileExistsError):  # a file of that name
        folder.mkdir(mode=0o700, exist_ok=True)
    usable = folder.is_dir() and is_ours(folder)
    return folder if usable else Path(tempfile.mkdtemp(prefix="gptsmith-"))


def is_ours(folder: Path) -> bool:
    """Whether a folder (or the link to it) belongs to this user, as code is loaded from it."""
    return not hasattr(os, "geteuid") or folder.lstat().st_uid == os.geteuid()


def may_write(folder: Path) -> bool:
    """Whether this user may create files in a folder."""
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def keep_compiled_code() -> None:
    """Let torch.compile keep its code in our cache. A variable that is already set stays."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder("inductor")))


def keep_fonts() -> None:
    """Let matplotlib keep its list of fonts in our cache if the user has no home to write to.

    It would complain, and search for fonts again at every start. A variable that is set stays.
    """
    try:
        usable = may_write(Path.home())
    except RuntimeError:  # neither HOME nor an account
        usable = False
    if not usable:
        os.environ.setdefault("MPLCONFIGDIR", str(cache_folder("matplotlib")))


def processor() -> str:
    """The processor's name and, on Linux, its instruction set extensions."""
    return " ".join(processor_fields()) or platform.processor()


def processor_fields() -> list[str]:
    """The processor's name, and its instruction set extensions, by Linux; elsewhere empty."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    kept = dict(line.split(":", 1) for line in lines if line.startswith(("model name", "flags")))
    return list(kept.values())


def compiler() -> str | None:
    """The C++ compiler: the one that CXX names, or else the first one found."""
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def allow_deterministic_cuda() -> None:
    """Set the cuBLAS workspace that PyTorch requires for determinism on CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def api_key() -> str | None:
    """The server's API key from GPTSMITH_API_KEY, or None."""
    return os.environ.get("GPTSMITH_API_KEY") or None


def decline_telemetry() -> None:
    """Turn off huggingface_hub's telemetry; call before importing it.

    It would send PyTorch's version with every request, and download a list of coding assistants to
    look for in the environment. A variable that is already set stays.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def tiktoken_cache_folders() -> list[Path]:
    """Folders in which tiktoken keeps downloaded vocabulary files."""
    named = [os.environ.get(name) for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")]
    folders = [Path(name) for name in named if name]
    return [*folders, Path(tempfile.gettempdir()) / "data-gym-cache"]
