"""Read the variables of a TensorFlow checkpoint, without TensorFlow.

A checkpoint is an index (a table in LevelDB's format whose values are protocol buffers) and files
of plain numbers. Knows nothing of GPT-2.
Sources: leveldb's `doc/table_format.md`, and `tensor_bundle.proto`, `tensor_shape.proto`,
`versions.proto` and `types.proto` of TensorFlow. Compressed blocks, sliced variables and big-endian
numbers are refused: TensorFlow never writes the first, and no known GPT-2 has the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import google_crc32c
import numpy as np

from ..config.cost import Shape
from ..machine.files import DamagedError

FOOTER = 48  # bytes: where two blocks are, and the magic number
MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
TRAILER = 5  # bytes after a block: its compression type and its checksum
VERSION = 1  # of bundles, the only one there is
FLOAT32 = 1  # among TensorFlow's data types
DTYPES = {2: "float64", 3: "int32", 9: "int64", 14: "bfloat16", 19: "float16"}

# Far more than any checkpoint has: an index beyond these limits is damaged.
MOST_BYTES, MOST_VARIABLES, LONGEST_NAME, MOST_DIMENSIONS = 1 << 26, 100_000, 512, 254

Message = dict[int, list[int | bytes]]  # the values of each field, by its number


class Variable(NamedTuple):
    """The position, dtype, shape and checksum of a variable."""

    dtype: int
    shape: Shape
    shard: int
    offset: int
    size: int  # bytes
    checksum: int


@dataclass(frozen=True)
class Bundle:
    """A checkpoint whose index has been read."""

    index: Path
    shards: int
    variables: dict[str, Variable]

    def file(self, shard: int) -> Path:
        """Return the path of one of the files with numbers."""
        return self.index.with_suffix(f".data-{shard:05}-of-{self.shards:05}")

    def check_float32(self, name: str) -> None:
        """Raise ValueError unless a variable is float32."""
        dtype = self.variables[name].dtype
        if dtype != FLOAT32:
            word = DTYPES.get(dtype, f"TensorFlow's data type {dtype}")
            raise ValueError(f"{self.index}: {name} is {word}, but float32 is needed")

    def read(self, name: str) -> np.ndarray:
        """Read a float32 variable; DamagedError if its checksum is wrong."""
        self.check_float32(name)
        variable = self.variables[name]
        path = self.file(variable.shard)
        count = prod(variable.shape)
        numbers = np.fromfile(path, "<f4", count, offset=variable.offset)
        if numbers.size != count or checksum(numbers) != variable.checksum:
            raise DamagedError(f"{path} was changed since it was written: {name} differs")
        return numbers.reshape(variable.shape)


def is_index(path: Path) -> bool:
    """Return whether a file ends like a table in LevelDB's format."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - len(MAGIC)))
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def checksum(data: bytes | np.ndarray) -> int:
    """Return the masked CRC-32C that files store: see leveldb's `util/crc32c.h`."""
    found = google_crc32c.value(data)
    return ((found >> 15 | found << 17) + 0xA282EAD8) & 0xFFFFFFFF


def open_bundle(index: Path) -> Bundle:
    """Open the checkpoint of an index; an error in one line if a file is missing or damaged."""
    try:
        bundle = _parse(index)
    except ValueError as error:
        kind = type(error)  # a DamagedError, or a ValueError for what is not understood
        raise kind(f"{index} cannot be read as a TensorFlow checkpoint: {error}") from error
    ends = dict.fromkeys(range(bundle.shards), 0)
    for variable in bundle.variables.values():
        ends[variable.shard] = max(ends[variable.shard], variable.offset + variable.size)
    for shard, end in ends.items():
        path = bundle.file(shard)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {index.name} lists it")
        if path.stat().st_size < end:
            size = path.stat().st_size
            raise DamagedError(f"{path} is cut short: {size:,} bytes, but {end:,} were written")
    return bundle


def _parse(index: Path) -> Bundle:
    if index.stat().st_size > MOST_BYTES:
        raise ValueError(f"{index.stat().st_size:,} bytes are no index's")
    records = _table(index.read_bytes())
    key, value = next(records, (None, b""))
    if key != b"":
        raise DamagedError("it does not begin with a header")
    shards = _header(_message(value))
    variables = dict[str, Variable]()
    for key, value in records:
        name = key.decode(errors="backslashreplace")
        variables[name] = _variable(name, _message(value), shards)
        if len(variables) > MOST_VARIABLES:
            raise ValueError(f"it has more than {MOST_VARIABLES:,} variables")
    return Bundle(index, shards, variables)


# -- the meaning of the records


