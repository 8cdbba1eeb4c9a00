"""What PyTorch and Python pickled, opened so that nothing in it can run.

Knows nothing of formats: it returns the plain containers and tensors that a file holds.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..machine.files import DamagedError

# How torch.save's files began before they were zip archives: its magic number, pickled.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
MOST_BYTES = 1 << 24  # of a pickle without tensors: a vocabulary is thousands of times smaller


def is_torch_file(path: Path) -> bool:
    """Whether a file is one of torch.save's, by its first bytes and the names in its archive."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    if start == LEGACY:
        return True
    return start.startswith(b"PK") and (not zipfile.is_zipfile(path) or holds_pickle(path))


def holds_pickle(path: Path) -> bool:
    """Whether a zip archive is laid out as torch.save does it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def load_torch_file(path: Path) -> Any:
    """What torch.save wrote, mapped rather than read where the file allows it.

    ValueError where it needs code to be run, DamagedError where it is not whole.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=not is_legacy(path))
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it needs {wants[1]}" if wants else "its pickle is not one of tensors"
        raise ValueError(
            f"{path} holds more than tensors, and could run code: {what}; save the state_dict alone"
        ) from error
    except OSError:
        raise
    except Exception as error:  # a damaged archive or pickle fails in any way at all
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DamagedError(f"{path} is not a whole file of torch.save's: {reason}") from error


def is_legacy(path: Path) -> bool:
    """Whether a file is of the kind that cannot be mapped."""
    with path.open("rb") as file:
        return file.read(len(LEGACY)) == LEGACY


def save_torch_file(value: Any, path: Path) -> None:
    """Write what `load_torch_file` reads; OSError where the disk does not take it."""
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # PyTorch's archive, which says nothing of the disk
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or OSError(f"{path} could not be written: {error}") from error


def tensors_of(state: Any, place: Path) -> dict[str, Tensor]:
    """A state dict (any shapes), checked to be one, without `torch.compile`'s prefix of names."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{place} holds {type(state).__name__}, where a state_dict is needed")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.is_sparse:
            kind = type(tensor).__name__
            raise ValueError(f"{place}: {name!r} is a {kind}, where a plain tensor is needed")
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


class _NoGlobals(pickle.Unpickler):
    """Unpickles numbers, strings and containers; whatever names a class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it needs {module}.{name}")


def load_plain_pickle(path: Path) -> Any:
    """The plain values in a pickle; ValueError where it needs any class or function."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: too many for a vocabulary")
    try:
        with path.open("rb") as file:
            return _NoGlobals(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way at all
        raise ValueError(f"{path} is not a plain pickle: {error}") from error
