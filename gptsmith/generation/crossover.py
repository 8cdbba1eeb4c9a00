"""Up to how many tokens the compiled step is faster than PyTorch: measured once per model shape.

Knows nothing of how either computes.

Shapes:  B rows of the cache    T tokens of a row    V vocabulary
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..machine import chooser
from ..model.cache import KVCache
from ..model.gpt import GPT
from ..model.quantized import packed_bits

# Numbers of tokens that are tried. Both ways are near each other between the last that the compiled
# step wins and the next.
COUNTS = (1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
SECONDS = 0.3  # of measuring for each number
QUESTION = "rows"


class Step(Protocol):
    """The compiled step of a model."""

    model: GPT

    def logits(
        self,
        tokens: Sequence[int],
        texts: Sequence[int],
        places: Sequence[int],
        wanted: Sequence[int],
        cache: KVCache,
    ) -> Tensor:
        """Read tokens and return the logits after the wanted ones.  -> (W, V)"""


def remembered_rows(model: GPT) -> int | None:
    """Return the most tokens that the compiled step reads faster; None if it was not measured."""
    rows = chooser.recall(QUESTION, about(model)).get("rows")
    return None if rows is None else int(rows)


def about(model: GPT) -> tuple[Any, ...]:
    """Return what the speeds depend on: the model's shape, and the precision of its weights."""
    config = replace(model.config, init="gpt2", dropout=0.0)
    return asdict(config), str(model.dtype), packed_bits(model)


def tune(step: Step) -> None:
    """Measure and remember how many tokens a compiled step reads faster, unless that is known.

    It takes about two seconds for 124M parameters. Call it before the step is used.
    """
    if remembered_rows(step.model) is None:
        with suppress(OSError):  # then it is measured again next time
            chooser.remember(QUESTION, about(step.model), {"rows": measured_rows(step)})


def measured_rows(step: Step) -> int:
    """Return the last of COUNTS at which the compiled step is faster, by bisection."""
    wins, loses = 0, len(COUNTS)  # one token it always reads faster
    while loses - wins > 1:
        middle = (wins + loses) // 2
        if is_faster(step, COUNTS[middle]):
            wins = middle
        else:
            loses = middle
    return COUNTS[wins]


@torch.inference_mode()
def is_faster(step: Step, count: int) -> bool:
    """Whether the compiled step reads so many tokens faster than PyTorch, in the fewest rows."""
    model = step.model
    T = min(count, model.config.context_length)
    tokens = torch.zeros(max(1, count // T), T, dtype=torch.long)  # (B, T)
    cache = KVCache(model.config, len(tokens), capacity=T, dtype=model.dtype)
    ids, texts = tokens.flatten().tolist(), [row for row in range(len(tokens)) for _ in range(T)]
    places, ends = [*range(T)] * len(tokens), range(T - 1, len(ids), T)

    def read(way: str) -> None:
        if way == "compiled":
            step.logits(ids, texts, places, ends, cache)
        else:
            cache.hold([0] * len(tokens))
            model.lm_head(model.features(tokens, cache)[:, -1:])  # (B, 1, V)

    ways = ["compiled", "pytorch"]
    choice = chooser.choose(ways, lambda way: chooser.timed(lambda: read(way)), budget=SECONDS)
    return choice.name == "compiled"
