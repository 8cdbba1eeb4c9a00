"""Let a model continue places of a text, and compare with how the text goes on.

What it continues word for word it has learned by heart. Knows nothing of splits or reports.

Shapes:  P places    T tokens of a prompt    N new tokens
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..config.settings import GREEDY, MemorizationSettings, SamplingSettings
from ..data.batches import Tokens
from ..generation.compiled import Decoder
from ..generation.writing import generate_tokens
from ..model.gpt import GPT

PROMPTS = 16, 32, 64  # tokens that a model is given ...
CONTINUED = 32  # ... and tokens that it has to know
NEAR = 3  # edits by which a near match may differ: a tenth
ATTEMPTS = 1000  # places drawn at most for each that is used: not all lie within a document
ROWS = 64  # texts that are generated at once


@dataclass(frozen=True)
class Passage:
    """A place of the training text, and how the model continues it after the longest prompt."""

    place: int  # in the training tokens: where the continuation begins
    prompt: list[int]
    wanted: list[int]
    written: list[int]
    distance: int  # edits between the two
    occurrences: int  # of what is wanted, in the training text


@dataclass(frozen=True)
class Extraction:
    """How many places of a text the model continues as the text goes on."""

    prompt_tokens: int
    places: int
    exact: int
    near: int  # within NEAR edits; exact ones too


def prompt_lengths(model: GPT) -> list[int]:
    """Return the lengths of prompts that the model's context holds; ValueError if there is none."""
    context_length = model.config.context_length
    lengths = [k for k in PROMPTS if k <= context_length]
    if not lengths:
        raise ValueError(
            f"the model's context of {context_length} tokens does not hold the shortest prompt, "
            f"which has {PROMPTS[0]}: it cannot be measured in this way"
        )
    return lengths


def sample_places(
    stream: Tokens, settings: MemorizationSettings, end: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw places within documents, with the 64 tokens before and the 32 after: (P,), (P, 96)."""
    width = PROMPTS[-1] + CONTINUED
    choices = max(0, len(stream) - width + 1)
    draw = np.random.default_rng(settings.seed)
    places, rows = [], []
    for start in draw.choice(choices, min(choices, ATTEMPTS * settings.places), replace=False):
        row = stream.read(int(start), int(start) + width)
        if end is None or not (row == end).any():
            places.append(int(start) + PROMPTS[-1])
            rows.append(row)
        if len(rows) == settings.places:
            break
    return np.array(places, np.int64), np.array(rows, np.int64).reshape(-1, width)


def continued(model: GPT, rows: np.ndarray, k: int, decoder: Decoder | None) -> np.ndarray:
    """Return what the model likes best after the k tokens before each place.  (P, 96) -> (P, N)"""
    prompts = torch.from_numpy(rows[:, PROMPTS[-1] - k : PROMPTS[-1]]).to(model.device)
    return generated(model, prompts, CONTINUED, GREEDY, 0, decoder)


def generated(
    model: GPT,
    prompts: Tensor,
    count: int,
    sampling: SamplingSettings,
    seed: int,
    decoder: Decoder | None,
) -> np.ndarray:
    """Continue prompts by `count` tokens, a batch at a time.  (P, T) -> (P, N)"""
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(prompts), ROWS):
        new = generate_tokens(
            model,
            prompts[start : start + ROWS],
            count,
            sampling=sampling,
            seed=seed + start,
            decoder=decoder,
        )
        found.append(torch.stack(list(new), dim=1).cpu().numpy())
    model.train(was_training)
    return np.concatenate(found)


def edit_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how many insertions, deletions and replacements make a row the other.

    (P, N), (P, M) -> (P,), by dynamic programming (Wagner and Fischer, 1974)
    """
    before = np.tile(np.arange(b.shape[1] + 1), (len(a), 1))  # (P, M + 1)
    for i in range(a.shape[1]):
        now = np.empty_like(before)
        now[:, 0] = i + 1
        replaced = before[:, :-1] + (a[:, i, None] != b)
        for j in range(b.shape[1]):
            now[:, j + 1] = np.minimum(replaced[:, j], 1 + np.minimum(before[:, j + 1], now[:, j]))
        before = now
    return before[:, -1]


def extraction(k: int, rows: np.ndarray, written: np.ndarray) -> Extraction:
    """Count the places whose continuation is right.  (P, 96), (P, N)"""
    distances = edit_distances(written, rows[:, -CONTINUED:])
    exact, near = int((distances == 0).sum()), int((distances <= NEAR).sum())
    return Extraction(k, len(rows), exact, near)


def passages(
    places: np.ndarray, rows: np.ndarray, written: np.ndarray, counts: list[int]
) -> list[Passage]:
    """Return each place (P,) of the training text, the best known first."""
    distances = edit_distances(written, rows[:, -CONTINUED:])
    found = [
        Passage(
            place=int(places[i]),
            prompt=rows[i, :-CONTINUED].tolist(),
            wanted=rows[i, -CONTINUED:].tolist(),
            written=written[i].tolist(),
            distance=int(distances[i]),
            occurrences=counts[i],
        )
        for i in range(len(rows))
    ]
    return sorted(found, key=lambda each: (each.distance, -each.occurrences, each.place))
