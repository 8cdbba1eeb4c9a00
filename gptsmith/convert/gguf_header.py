"""The header of a GGUF file: what it says of itself, and where its tensors lie.

Knows nothing of models. The `gguf` package has a reader too, which is not used: it runs on and on
where a damaged file promises a long list, and with GPT-2's tokenizer it takes 3.3 s and 120 MB for
what takes 0.09 s here.
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
    """The `gguf` package, of llama.cpp's own makers."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            "GGUF needs llama.cpp's own package: pip install 'gptsmith[gguf]'"
        ) from error
    return gguf


class Cursor:
    """A header, read from its start; no length in it is believed beyond the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.left = path.stat().st_size

    def take(self, count: int) -> bytes:
        """The next bytes; DamagedError where the file ends before."""
        if count > self.left:
            raise DamagedError(f"{self.path} is cut short: it ends within its header")
        self.left -= count
        return self.file.read(count)

    def number(self, form: str) -> Any:
        """The next number, in the letters of `struct`."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        """The next string."""
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise DamagedError(f"{self.path} is not a whole GGUF file: {error}") from error

    def value(self) -> Any:
        """The next value, or list of values, after the number that says of what kind."""
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
                f"{self.path} is not a whole GGUF file: it has values of kind {kind}"
            )
        return found if many else found[0]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """What a file says of itself, and where its tensors lie."""
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
            raise DamagedError(f"{path} is not a whole GGUF file: a name is there twice")
        end, size = file.tell(), path.stat().st_size
    tensors = place_tensors(path, found, aligned(path, values, end))
    if (needed := max((t.start + t.bytes for t in tensors.values()), default=0)) > size:
        raise DamagedError(f"{path} is cut short: {size:,} bytes of {needed:,}")
    return values, tensors


def aligned(path: Path, values: Mapping[str, Any], end: int) -> int:
    """Where the tensors begin, after a header that ends there."""
    alignment = values.get("general.alignment", 32)  # llama.cpp's default
    if not isinstance(alignment, int) or alignment < 1:
        raise DamagedError(f"{path} is not a whole GGUF file: its alignment is {alignment!r}")
    return -(-end // alignment) * alignment


def place_tensors(
    path: Path, found: Mapping[str, tuple[Shape, int, int]], start: int
) -> dict[str, TensorInfo]:
    """Where each tensor lies, by what the header says of its shape, type and offset."""
    gguf, tensors = library(), dict[str, TensorInfo]()
    for name, (shape, number, offset) in found.items():
        try:
            type = gguf.GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{path}: {name} is in numbers of an unknown kind, {number}") from None
        block, size = gguf.GGML_QUANT_SIZES[type]
        if shape and shape[-1] % block:
            raise DamagedError(f"{path}: {name} is {shape}, whose rows are no blocks of {block}")
        size = prod(shape) // block * size
        tensors[name] = TensorInfo(path, shape, type.name, start + offset, size)
    return tensors
