"""Look at a model at each checkpoint of its run: which heads appear, and what its layers say.

Knows nothing of runs or folders; models come one after another.

Shapes:  T tokens    L layers    H heads
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..model.gpt import GPT
from .heads import head_scores
from .lens import Lens, logit_lens, surprise
from .recording import record


@dataclass(frozen=True)
class Moment:
    """What a model was like after a number of steps."""

    step: int
    loss: float | None  # of the prompt, nats per token; None if it has a single token
    scores: dict[str, np.ndarray]  # of each kind of head, (L, H)
    weights: np.ndarray  # (L, H, T, T), attention over the prompt
    lens: Lens


def moments(
    models: Iterable[tuple[int, GPT]], tokens: Sequence[int], *, vocab_size: int = 0
) -> Iterator[Moment]:
    """Yield what each model, given with its step, makes of tokens (T,)."""
    for step, model in models:
        recording = record(model, torch.tensor([tokens], device=model.device))
        nats = surprise(model, recording).nats
        yield Moment(
            step=step,
            loss=float(nats.mean()) if len(nats) else None,
            scores=head_scores(model, vocab_size=vocab_size),
            weights=recording.weights[:, 0].float().cpu().numpy(),
            lens=logit_lens(model, recording),
        )
