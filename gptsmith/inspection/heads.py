"""Score what each attention head looks at: the previous token, equal tokens, what followed them.

The scores of the first three are those of TransformerLens's `head_detector` with the error measure
"mul": the share of a head's attention that lies where such a head would look.

Shapes:  B batch    T tokens    L layers    H heads
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..model.gpt import GPT
from .recording import record

KINDS = {
    "previous": "previous token",
    "duplicate": "duplicate token",
    "induction": "induction",
    "first": "first token",
}
ROWS = 8  # of random tokens; with more, the scores change in their third digit
LONGEST_HALF = 50  # tokens that are repeated
NAMED = 1 / 3  # of the score that a head can reach, which it needs to be named after it


def patterns(tokens: Tensor) -> dict[str, Tensor]:
    """Return for each kind of head where it looks: 1 there, else 0.  (B, T) -> each (B, T, T)"""
    B, T = tokens.shape
    earlier = torch.ones(T, T, device=tokens.device).tril(-1)  # keys before the query
    equal = (tokens.unsqueeze(2) == tokens.unsqueeze(1)) * earlier  # (B, T, T)
    # An induction head finds an earlier token like its own, and looks at the one after it.
    followed = torch.zeros_like(equal)
    followed[:, :, 1:] = equal[:, :, :-1]
    previous, first = torch.diag(earlier.new_ones(T - 1), -1), torch.zeros_like(earlier)
    first[:, 0] = 1
    return {
        "previous": previous.expand(B, T, T),
        "duplicate": equal,
        "induction": followed,
        "first": first.expand(B, T, T),
    }


def pattern_scores(weights: Tensor, tokens: Tensor) -> dict[str, np.ndarray]:
    """Return for each kind the share of each head's attention that lies on its pattern.

    (L, B, H, T, T), (B, T) -> each (L, H), means over the rows
    """
    T = tokens.shape[1]  # each query's attention adds up to 1, a head's to T
    return {
        kind: ((weights * where.unsqueeze(1)).sum((-2, -1)) / T).mean(1).cpu().numpy()
        for kind, where in patterns(tokens).items()
    }


def repeated_tokens(vocab_size: int, half: int, *, rows: int = ROWS, seed: int = 0) -> Tensor:
    """Return rows of random tokens, each followed by the same tokens again.  -> (rows, 2 half)

    The tokens of a row differ, as far as the vocabulary has so many.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(vocab_size, generator=generator) for _ in range(rows)]
    once = torch.stack([row.repeat(half // vocab_size + 1)[:half] for row in drawn])
    return torch.cat((once, once), dim=1)


def tested_half(model: GPT) -> int:
    """Return how many random tokens a model is tested on; ValueError if too few fit twice."""
    half = min(LONGEST_HALF, model.config.context_length // 2)
    if half < 2:
        raise ValueError(
            f"the context_length is {model.config.context_length}: heads are scored on tokens that "
            "are repeated, which takes 4"
        )
    return half


def head_scores(
    model: GPT, *, vocab_size: int | None = None, rows: int = ROWS, seed: int = 0
) -> dict[str, np.ndarray]:
    """Return each kind's scores of all heads on random tokens repeated twice.  -> each (L, H)

    `vocab_size` is the tokenizer's, where the model's is padded. ValueError for a context of less
    than 4 tokens.
    """
    vocab_size = vocab_size or model.config.vocab_size
    tokens = repeated_tokens(vocab_size, tested_half(model), rows=rows, seed=seed)
    # A row at a time: the weights of a batch would be the largest tensors by far.
    each = [
        pattern_scores(record(model, row).weights, row) for row in tokens.to(model.device).split(1)
    ]
    return {kind: np.mean([scores[kind] for scores in each], axis=0) for kind in KINDS}


def highest_scores(tokens: Tensor) -> dict[str, float]:
    """Return the score of a head that looks nowhere else, for each kind.  (B, T)

    A query without a place to look at, such as the first for the previous token, counts as missed.
    """
    return {
        kind: (where.sum(-1) > 0).float().mean().item() for kind, where in patterns(tokens).items()
    }


def names(scores: Mapping[str, np.ndarray], highest: Mapping[str, float]) -> list[list[str]]:
    """Return the kind of each head, "" for none: where its share of the highest score is largest.

    each (L, H) -> (L, H)
    """
    kinds = list(KINDS)
    shares = np.stack([scores[kind] / highest[kind] for kind in kinds])  # (kinds, L, H)
    best = shares.argmax(0)
    return [
        [kinds[kind] if share >= NAMED else "" for kind, share in zip(*row, strict=True)]
        for row in zip(best, shares.max(0), strict=True)
    ]
