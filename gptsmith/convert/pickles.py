"""Open files that PyTorch pickled, without running any code in them.

Knows nothing of formats: it returns the plain containers and tensors in a file.
"""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..machine.files import DamagedError

# The start of torch.save's files before they were zip archives: a pickled magic number.
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def is_torch_file(path: Path) -> bool:
    """Return whether torch.save wrote a file, by its first bytes and the names in its archive."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
    if start == LEGACY:
        return True
    return start.startswith(b"PK") and (not zipfile.is_zipfile(path) or holds_pickle(path))


def holds_pickle(path: Path) -> bool:
    """Return whether a zip archive has the layout of torch.save."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def load_torch_file(path: Path) -> Any:
    """Load a file of torch.save, memory-mapped if its kind allows it.

    ValueError if it needs code to run, DamagedError if it is damaged.
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
    except Exception as error:  # a damaged archive or pickle can raise any exception
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DamagedError(f"{path} is not an intact file of torch.save: {reason}") from error


def is_legacy(path: Path) -> bool:
    """Return whether a file is of the old kind, which cannot be memory-mapped."""
    with path.open("rb") as file:
        return file.read(len(LEGACY)) == LEGACY


def save_torch_file(value: Any, path: Path) -> None:
    """Write a file for `load_torch_file`; OSError if the disk is full."""
    try:
        with path.open("wb") as file:
            torch.save(value, file)
    except RuntimeError as error:  # PyTorch hides the OSError as its context
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or OSError(f"{path} could not be written: {error}") from error


def tensors_of(state: Any, place: Path) -> dict[str, Tensor]:
    """Return a state dict (any shapes), checked, without `torch.compile`'s prefix of names."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{place} holds {type(state).__name__}, where a state_dict is needed")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.is_sparse:
            kind = type(tensor).__name__
            raise ValueError(f"{place}: {name!r} is a {kind}, where a plain tensor is needed")
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}
