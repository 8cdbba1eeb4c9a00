"""Compute the batch of examples of any step from the seed and the step alone, as `batches.py` does.

In each epoch the examples come in another order. Knows nothing of models or of how examples are
stored.

Shapes:  R examples of this process    T tokens of the longest row
"""

from typing import Protocol

import numpy as np

from ..config.fields import SettingError
from .batches import epoch_words, permuted

PADDING = 0  # an id that no target follows, and that no token of the row before it sees
NOT_LEARNED = -1


class Rows(Protocol):
    """The examples of a split, such as `encoded.ExampleRows`."""

    @property
    def lengths(self) -> np.ndarray:
        """The tokens of the longest row of each example, (N,)."""
        ...

    def __len__(self) -> int: ...

    def read(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]: ...


class ExampleBatches:
    """Batches of `rows` examples, each at most once per epoch, in a seeded order.

    What is left over when an epoch's examples do not divide into batches, others in each epoch, is
    passed over. Within a batch the longest come first, so that a micro-batch of the shorter ones
    can be cut.
    """

    def __init__(
        self,
        examples: Rows,
        rows: int,
        *,
        seed: int,
        group: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """The examples of each `group` batches are sorted by length, for similar ones in each."""
        if not world_size <= rows <= len(examples):
            raise SettingError(
                "batch_rows",
                f"is {rows}: from {world_size} (processes) to {len(examples)} (examples to learn "
                "from) is needed",
            )
        self.examples, self.rows, self.seed, self.rank = examples, rows, seed, rank
        self.group = group
        self.epoch_steps = len(examples) // rows
        self.mine = np.arange(rank, rows, world_size)
        self.row_tokens = int(examples.lengths.max()) * len(examples.read(0))

    def at(self, step: int) -> tuple[np.ndarray, ...]:
        """Return this process's part of a step's batch: tokens and targets, (R, T) int64 each.

        Examples of two rows give (R, 2, T). T is that of the global batch, as dropout numbers the
        attention weights of a row by it. Steps count from 0.
        """
        numbers = self.numbers(step)
        longest = int(self.examples.lengths[numbers].max())
        return padded([self.examples.read(int(number)) for number in numbers[self.mine]], longest)

    def numbers(self, step: int) -> np.ndarray:
        """Return the examples of a step's global batch, the longest first.  -> (rows,)"""
        epoch, place = divmod(step, self.epoch_steps)
        *keys, word = epoch_words(self.seed, epoch)
        group, turn = divmod(place, self.group)
        first, last = group * self.group, min((group + 1) * self.group, self.epoch_steps)
        places = range(first * self.rows, last * self.rows)
        numbers = np.array([permuted(each, len(self.examples), keys) for each in places])
        numbers = numbers[np.argsort(-self.examples.lengths[numbers], kind="stable")]
        chosen = permuted(turn, last - first, [key ^ word for key in keys])
        return numbers.reshape(-1, self.rows)[chosen]

    def tokens(self, step: int) -> int:
        """Return the tokens of a step's global batch, of the longest row of each example."""
        return int(self.examples.lengths[self.numbers(step)].sum())


def padded(
    examples: list[list[tuple[np.ndarray, np.ndarray]]], length: int | None = None
) -> tuple[np.ndarray, ...]:
    """Return examples as tokens and targets, filled on the right: (R, T) each, or (R, 2, T).

    T is `length`, by default that of the longest row.
    """
    rows = [row for example in examples for row in example]
    T = length or max(len(tokens) for tokens, _ in rows)
    found = []
    for part, filler in enumerate((PADDING, NOT_LEARNED)):
        array = np.full((len(rows), T), filler, np.int64)
        for line, row in zip(array, rows, strict=True):
            line[: len(row[part])] = row[part]
        shape = (len(examples), T) if len(rows) == len(examples) else (len(examples), -1, T)
        found.append(array.reshape(shape))
    return tuple(found)
