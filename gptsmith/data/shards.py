"""Read many shards as one long sequence, and open the folder that contains them.

Knows nothing of batches; `tokenfile.py` reads the header of one file.
"""

import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import SystemRandom
from typing import Any

import numpy as np

from ..config.fields import SettingError
from ..config.settings import Split
from ..machine.files import CHUNK_BYTES, DamagedError, chunks, read_json, sha256
from ..tokenizers import Tokenizer
from .tokenfile import layout

INFO = "dataset.json"
DATASET_FORMAT = "gptsmith-dataset"
DATASET_VERSION = 1

OPEN_SHARDS = 128  # mapped at once: far below the usual limit of 1,024 open files
MAPPED_BYTES = 1 << 28  # read before all maps are closed, so that resident memory is bounded
TOUCHED_BYTES = 1 << 17  # that the system may map around one small read


class TokenStream:
    """Several shards as one sequence of token ids; threads may read it in parallel."""

    def __init__(self, paths: Sequence[Path], *, mapped_bytes: int | None = None) -> None:
        self.paths, self.mapped_bytes = list(paths), mapped_bytes
        self.layouts = [layout(path) for path in self.paths]
        counts = [each.tokens for each in self.layouts]
        self.ends = np.cumsum(counts, dtype=np.int64)  # the end of each shard in the sequence
        self._maps: dict[int, np.ndarray] = {}
        self._touched = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.paths else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read the tokens from `start` up to `stop`, across shards: (stop - start,) int64."""
        assert 0 <= start <= stop <= len(self), f"{start}:{stop} of {len(self)} tokens"
        tokens = np.empty(stop - start, np.int64)
        done = start
        while done < stop:
            shard, within = self.place_of(done)
            count = min(stop - done, self.layouts[shard].tokens - within)
            tokens[done - start :][:count] = self._mapped(shard, count)[within : within + count]
            done += count
        return tokens

    def place_of(self, token: int) -> tuple[int, int]:
        """Return the number of the shard that has a token of the sequence, and its number there."""
        shard = int(np.searchsorted(self.ends, token, side="right"))
        return shard, token - int(self.ends[shard]) + self.layouts[shard].tokens

    def close(self) -> None:
        """Close the shards, as Windows removes no file that is mapped; reading opens them again."""
        with self._lock:
            self._maps.clear()

    def _mapped(self, shard: int, count: int) -> np.ndarray:
        """Return a shard's memory map. From time to time all are closed, which frees memory."""
        dtype, offset, length = self.layouts[shard]
        with self._lock:
            self._touched += count * dtype.itemsize + TOUCHED_BYTES
            full = len(self._maps) >= OPEN_SHARDS and shard not in self._maps
            if full or self._touched > (self.mapped_bytes or MAPPED_BYTES):
                self._maps.clear()
                self._touched = 0
            if shard not in self._maps:
                self._maps[shard] = np.memmap(self.paths[shard], dtype, "r", offset, (length,))
            return self._maps[shard]


# -- a folder of shards


