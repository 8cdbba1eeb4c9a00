"""Read the characters in nanoGPT's `meta.pkl`, without running any code in it."""

import pickle
from pathlib import Path
from typing import Any

CHARACTERS = "meta.pkl"
MOST_BYTES = 1 << 24  # a vocabulary is thousands of times smaller


def read_characters(path: Path) -> dict[str, int]:
    """Return the characters of a `meta.pkl`, with nanoGPT's ids."""
    meta = load_plain_pickle(path)
    ids = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(ids, dict) or sorted(map(str, ids.values())) != sorted(
        map(str, range(len(ids)))
    ):
        raise ValueError(f"{path} has no 'stoi' that maps characters to consecutive ids from 0")
    if odd := [key for key in ids if not isinstance(key, str) or len(key) != 1]:
        raise ValueError(f"{path}: {odd[0]!r} in 'stoi' is not a character")
    return ids


class _NoGlobals(pickle.Unpickler):
    """Unpickles numbers, strings and containers; refuses every class and function."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it needs {module}.{name}")


def load_plain_pickle(path: Path) -> Any:
    """Load the plain values in a pickle; ValueError if it needs any class or function."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes: too many for a vocabulary")
    try:
        with path.open("rb") as file:
            return _NoGlobals(file).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise any exception
        raise ValueError(f"{path} is not a plain pickle: {error}") from error
