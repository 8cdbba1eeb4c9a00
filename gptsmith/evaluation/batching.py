"""Divide rows of different lengths over forward passes, so that little of them is padding.

Knows nothing of models or of what is in a row.
"""

from collections.abc import Iterator, Sequence

BATCH_TOKENS = 8192  # tokens of a forward pass, padding included; memory and speed depend on it


def batches_by_length(
    lengths: Sequence[int], *, alone: bool = False, tokens: int = BATCH_TOKENS
) -> Iterator[list[int]]:
    """Yield the numbers of the rows of each batch, longest first; single ones if `alone`.

    A batch is not mostly padding: its shortest row has more than half of the longest's tokens.
    """
    batch = list[int]()
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        longest = lengths[batch[0]] if batch else 0
        full = (len(batch) + 1) * longest > tokens or 2 * lengths[number] <= longest
        if batch and (alone or full):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