@dataclass(frozen=True)
class Dataset:
    """A folder of shards: made by `prepare`, published for llm.c or as .npy, or nanoGPT's files."""

    folder: Path
    train: TokenStream
    validation: TokenStream | None  # None if nothing was held out
    fingerprint: str | None = None  # of the tokenizer; None if unknown
    vocab_size: int | None = None
    info: dict[str, Any] = field(default_factory=dict)  # dataset.json, or {}

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Open the dataset in a folder; FileNotFoundError or DamagedError in one line."""
        if not folder.is_dir():
            raise FileNotFoundError(f"no folder {folder}: one made by `gptsmith prepare` is needed")
        info = prepared_info(folder)
        if not info:
            paths, others = shard_paths(folder, "train"), shard_paths(folder, "val")
            if not paths:
                raise FileNotFoundError(
                    f"{folder} has no {INFO} and no train shards (*train*.bin or .npy): "
                    "make them from text with gptsmith prepare"
                )
            return cls(folder, TokenStream(paths), TokenStream(others) if others else None)
        try:
            train, tokenizer = open_split(folder, info["train"]), info["tokenizer"]
            held_out = open_split(folder, info["validation"]) if info["validation"] else None
            known = tokenizer["fingerprint"], tokenizer["vocab_size"]
        except (KeyError, TypeError) as error:
            raise DamagedError(f"{folder / INFO} lacks {error}: it was edited") from error
        return cls(folder, train, held_out, *known, info)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What tells this data from other data, wherever it lies: its tokenizer and its shards.

        A shard is known by its SHA-256 in dataset.json; one made by others by its size and the
        SHA-256 of its first megabyte.
        """
        found: dict[str, Any] = {"tokenizer": self.fingerprint}
        for split, stream in (("train", self.train), ("validation", self.validation)):
            listed = (self.info.get(split) or {}).get("shards", [])
            found[split] = [shard["sha256"] for shard in listed] or [
                {"bytes": path.stat().st_size, "head": head_sha256(path)}
                for path in (stream.paths if stream else ())
            ]
        return found

    def verify(self, *, sample_bytes: int | None = None) -> None:
        """Raise DamagedError if a shard's SHA-256 is not the one in dataset.json.

        Of more data than `sample_bytes`, random shards with about that many bytes are read.
        """
        splits = [self.info.get(split) or {} for split in ("train", "validation")]
        shards = [shard for split in splits for shard in split.get("shards", ())]
        read = 0
        for shard in SystemRandom().sample(shards, len(shards)):
            if sample_bytes is not None and read > sample_bytes:
                return
            path = self.folder / shard["file"]
            if sha256(path) != shard["sha256"]:
                raise DamagedError(f"{path} was changed since it was written (its SHA-256 differs)")
            read += path.stat().st_size

    def close(self) -> None:
        """Close the shards; reading opens them again."""
        for stream in (self.train, self.validation):
            if stream is not None:
                stream.close()

    def check_ids(self, vocab_size: int) -> None:
        """Raise ValueError if a token is outside the vocabulary; reads all of the data once."""
        for stream in (self.train, self.validation):
            for path, its in zip(stream.paths, stream.layouts, strict=True) if stream else ():
                parts = chunks(path, its.offset, its.tokens * its.dtype.itemsize)
                largest = max(int(np.frombuffer(part, its.dtype).max()) for part in parts)
                if largest >= vocab_size:
                    raise ValueError(
                        f"{path} has a token {largest:,}, but the vocabulary ends at "
                        f"{vocab_size - 1:,}: name the tokenizer that made it with --tokenizer"
                    )

    def tokens_for(
        self, tokenizer: Tokenizer | None, vocab_size: int, split: Split | None
    ) -> TokenStream:
        """Return a split, by default validation, or train if nothing was held out.

        ValueError if the tokens do not suit a model with this tokenizer and vocabulary.
        """
        if self.fingerprint is None or tokenizer is None:
            self.check_ids(vocab_size)
        elif self.fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"{self.folder} was made with another tokenizer than the model's: prepare the text "
                "again with the model's tokenizer"
            )
        if split == "validation" and self.validation is None:
            raise SettingError("split", f"is validation, but {self.folder} has none: use train")
        return self.train if split == "train" or self.validation is None else self.validation


def head_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file's first megabyte."""
    return hashlib.sha256(next(chunks(path, 0, CHUNK_BYTES), b"")).hexdigest()


def is_dataset(folder: Path) -> bool:
    """Return whether a folder contains shards of tokens, not text."""
    if shard_paths(folder, "train"):
        return True
    try:
        return bool(prepared_info(folder))
    except DamagedError:
        return False


def prepared_info(folder: Path) -> dict[str, Any]:
    """Return `dataset.json` of a folder made by prepare, else {}."""
    if not (folder / INFO).is_file():
        return {}
    info = read_json(folder / INFO)
    if info.get("format") != DATASET_FORMAT:
        return {}
    if info.get("version") != DATASET_VERSION:
        raise DamagedError(
            f"{folder / INFO} has version {info.get('version')!r}: "
            f"this gptsmith reads version {DATASET_VERSION}"
        )
    return info


def shard_paths(folder: Path, split: str) -> list[Path]:
    """Return the shards of a split, "train" or "val", by their names: fineweb_train_000001.bin."""
    word = re.compile(rf"(?<![a-z]){split}")  # at the start of a word: not in retrieval_000001.bin
    endings = (".bin", ".npy")
    return sorted(p for p in folder.glob("*") if p.suffix in endings and word.search(p.stem))


def open_split(folder: Path, split: dict[str, Any]) -> TokenStream:
    """Open the shards of one split in dataset.json; DamagedError if their sizes differ."""
    paths = []
    for shard in split["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            raise DamagedError(f"{path} is missing, though {INFO} lists it")
        paths.append(path)
    stream = TokenStream(paths)
    for each, shard in zip(stream.layouts, split["shards"], strict=True):
        if each.tokens != shard["tokens"]:
            raise DamagedError(
                f"{folder / shard['file']} has {each.tokens:,} tokens, "
                f"but {INFO} says {shard['tokens']:,}"
            )
    return stream
