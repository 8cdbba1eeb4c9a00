"""What carries it: put what a model computed on one prompt into its pass over another.

Activation patching (Meng et al., 2022, "Locating and editing factual associations in GPT": causal
tracing). The model reads a corrupted prompt, one activation is replaced by that of the clean one,
and the difference of two logits shows how much of the clean answer comes back.

Shapes:  T tokens    L layers    H heads    C channels    D channels per head    R rows of a batch
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..config.fields import SettingError
from ..machine.terminal import count
from ..model.gpt import GPT
from .attribution import Question
from .recording import Recording, blocks, hooks, record, rest_of_pass

BATCH_TOKENS = 1024  # of a pass: enough to keep the machine busy, few enough for any memory


@dataclass(frozen=True)
class Patching:
    """How much of the clean answer each patch restores: 0 none, 1 all of it."""

    clean: float  # difference of the two logits after the clean prompt
    corrupt: float  # and after the corrupted one
    stream: np.ndarray  # (L + 1, T), of the residual stream before each block and after the last
    attn: np.ndarray  # (L, T), of what attention adds to it
    mlp: np.ndarray  # (L, T), of what the MLP adds to it
    heads: np.ndarray  # (L, H), of a head's outputs at all places


@dataclass(frozen=True)
class _Grid:
    """Patches that are made alike: a module's input or output, in one part of it for each."""

    name: str
    layer: int
    module: nn.Module
    values: Tensor  # (T, C), of the clean prompt
    masks: Tensor  # (patches, T, C) or a shape that expands to it: what is replaced in each patch
    at_input: bool = False


def complete(
    model: GPT,
    clean: Sequence[int],
    corrupt: Sequence[int],
    target: int | None = None,
    instead: int | None = None,
) -> Question:
    """Return the question with what is missing: the most likely token after each prompt.

    (T,), (T,). SettingError if that is the same token, or the prompts differ in length.
    """
    check_lengths(clean, corrupt)
    if target is None:
        target = likeliest(model, clean)
    if instead is None:
        instead = likeliest(model, corrupt)
    if target == instead:
        raise SettingError(
            "instead", "would be the target itself: name another token, as both prompts lead to it"
        )
    return Question(target, instead)


def check_lengths(clean: Sequence[int], corrupt: Sequence[int]) -> None:
    """Raise SettingError unless the prompts have as many tokens."""
    if len(clean) != len(corrupt):
        raise SettingError(
            "corrupt",
            f"has {count(len(corrupt), 'token')} and the prompt {len(clean)}: as many are needed, "
            "since each place is put in the same place of the other",
        )


@torch.no_grad()
def likeliest(model: GPT, tokens: Sequence[int]) -> int:
    """Return the most likely next token.  (T,)"""
    row = torch.tensor([tokens], device=model.device)
    return int(model.lm_head(model.features(row)[0, -1]).argmax())


def patch(
    model: GPT, clean: Sequence[int], corrupt: Sequence[int], question: Question
) -> Iterator[float | Patching]:
    """Patch every place and every head; yield the share that is done, and at last the result.

    (T,), (T,). ValueError if the prompts differ in length, or do not change the difference.
    """
    assert question.instead is not None, "patching restores a difference of two logits"
    target, instead = question.target, question.instead
    check_lengths(clean, corrupt)
    both = torch.tensor([clean, corrupt], device=model.device)  # (2, T)
    recording = record(model, both)
    row = (model.lm_head.weight[target] - model.lm_head.weight[instead]).detach()  # (C,)
    ends = (model.ln_f(recording.stream[-1, :, -1]) @ row).tolist()
    if ends[0] == ends[1] or list(clean) == list(corrupt):  # which rounding may hide
        raise ValueError(
            "the difference of the two logits is the same after both prompts, so no patch can "
            "restore it: choose a prompt, a target or another token that makes a difference"
        )
    grids = list(_grids(model, recording))
    found: dict[str, Any] = {}
    for done, grid in enumerate(grids):
        given = recording.stream[grid.layer, 1]  # of the corrupted prompt
        restored = (_patched(model, given, grid, row) - ends[1]) / (ends[0] - ends[1])
        found.setdefault(grid.name, []).append(restored)
        yield (done + 1) / len(grids)
    clean_end, corrupt_end = ends
    arrays = {name: np.stack(rows) for name, rows in found.items()}
    yield Patching(clean_end, corrupt_end, **arrays)


def _grids(model: GPT, recording: Recording) -> Iterator[_Grid]:
    """Yield what is patched, a row of the result at a time."""
    T, C = recording.stream.shape[2:]
    device, H = recording.stream.device, model.config.n_head
    places = torch.eye(T, dtype=torch.bool, device=device).unsqueeze(-1)  # (T, T, 1)
    heads = torch.eye(H, dtype=torch.bool, device=device).repeat_interleave(C // H, dim=1)
    for layer, block in enumerate(blocks(model)):
        yield _Grid("stream", layer, block, recording.stream[layer, 0], places, at_input=True)
        yield _Grid("attn", layer, block.attn, recording.attn[layer, 0], places)
        yield _Grid("mlp", layer, block.mlp, recording.mlp[layer, 0], places)
        c_proj, values = block.attn.c_proj, recording.heads[layer, 0]
        yield _Grid("heads", layer, c_proj, values, heads.unsqueeze(1), at_input=True)
    yield _Grid(
        "stream", len(recording.attn), model.ln_f, recording.stream[-1, 0], places, at_input=True
    )


@torch.no_grad()
def _patched(model: GPT, given: Tensor, grid: _Grid, row: Tensor) -> np.ndarray:
    """Return the difference of logits after each patch.  (T, C), (C,) -> (patches,)

    `given` is the stream before the patched layer: what is computed before it stays the same.
    """
    rows = max(1, BATCH_TOKENS // len(given))
    found = []
    for masks in grid.masks.split(rows):  # (R, T, C)

        def replaced(x: Tensor, masks: Tensor = masks) -> Tensor:
            return torch.where(masks, grid.values, x)

        with hooks() as hook:
            if grid.at_input:
                hook(grid.module, input=lambda module, inputs: (replaced(inputs[0]), *inputs[1:]))
            else:
                hook(grid.module, output=lambda module, inputs, output: replaced(output))
            features = rest_of_pass(model, given.expand(len(masks), -1, -1), grid.layer)
        found.append(features[:, -1] @ row)
    return torch.cat(found).cpu().numpy()
