"""The built-in examples `sorting`: six letters from A to C, and the same letters sorted.

There are 729 of them, few enough to try a model on all, and to see what it does on average. Knows
nothing of tokens or files.
"""

from collections.abc import Iterator
from itertools import product

LETTERS, LENGTH = "ABC", 6


def sorting() -> Iterator[dict[str, str]]:
    """Yield a row of prompt and completion for all inputs, in alphabetical order."""
    for letters in product(LETTERS, repeat=LENGTH):
        yield {"prompt": "".join(letters), "completion": "".join(sorted(letters))}
