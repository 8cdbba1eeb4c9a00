"""The verb that examines this machine: doctor.

Everything that it finds wrong is a line of its report, which is written to the end. No name of a
user, a machine or a folder is in it, so that it can be shown to others.
"""

import json
import subprocess
import sysconfig
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from textwrap import wrap

from .. import __version__
from ..config.fields import setting
from ..config.tables import WIDTH, columns, human_bytes, human_flops
from ..machine import environment, facts
from .flags import Parser, add_flags, chosen

# What each extra adds; `test` is for the tests alone.
ADDED = {
    "parquet": "reading and writing .parquet",
    "tensorboard": "train --tensorboard",
    "wandb": "train --wandb",
    "fp8": "train --dtype fp8 on a Hopper GPU",
    "gguf": "import and export of GGUF, the format of llama.cpp",
    "hub": "import of OpenAI's published weights by their names",
    "onnx": "export to ONNX",
    "ray": "prepare --ray",
    "serve": "serve",
}

LABEL = 20  # columns for the name of a line

Section = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class DoctorSettings:
    """How the report is written."""

    json: bool = setting(False, "write JSON")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith doctor`."""
    add_flags(parser, DoctorSettings)


def run(options: Namespace) -> None:
    """Report versions, device, compiler, speed, memory, disk, and what is missing for what."""
    report = dict(sections())
    if chosen(options, DoctorSettings).json:
        print(json.dumps(report, indent=2))
        return
    for number, (title, lines) in enumerate(report.items()):
        print("\n" * (number > 0) + title.upper())
        rows = [
            (f"  {name}" * (part == 0), text)
            for name, whole in lines.items()
            for part, text in enumerate(wrap(whole, WIDTH - LABEL))
        ]
        print("\n".join(columns(rows, "<<")))


def sections() -> Iterator[tuple[str, Section]]:
    """Yield the title of each section of the report, and its lines by name."""
    yield "gptsmith", software()
    yield "machine", machine()
    yield "PyTorch", pytorch()
    yield "compiled code", compiled_code()
    yield "extras", extras()


def software() -> Section:
    """Return the versions of gptsmith, Python and the packages, and which of them are missing."""
    found = {"gptsmith": __version__, **facts.software()}
    try:
        packages = facts.required()
    except PackageNotFoundError:
        return found | {"packages": "unknown: gptsmith runs from a folder, without installation"}
    there = ", ".join(f"{name} {each}" for name, each in packages.items() if each)
    missing = [name for name, each in packages.items() if each is None]
    cure = {"missing": f"{', '.join(missing)}: pip install gptsmith"} if missing else {}
    return {**found, "packages": there, **cure}


def machine() -> Section:
    """Return the processor, and how much memory and disk is free."""
    room = {name: human_bytes(each) for name, each in facts.room().items()}
    return {
        **facts.processor(),
        "memory": f"{room['memory']}, of which {room['memory_free']} are free",
        "disk": f"{room['disk_free']} are free here, {room['cache_free']} for the cache",
    }


def pytorch() -> Section:
    """Return PyTorch's version, the devices that it finds, and how fast the best one is."""
    try:
        import torch

        from ..machine.devices import find_device
        from ..machine.rates import accelerators, copy_rate, product_rates
    except (ImportError, OSError) as error:
        return {"version": f"it cannot be imported: {facts.without_folders(str(error))}"}
    found = {"version": f"{torch.__version__}, {built_for(torch.version.cuda, torch.version.hip)}"}
    try:
        device = find_device("auto")
        found["GPUs"] = "; ".join(accelerators()) or "none that PyTorch can use"
        found["device"] = f"{device.type}, as --device auto takes"
        rates = product_rates(device).items()
        found["matrix products"] = ", ".join(f"{name} {human_flops(r)}/s" for name, r in rates)
        copied = human_bytes(round(copy_rate(device)))
        found["copied memory"] = f"{copied}/s, reading and writing"
    except RuntimeError as error:  # of a driver, or of memory that others have taken
        found["problem"] = facts.without_folders(str(error))
    return found


def built_for(cuda: str | None, hip: str | None) -> str:
    """Return what PyTorch was built for, in words."""
    return f"for CUDA {cuda}" if cuda else f"for ROCm {hip}" if hip else "without CUDA"


def compiled_code() -> Section:
    """Return the C++ compiler, and whether each C++ file of the package is compiled and loads."""
    from ..machine.native import open_library

    compiler, found = environment.compiler(), dict[str, str]()
    if compiler is None:
        found["compiler"] = "none: training and generation on a CPU are slower; install g++"
    else:
        found["compiler"] = compiler_version(compiler)
    header = Path(sysconfig.get_path("include"), "Python.h").is_file()
    lacks = "Python.h: install Python's headers" if compiler else "a compiler"
    found["torch.compile"] = (
        "has a compiler and Python.h" if compiler and header else f"lacks {lacks}"
    )
    for source in sorted(Path(__file__).parents[1].glob("*/*.cpp")):
        started = time.monotonic()
        try:
            open_library(source)
        except (ValueError, OSError) as error:
            found[source.name] = facts.without_folders(str(error))
        else:
            found[source.name] = f"ready after {time.monotonic() - started:.1f} s"
    return found


def compiler_version(compiler: str) -> str:
    """Return what a compiler says of itself, or why it does not."""
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, check=False)
    except OSError as error:
        return f"cannot be run: {error.strerror}"
    said = done.stdout.decode(errors="replace").partition("\n")[0]
    return facts.without_folders(said) or f"says nothing, and exits with {done.returncode}"


def extras() -> Section:
    """Return for each extra whether it is installed, or else what it would add."""
    found = {}
    try:
        known = facts.extras()
    except PackageNotFoundError:
        known = []
    for extra, added in ADDED.items():
        if extra not in known:
            found[extra] = f"unknown to the installed gptsmith: it adds {added}"
        elif missing := [name for name, each in facts.required(extra).items() if each is None]:
            install = f"missing ({', '.join(missing)}): pip install 'gptsmith[{extra}]'"
            found[extra] = f"{install} adds {added}"
        else:
            found[extra] = f"installed: {added}"
    return found
