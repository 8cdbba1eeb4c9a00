"""Read and write one file of tokens.

Knows nothing of text or batches. The header is that of llm.c and modded-nanogpt, so their published
shards can be read: 256 little-endian int32, of which three are used (magic number, version, number
of tokens), followed by the tokens.
"""

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from ..machine.files import DamagedError, chunks, flush_to_disk, sha256

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MOST_TOKENS = 2**31 - 1  # in one file: the header counts them in an int32
SMALL_VOCABULARY = 2**16  # the largest whose ids fit into uint16
UINT16: np.dtype[Any] = np.dtype("<u2")
UINT32: np.dtype[Any] = np.dtype("<u4")
FORMATS = {  # magic number and version -> dtype of a token; llm.c's for GPT-2 and for Llama 3
    (20240520, 1): UINT16,
    (20240801, 7): UINT32,
}
HEADERLESS = ("train.bin", "val.bin")  # nanoGPT's two files: only uint16 tokens


# -- reading


class Layout(NamedTuple):
    """The position and dtype of a file's tokens."""

    dtype: np.dtype[Any]
    offset: int  # bytes before the first token
    tokens: int


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype that stores a vocabulary's tokens: uint16 if they fit, else uint32."""
    return UINT16 if vocab_size <= SMALL_VOCABULARY else UINT32


def layout(path: Path) -> Layout:
    """Read a shard's header and check it against the file's size; DamagedError if they differ."""
    size = path.stat().st_size
    if size == 0:
        raise DamagedError(f"{path} is empty: a shard has a header and tokens")
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    header = np.frombuffer(start[: len(start) // 4 * 4], "<i4")
    magic, version = (int(number) for number in header[:2]) if header.size > 1 else (0, 0)
    if size < HEADER_BYTES or (magic, version) not in FORMATS:
        return headerless_layout(path, size, header)
    dtype = FORMATS[magic, version]
    count, wanted = int(header[2]), HEADER_BYTES + int(header[2]) * dtype.itemsize
    if count < 1:
        raise DamagedError(f"{path} has {count} tokens by its header: it was not finished")
    if size != wanted:
        state = "cut short" if size < wanted else "too long"
        raise DamagedError(
            f"{path} is {state}: its header says {count:,} tokens, which take {wanted:,} bytes, "
            f"but it has {size:,}"
        )
    return Layout(dtype, HEADER_BYTES, count)


def headerless_layout(path: Path, size: int, header: np.ndarray) -> Layout:
    """Return the layout of nanoGPT's files, which only their names identify."""
    magic, version = (int(number) for number in header[:2]) if header.size > 1 else (0, 0)
    ours = any(magic == known for known, _ in FORMATS)
    # 1,012 bytes of zeros are not tokens but a header, of an unknown kind.
    looks_like_header = header.size == HEADER_INTS and not header[3:].any()
    if path.name in HEADERLESS and not ours and not looks_like_header:
        if size % UINT16.itemsize:
            raise DamagedError(f"{path} has {size:,} bytes, which is not two for each token")
        return Layout(UINT16, 0, size // UINT16.itemsize)
    known = " or ".join(f"{number} version {each}" for number, each in FORMATS)
    raise DamagedError(
        f"{path} begins with magic number {magic} version {version} in {size:,} bytes: "
        f"a token shard begins with {known}, in a header of {HEADER_BYTES:,} bytes"
    )


def largest_token(path: Path) -> int:
    """Return the largest token of a file, reading all of it in chunks."""
    dtype, offset, count = layout(path)
    parts = chunks(path, offset, count * dtype.itemsize)
    return max(int(np.frombuffer(part, dtype).max()) for part in parts)


# -- writing


class ShardWriter:
    """Writes tokens to PREFIX_000000.bin and so on, each with a header, in bounded memory."""

    def __init__(self, folder: Path, prefix: str, vocab_size: int, shard_tokens: int) -> None:
        if not 1 <= shard_tokens <= MOST_TOKENS:
            raise ValueError(f"shard_tokens is {shard_tokens:,}: 1 to {MOST_TOKENS:,} is needed")
        self.folder, self.prefix, self.vocab_size = folder, prefix, vocab_size
        self.dtype = dtype_for(vocab_size)
        self.shard_tokens = shard_tokens
        self.tokens = 0  # written so far, in all shards
        self.shards: list[dict[str, Any]] = []  # finished: file, tokens, sha256
        self._file: Any = None
        self._count = 0  # tokens in the open shard

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._file is not None:
            self._file.close()

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens, (N,) of any integer type."""
        assert tokens.size == 0 or int(tokens.max()) < self.vocab_size, (
            "an id beyond the vocabulary"
        )
        tokens = tokens.astype(self.dtype, copy=False)
        while tokens.size:
            if self._file is None:
                self._begin()
            part, tokens = np.split(tokens, [self.shard_tokens - self._count])
            data = np.ascontiguousarray(part).data
            self._file.write(data)
            self._digest.update(data)
            self._count += part.size
            self.tokens += part.size
            if self._count == self.shard_tokens:
                self.finish()

    def finish(self) -> list[dict[str, Any]]:
        """Close the open shard, if any, and flush it to the disk; return all shards so far."""
        if self._file is None:
            return self.shards
        short = self._count < self.shard_tokens
        if short:
            self._file.seek(0)
            self._file.write(self._header(self._count))
        path = Path(self._file.name)
        self._file.close()
        self._file = None
        flush_to_disk(path)
        # The digest started with the header of a full shard. A short one (the last) is read again.
        digest = sha256(path) if short else self._digest.hexdigest()
        self.shards.append({"file": path.name, "tokens": self._count, "sha256": digest})
        return self.shards

    def _begin(self) -> None:
        header = self._header(self.shard_tokens)
        self._file = (self.folder / f"{self.prefix}_{len(self.shards):06d}.bin").open("wb")
        self._file.write(header)
        self._digest = hashlib.sha256(header)
        self._count = 0

    def _header(self, count: int) -> bytes:
        header = np.zeros(HEADER_INTS, "<i4")
        magic, version = next(key for key, dtype in FORMATS.items() if dtype == self.dtype)
        header[:3] = magic, version, count
        return header.tobytes()
