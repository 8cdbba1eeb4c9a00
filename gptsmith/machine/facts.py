"""What this machine has, for a report: versions, processor, memory and disk.

Works without PyTorch, so that the report can say that it is missing. Knows nothing of verbs.
"""

import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

import psutil

from . import environment

# Instruction sets by the names of /proc/cpuinfo.
NOTABLE = "avx2 fma avx512f avx512_bf16 amx_bf16 asimd bf16 i8mm".split()


def software() -> dict[str, str]:
    """Return the versions of Python and of the system."""
    python = f"{platform.python_version()} ({platform.python_implementation()})"
    return {"python": python, "system": platform.platform()}


def required(extra: str | None = None) -> dict[str, str | None]:
    """Return the versions of the packages that gptsmith, or an extra of it, needs by name.

    None: it is not installed. PackageNotFoundError if gptsmith itself is not installed.
    """
    found: dict[str, str | None] = {}
    for line in metadata.requires("gptsmith") or []:
        wanted, _, condition = line.partition(";")
        of = re.search(r"""extra == ['"](.+?)['"]""", condition)
        name = re.split(r"[^\w.-]", wanted.strip())[0]
        if (of[1] if of else None) == extra and name != "gptsmith":
            found[name] = version(name)
    return found


def extras() -> list[str]:
    """Return the names of the extras of the gptsmith that is installed."""
    return metadata.metadata("gptsmith").get_all("Provides-Extra") or []


def without_folders(text: str) -> str:
    """Return a text in which paths are only names of files: folders may name a user."""
    text = text.replace(os.path.expanduser("~"), "~")  # which may have spaces in it
    return re.sub(r"~?(?:[A-Za-z]:)?[\\/](?:[^\\/\s:'\"]+[\\/])+", "", " ".join(text.split()))


def version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def processor() -> dict[str, str]:
    """Return the processor's name, its cores and the instruction sets that matter here."""
    name, *flags = environment.processor_fields() or [platform.processor()]
    known = set(" ".join(flags).split())
    cores = f"{environment.cores()} of {os.cpu_count()}, {psutil.cpu_percent(0.1):.0f}% busy"
    sets = " ".join(flag for flag in NOTABLE if flag in known)
    found = {"processor": name.strip() or platform.machine(), "cores": cores}
    return found | ({"instructions": sets} if sets else {})


def room() -> dict[str, int]:
    """Return the bytes of memory and disk: all of the memory, and what is free of each."""
    cache = environment.cache_folder("native")
    there = next(each for each in (cache, *cache.parents) if each.exists())
    return {
        "memory": psutil.virtual_memory().total,
        "memory_free": psutil.virtual_memory().available,
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "cache_free": shutil.disk_usage(there).free,
    }
