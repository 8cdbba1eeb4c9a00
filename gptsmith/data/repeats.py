"""Find documents that repeat others, and validation text that occurs in the training text.

Exact repeats are found by a digest of each document; stretches within documents by a sample of the
validation tokens. Knows nothing of how text is read or written.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .batches import Tokens
from .overlap import NOWHERE, Grams

DIGEST_BYTES = 16  # for each document, all that is kept of it
STRETCH = 50  # tokens that repeat by chance only in boilerplate
STEP = 32  # tokens between the places of the training text that are looked at
STRETCHES = 1000  # of the validation text that are sought
TOO_MUCH = 0.05  # share of them in the training text that is worth a warning; prose has none


def new_digest() -> "hashlib.blake2b":
    """Return the digest by which documents are compared, still of no text."""
    return hashlib.blake2b(digest_size=DIGEST_BYTES)


def each_digest(digests: bytearray) -> Iterator[bytes]:
    """Yield the digests that lie one after another."""
    return (bytes(digests[i : i + DIGEST_BYTES]) for i in range(0, len(digests), DIGEST_BYTES))


def repeats_of_earlier(digests: bytearray) -> bytes:
    """Return a byte for each document: 1 if it repeats an earlier one, else 0."""
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)  # (documents, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))  # equal ones in their order
    ordered = halves[order]
    repeated = np.zeros(len(order), np.uint8)
    repeated[order[1:]] = (ordered[1:] == ordered[:-1]).all(-1)
    return repeated.tobytes()


def documents_in_training(train: bytearray, validation: bytearray) -> int:
    """Return how many validation documents are training documents too, by their digests."""
    common = {*each_digest(validation)}.intersection(each_digest(train))
    return sum(digest in common for digest in each_digest(validation))


def stretches_in_training(train: Tokens, validation: Tokens, end: int | None) -> tuple[int, int]:
    """Return how many stretches of validation tokens were sought in the training tokens, and found.

    They are evenly spaced, lie within documents, which `end` ends, and are as long as it takes to
    find 50 repeated tokens at every 32nd place of the training text only: 81 tokens. A shorter
    repeat within one may be found too.
    """
    length = STRETCH + STEP - 1
    if len(validation) < length:
        return 0, 0
    starts = np.unique(np.linspace(0, len(validation) - length, STRETCHES).astype(np.int64))
    rows = np.stack([validation.read(start, start + length) for start in starts.tolist()])
    if end is not None:
        rows = rows[(rows[:, :-1] != end).all(-1)]
    if not len(rows):
        return 0, 0
    places = Grams(rows, STRETCH).first_places(train, every=STEP)
    return len(rows), int((places.reshape(len(rows), STEP) != NOWHERE).any(-1).sum())


def warnings_of(overlap: dict[str, Any], documents: int) -> Iterator[str]:
    """Yield what is worth a warning in `overlap`, as dataset.json has it.

    `documents` is the number of validation documents.
    """
    same, sought, found = (overlap[key] for key in ("documents", "stretches", "repeated_stretches"))
    if same:
        yield (
            f"{same:,} of {documents:,} validation documents are in the training text too, word "
            "for word, which makes the validation loss lower: --deduplicate drops such repeats"
        )
    if sought and found / sought >= TOO_MUCH:
        yield (
            f"about {found / sought:.0%} of the validation text is in the training text too, "
            f"{STRETCH} tokens or more at a time, which makes the validation loss lower: "
            "`gptsmith evaluate MODEL --memorization --data DATA` shows what"
        )
