"""Who wrote this token: the parts of a logit that come from embeddings, heads, MLPs and biases.

The logits are the final norm of a sum of parts, times the head. With the norm's scale held at its
measured value that is linear, so the logit is the sum of what each part contributes.

Shapes:  T tokens    L layers    H heads    C channels    N parts
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model.gpt import GPT
from .recording import Recording, blocks, head_outputs


@dataclass(frozen=True)
class Question:
    """A token whose logit is explained, and the one whose logit is subtracted, if any."""

    target: int
    instead: int | None = None


@dataclass(frozen=True)
class Part:
    """A part of the model that writes to the residual stream."""

    kind: str  # wte, wpe, head, attn bias, mlp, mlp bias, ln_f bias
    layer: int | None = None
    head: int | None = None


@dataclass(frozen=True)
class Attribution:
    """What each part contributes to a logit, or to a difference of two, at each place."""

    parts: list[Part]  # N
    contributions: np.ndarray  # (N, T), which add up to `logits`
    logits: np.ndarray  # (T,), of the targets, less those of the other tokens if there are any


@torch.no_grad()
def attribute(
    model: GPT, recording: Recording, targets: Tensor, instead: Tensor | None = None
) -> Attribution:
    """Return the parts of the targets' logits, less those of other tokens.  (T,), (T,)

    The recording is of one row; a target is a token that may follow at that place.
    """
    rows = model.lm_head.weight[targets]  # (T, C)
    if instead is not None:
        rows = rows - model.lm_head.weight[instead]
    ln_f: Any = model.ln_f
    direction = through_norm(ln_f, recording.stream[-1, 0], rows)  # (T, C)
    parts, contributions = [], []

    def add(part: Part, written: Tensor) -> None:
        """Add what a part wrote to the stream.  (T, C) or (C,)"""
        parts.append(part)
        contributions.append((written * direction).sum(-1))

    add(Part("wte"), recording.wte[0])
    if recording.wpe is not None:
        add(Part("wpe"), recording.wpe[0])
    for layer, block in enumerate(blocks(model)):
        for head, written in enumerate(head_outputs(model, recording, layer)[0].unbind(1)):
            add(Part("head", layer, head), written)
        if block.attn.c_proj.bias is not None:
            add(Part("attn bias", layer), block.attn.c_proj.bias)
        bias, mlp = block.mlp.c_proj.bias, recording.mlp[layer, 0]
        add(Part("mlp", layer), mlp if bias is None else mlp - bias)
        if bias is not None:
            add(Part("mlp bias", layer), bias)
    if getattr(ln_f, "bias", None) is not None:
        parts.append(Part("ln_f bias"))
        contributions.append((ln_f.bias * rows).sum(-1))
    logits = (ln_f(recording.stream[-1, 0]) * rows).sum(-1)
    return Attribution(parts, torch.stack(contributions).cpu().numpy(), logits.cpu().numpy())


def through_norm(norm: Any, x: Tensor, rows: Tensor) -> Tensor:
    """Return the directions in which a part of x changes the products of rows with norm(x).

    (T, C), (T, C) -> (T, C). The scale of x is held, so a part contributes its product with this.
    """
    if norm.weight is not None:
        rows = rows * norm.weight
    if isinstance(norm, nn.RMSNorm):
        assert norm.eps is not None
        return rows * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    scale = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + norm.eps)
    # LayerNorm takes the mean from each part; to take it from the rows comes to the same.
    return (rows - rows.mean(-1, keepdim=True)) * scale
