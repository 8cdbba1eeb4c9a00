"""Read and write safetensors files, one tensor at a time.

Knows nothing of models: names and contents are the caller's business.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..machine.dtypes import NUMBER_FORMATS, dtype_named
from ..machine.files import DamagedError, write_json
from .names import TensorInfo
from .tensors import Entry, Fetch
from .whole import WEIGHTS, WEIGHTS_INDEX


def fetch_from(tensors: Mapping[str, TensorInfo]) -> Fetch:
    """Return a function that fetches tensors from safetensors files.

    It reopens the file for each tensor, because mapped pages stay in memory until the file closes.
    """

    def get(name: str) -> Tensor:
        path = tensors[name].file
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise DamagedError(f"{path} is not an intact safetensors file: {error}") from error

    return get


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write tensors to a file, one at a time; the library needs all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.bytes
        words = {"dtype": NUMBER_FORMATS[entry.dtype].header, "shape": entry.shape}
        header[entry.name] = {**words, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            file.write(entry.read())


def write_shards(entries: Sequence[Entry], folder: Path, shard_bytes: int | None) -> None:
    """Write one safetensors file, or several of at most `shard_bytes` each and their index."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        full = sum(other.bytes for other in shards[-1]) + entry.bytes
        if shard_bytes is not None and shards[-1] and full > shard_bytes:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        write_safetensors(folder / WEIGHTS, entries)
        return
    place = dict[str, str]()
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / name, shard)
        place |= {entry.name: name for entry in shard}
    total = {"total_size": sum(entry.bytes for entry in entries)}
    write_json(folder / WEIGHTS_INDEX, {"metadata": total, "weight_map": place})


def entries_of(
    tensors: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor] = Tensor.detach
) -> list[Entry]:
    """Return tensors in memory, of any shapes, as entries to write, each as `gather` returns it."""
    return [
        Entry(name, tuple(tensor.shape), dtype_named(tensor.dtype), partial(gather, tensor))
        for name, tensor in tensors.items()
    ]
