"""The logit lens: what the model would predict if it ended after each of its layers.

The residual stream before each block, and after the last, goes through the final norm and the head
(nostalgebraist, 2020, "interpreting GPT: the logit lens").

Shapes:  T tokens    L layers    C channels    V vocabulary    K alternatives
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..model.gpt import GPT
from .recording import Recording


@dataclass(frozen=True)
class Lens:
    """What each layer would say at each place; row 0 is before the first block."""

    token: np.ndarray  # (L + 1, T), the most likely next token
    probability: np.ndarray  # (L + 1, T), of that token
    final_probability: np.ndarray  # (L + 1, T), of the token that is the most likely in the end
    final_rank: np.ndarray  # (L + 1, T), its rank; 1 is the most likely
    norm: np.ndarray  # (L + 1, T), length of the residual stream's vector


@torch.no_grad()
def logit_lens(model: GPT, recording: Recording) -> Lens:
    """Return what each layer would say, for a recording of one row."""
    stream = recording.stream[:, 0]  # (L + 1, T, C)
    final = model.lm_head(model.ln_f(stream[-1])).argmax(-1)  # (T,)
    layers = [at_layer(model, x, final) for x in stream]  # a layer at a time: its logits are large
    return Lens(*(torch.stack(column).cpu().numpy() for column in zip(*layers, strict=True)))


def at_layer(model: GPT, x: Tensor, final: Tensor) -> tuple[Tensor, ...]:
    """Return one row of each array of `Lens`.  (T, C), (T,) -> five of (T,)"""
    probabilities = model.lm_head(model.ln_f(x)).float().softmax(-1)  # (T, V)
    best, token = probabilities.max(-1)
    of_final = probabilities.gather(-1, final.unsqueeze(-1))  # (T, 1)
    rank = 1 + (probabilities > of_final).sum(-1)
    return token, best, of_final.squeeze(-1), rank, x.float().norm(dim=-1)


@dataclass(frozen=True)
class Surprise:
    """How well each token of a text was predicted; the first was not predicted at all."""

    probability: np.ndarray  # (T - 1,), of tokens 1 to T - 1
    nats: np.ndarray  # (T - 1,), -log probability
    rank: np.ndarray  # (T - 1,), 1 is the most likely
    alternatives: np.ndarray  # (T, K), the most likely next tokens after each token
    likelihoods: np.ndarray  # (T, K), their probabilities


@torch.no_grad()
def surprise(model: GPT, recording: Recording, *, alternatives: int = 5) -> Surprise:
    """Return how surprising each token of a recording of one row was."""
    tokens = recording.tokens[0]  # (T,)
    logits = model.lm_head(model.ln_f(recording.stream[-1, 0]))  # (T, V)
    log_probabilities = logits.float().log_softmax(-1)
    seen = log_probabilities[:-1].gather(-1, tokens[1:].unsqueeze(-1))  # (T - 1, 1)
    rank = 1 + (log_probabilities[:-1] > seen).sum(-1)
    best, ids = log_probabilities.topk(min(alternatives, logits.shape[-1]), dim=-1)  # (T, K)
    nats = -seen.squeeze(-1)
    arrays = (nats.neg().exp(), nats, rank, ids, best.exp())
    return Surprise(*(array.cpu().numpy() for array in arrays))
