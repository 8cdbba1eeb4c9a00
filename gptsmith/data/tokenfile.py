"""Read one file of tokens, and write one.

Knows nothing of text or batches. The header is that of llm.c and modded-nanogpt, so their published
shards can be read: 256 little-endian int32, of which three are used (magic number, version, number
of tokens), followed by the tokens.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..machine.files import DamagedError, flush_to_disk, sha256

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MOST_TOKENS = 2**31 - 1  # in one file: the header counts them in an int32
UINT16: np.dtype[Any] = np.dtype("<u2")
UINT32: np.dtype[Any] = np.dtype("<u4")
TOKEN_TYPES = {  # magic number and version -> dtype of a token; llm.c's for GPT-2 and for Llama 3
    (20240520, 1): UINT16,
    (20240801, 7): UINT32,
}
HEADERLESS = ("train.bin", "val.bin")  # nanoGPT's two files: only uint16 tokens


class Layout(NamedTuple):
    """The position and dtype of a file's tokens."""

    dtype: np.dtype[Any]
    offset: int  # bytes before the first token
    tokens: int


def layout(path: Path) -> Layout:
    """Read a shard's header and check it against the file's size; DamagedError if they differ.

    nanoGPT's files have no header, so only their names identify them; .npy files have NumPy's.
    """
    size = path.stat().st_size
    if size == 0:
        raise DamagedError(f"{path} is empty: a shard has a header and tokens")
    if path.suffix == ".npy":
        return numpy_layout(path, size)
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), "<i4")
    magic, version, count = header[:3].tolist()
    if size >= HEADER_BYTES and (magic, version) in TOKEN_TYPES:
        dtype = TOKEN_TYPES[magic, version]
        wanted = HEADER_BYTES + count * dtype.itemsize
        if count < 1:
            raise DamagedError(f"{path} has {count} tokens by its header: it was not finished")
        if size != wanted:
            state = "cut short" if size < wanted else "too long"
            raise DamagedError(
                f"{path} is {state}: its header says {count:,} tokens, which take {wanted:,} "
                f"bytes, but it has {size:,}"
            )
        return Layout(dtype, HEADER_BYTES, count)
    ours = any(magic == known for known, _ in TOKEN_TYPES)
    # 1,012 bytes of zeros are not tokens but a header, of an unknown kind.
    looks_like_header = size >= HEADER_BYTES and not header[3:].any()
    if path.name in HEADERLESS and not ours and not looks_like_header:
        if size % UINT16.itemsize:
            raise DamagedError(f"{path} has {size:,} bytes, which is not two for each token")
        return Layout(UINT16, 0, size // UINT16.itemsize)
    known = " or ".join(f"{number} version {each}" for number, each in TOKEN_TYPES)
    raise DamagedError(
        f"{path} begins with magic number {magic} version {version} in {size:,} bytes: "
        f"a token shard begins with {known}, in a header of {HEADER_BYTES:,} bytes"
    )


def numpy_layout(path: Path, size: int) -> Layout:
    """Read the header that `numpy.save` writes; DamagedError if it is not of a row of integers."""
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, _, dtype = read(file)
        except (ValueError, KeyError) as error:
            raise DamagedError(f"{path} is not a NumPy file: {error}") from error
        offset = file.tell()
    if len(shape) != 1 or dtype.kind not in "ui" or dtype.str.startswith(">"):
        raise DamagedError(f"{path} has {dtype} of shape {shape}: a row of integers is needed")
    wanted = offset + shape[0] * dtype.itemsize
    if size != wanted or not shape[0]:
        raise DamagedError(
            f"{path} has {size:,} bytes, but its header says {shape[0]:,} tokens: {wanted:,} bytes"
        )
    # Read without a sign, a negative number is beyond any vocabulary.
    return Layout(np.dtype(f"<u{dtype.itemsize}"), offset, shape[0])


class ShardWriter:
    """Writes tokens to PREFIX_000000.bin and so on, each with a header, in bounded memory."""

    def __init__(self, folder: Path, prefix: str, vocab_size: int, shard_tokens: int) -> None:
        if not 1 <= shard_tokens <= MOST_TOKENS:
            raise ValueError(f"shard_tokens is {shard_tokens:,}: 1 to {MOST_TOKENS:,} is needed")
        self.folder, self.prefix, self.vocab_size = folder, prefix, vocab_size
        self.dtype = UINT16 if vocab_size <= 1 << 16 else UINT32
        self.shard_tokens = shard_tokens
        self.tokens = 0  # written so far, in all shards
        self.shards: list[dict[str, Any]] = []  # finished: file, tokens, sha256
        self._file: Any = None
        self._count = 0  # tokens in the open shard

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            if self._file is not None:
                self._file.close()

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, (N,) of any integer type."""
        assert not tokens.size or tokens.max() < self.vocab_size, "an id beyond the vocabulary"
        tokens = tokens.astype(self.dtype, copy=False)
        while tokens.size:
            if self._file is None:
                self._begin()
            part, tokens = np.split(tokens, [self.shard_tokens - self._count])
            self._file.write(np.ascontiguousarray(part).data)
            self._count += part.size
            self.tokens += part.size
            if self._count == self.shard_tokens:
                self._finish()

    def _begin(self) -> None:
        """Open the next shard, and leave the place of its header empty until it is finished."""
        self._file = (self.folder / f"{self.prefix}_{len(self.shards):06d}.bin").open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._count = 0

    def _finish(self) -> None:
        """Write the header of the open shard, if any, and flush the file to the disk."""
        if self._file is None:
            return
        header = np.zeros(HEADER_INTS, "<i4")
        magic, version = next(key for key, dtype in TOKEN_TYPES.items() if dtype == self.dtype)
        header[:3] = magic, version, self._count
        with self._file as file:  # closed also where the disk is full
            file.seek(0)
            file.write(header.tobytes())
        self._file, path = None, Path(file.name)
        flush_to_disk(path)
        self.shards.append({"file": path.name, "tokens": self._count, "sha256": sha256(path)})