def _header(header: Message) -> int:
    """Return the number of files with numbers; ValueError if the header is not supported."""
    version = _number(_message(header.get(3, [b""])[-1]), 2)
    if version > VERSION:
        raise ValueError(f"it needs a reader of version {version}, and this is one of {VERSION}")
    if _number(header, 2):
        raise ValueError("its numbers are a big-endian machine's: save it on an ordinary one")
    shards = _number(header, 1)
    if not 1 <= shards <= MOST_VARIABLES:
        raise DamagedError(f"it says that it has {shards} files")
    return shards


def _variable(name: str, entry: Message, shards: int) -> Variable:
    if 7 in entry:
        raise ValueError(f"{name} is stored in slices: save it whole")
    dimensions = _message(entry.get(2, [b""])[-1]).get(2, [])
    if len(dimensions) > MOST_DIMENSIONS:
        raise DamagedError(f"{name} has {len(dimensions)} dimensions")
    shape = tuple(_number(_message(dimension), 1) for dimension in dimensions)
    dtype, shard, offset, size, checksum = (_number(entry, n) for n in (1, 3, 4, 5, 6))
    if shard >= shards:
        raise DamagedError(f"{name} is in file {shard} of {shards}")
    if dtype == FLOAT32 and size != 4 * prod(shape):
        raise DamagedError(f"{name} is {shape}, but has {size} bytes")
    return Variable(dtype, shape, shard, offset, size, checksum)


# -- protocol buffers


def _message(data: int | bytes) -> Message:
    """Parse the fields of a message, which may itself be the value of a field."""
    if isinstance(data, int):
        raise DamagedError("a number is where a message should be")
    fields, at = Message(), 0
    while at < len(data):
        tag, at = _varint(data, at)
        value: int | bytes
        match tag & 7:
            case 0:
                value, at = _varint(data, at)
            case 1 | 5 as wire:
                size = 8 if wire == 1 else 4
                value = int.from_bytes(_cut(data, at, size), "little")
                at += size
            case 2:
                size, at = _varint(data, at)
                value = _cut(data, at, size)
                at += size
            case wire:
                raise DamagedError(f"a field is of the unknown kind {wire}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _number(fields: Message, field: int) -> int:
    """Return the number in a field: 0 if it is absent, the last one if it is repeated."""
    value = fields.get(field, [0])[-1]
    if isinstance(value, bytes):
        raise DamagedError("a message is where a number should be")
    return value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a varint (seven bits per byte, lowest first) and its end."""
    value = 0
    for shift in range(0, 70, 7):
        byte = _cut(data, at, 1)[0]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise DamagedError("a number has more than ten bytes")


def _cut(data: bytes, start: int, size: int) -> bytes:
    if start + size > len(data):
        raise DamagedError("it is cut short")
    return data[start : start + size]


# -- the table


def _table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values, in the order of the keys."""
    if len(data) < FOOTER or not data.endswith(MAGIC):
        raise DamagedError("its end is not a table's")
    footer = data[-FOOTER:]
    _, at = _handle(footer, 0)  # of the metaindex block, which is empty
    directory, _ = _handle(footer, at)
    end, previous = 0, None
    for _, handle in _records(_block(data, *directory)):
        (start, size), _ = _handle(handle, 0)
        if start < end:
            raise DamagedError("its blocks overlap")
        end = start + size
        for key, value in _records(_block(data, start, size)):
            if previous is not None and key <= previous:
                raise DamagedError("its names are out of order")
            yield key, value
            previous = key


def _handle(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Return a block's start and size, and the end of this handle."""
    start, at = _varint(data, at)
    size, at = _varint(data, at)
    return (start, size), at


def _block(data: bytes, start: int, size: int) -> bytes:
    """Return a block after verifying its checksum."""
    block = _cut(data, start, size + TRAILER)
    if checksum(block[:-4]) != int.from_bytes(block[-4:], "little"):
        raise DamagedError("a checksum differs")
    if block[size]:
        raise ValueError(f"it is compressed (kind {block[size]}), which TensorFlow never does")
    return block[:size]


def _records(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys and values of a block, in which a key shares a prefix with the one before."""
    restarts = int.from_bytes(_cut(block, max(0, len(block) - 4), 4), "little")
    end = len(block) - 4 * (restarts + 1)  # the list of complete keys, for binary search
    if end < 0:
        raise DamagedError("it is cut short")
    block, key, at = block[:end], b"", 0
    while at < end:
        shared, at = _varint(block, at)
        added, at = _varint(block, at)
        size, at = _varint(block, at)
        if shared > len(key) or shared + added > LONGEST_NAME:
            raise DamagedError("a name is not whole")
        key = key[:shared] + _cut(block, at, added)
        at += added
        yield key, _cut(block, at, size)
        at += size
