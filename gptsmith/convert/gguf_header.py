"""Read the header of a GGUF file: its values, and the positions of its tensors.

Knows nothing of models. The `gguf` package's own reader is not used: it practically hangs if a
damaged file announces a long list, and for GPT-2's tokenizer it takes 3.3 s and 120 MB, where this
takes 0.09 s.
"""

import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from ..checkpoint.names import TensorInfo
from ..config.cost import Shape
from ..machine.files import DamagedError

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1, of 2023, had shorter lengths, before llama.cpp ran GPT-2
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_TEXT, _LIST = 8, 9


def library() -> Any:
    """Import the `gguf` package, which llama.cpp's authors publish."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF needs llama.cpp's own package: pip install 'gptsmith[gguf]'"
        ) from error
    return gguf


class Cursor:
    """Reads a header from its start, and refuses lengths beyond the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left = path.stat().st_size

    def take(self, count: int) -> bytes:
        """Return the next bytes; DamagedError if the file ends before."""
        if count > self.left:
            raise DamagedError(f"{self.path} is cut short: it ends within its header")
        self.left -= count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        """Return the next number, in `struct`'s format."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        """Return the next string."""
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise DamagedError(f"{self.path} is not an intact GGUF file: {error}") from error

    def value(self) -> Any:
        """Return the next value or list of values, which follows the number of its type."""
        kind = self.number("I")
        many = kind == _LIST
        kind, count = (self.number("I"), self.number("Q")) if many else (kind, 1)
        if kind == _TEXT:
            found = [self.text() for _ in range(count)]
        elif kind in _NUMBERS:
            size = struct.calcsize(_NUMBERS[kind])
            data = self.take(count * size)
            found = [n for (n,) in struct.iter_unpack(f"<{_NUMBERS[kind]}", data)]
        else:
            raise DamagedError(
                f"{self.path} is not an intact GGUF file: it has values of unknown type {kind}"
            )
        return found if many else found[0]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return a file's values by key, and its tensors by name."""
    with path.open("rb") as file:
        cursor = Cursor(file, path)
        magic, version = cursor.take(4), cursor.number("I")
        if magic != MAGIC or version not in VERSIONS:
            raise ValueError(f"{path} is {magic!r} version {version}: GGUF 2 or 3 is needed")
        count, keys = cursor.number("Q"), cursor.number("Q")
        values = dict[str, Any]()
        for _ in range(keys):
            key = cursor.text()
            values[key] = cursor.value()
        found = dict[str, tuple[Shape, int, int]]()
        for _ in range(count):
            name, axes = cursor.text(), cursor.number("I")
            shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
            found[name] = shape, cursor.number("I"), cursor.number("Q")
        if len(values) < keys or len(found) < count:
            raise DamagedError(f"{path} is not an intact GGUF file: it has the same name twice")
        end, size = file.tell(), path.stat().st_size
    tensors = place_tensors(path, found, aligned(path, values, end))
    if (needed := max((t.start + t.bytes for t in tensors.values()), default=0)) > size:
        raise DamagedError(f"{path} is cut short: {size:,} bytes of {needed:,}")
    return values, tensors


def aligned(path: Path, values: Mapping[str, Any], end: int) -> int:
    """Return where the tensors begin, after a header that ends at `end`."""
    alignment = values.get("general.alignment", 32)  # llama.cpp's default
    if not isinstance(alignment, int) or alignment < 1:
        raise DamagedError(f"{path} is not an intact GGUF file: its alignment is {alignment!r}")
    return -(-end // alignment) * alignment


def place_tensors(
    path: Path, found: Mapping[str, tuple[Shape, int, int]], start: int
) -> dict[str, TensorInfo]:
    """Return the position of each tensor, given its shape, type and offset in the header."""
    gguf, tensors = library(), dict[str, TensorInfo]()
    for name, (shape, number, offset) in found.items():
        try:
            type = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{path}: {name} has an unknown number format, {number}") from None
        block, size = gguf.GGML_QUANT_SIZES[type]
        if shape and shape[-1] % block:
            raise DamagedError(
                f"{path}: {name} is {shape}: its rows are not whole blocks of {block}"
            )
        size = prod(shape) // block * size
        tensors[name] = TensorInfo(path, shape, type.name, start + offset, size)
    return tensors
