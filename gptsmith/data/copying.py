"""The built-in examples `copying`: random letters, and the same letters again.

Nothing but what stands before can tell the next letter of an answer, so a model that learns this
needs induction: to find the letter that it has just written among those of the prompt, and to look
at the one after it. Knows nothing of tokens or files.
"""

from collections.abc import Iterator
from random import Random
from string import ascii_lowercase

ROWS, SHORTEST, LONGEST = 20_000, 4, 16


def copying() -> Iterator[dict[str, str]]:
    """Yield rows of prompt and completion, always the same."""
    draw = Random(1)
    for _ in range(ROWS):
        letters = "".join(draw.choices(ascii_lowercase, k=draw.randint(SHORTEST, LONGEST)))
        yield {"prompt": letters, "completion": letters}
