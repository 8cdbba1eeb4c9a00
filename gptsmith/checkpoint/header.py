"""Read a safetensors file's header: which tensors the file has, and where. Needs no PyTorch."""

import json
import struct
from pathlib import Path

from ..machine.files import DamagedError
from .names import TensorInfo


def safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors in a safetensors file's header; DamagedError if the file is too short.

    The library's `safe_open` could read it, but it imports NumPy, which takes a third of the time
    of `gptsmith describe FOLDER`, and it does not distinguish truncated files from invalid ones.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise DamagedError(f"{path} is cut short: its {size:,} bytes end within the header")
        try:
            entries = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(entries, dict):
        raise DamagedError(f"{path} is not a safetensors file: its header is not a JSON object")
    entries.pop("__metadata__", None)
    tensors, end = dict[str, TensorInfo](), 8 + length
    try:
        for name, entry in entries.items():
            first, last = (8 + length + int(offset) for offset in entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            tensors[name] = TensorInfo(path, shape, str(entry["dtype"]), first, last - first)
            end = max(end, last)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is not a safetensors file: its header is not valid") from error
    if size < end:
        raise DamagedError(
            f"{path} is cut short: it has {size:,} bytes, fewer than its header says"
        )
    return tensors
