"""Run a model once, and keep what each of its parts computed.

Knows nothing of text, or of what the numbers mean.

Shapes:  B batch        T tokens       L layers       C channels
         H heads        D channels per head           N parts of the residual stream
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.gpt import GPT, attention
from ..model.modern import rotation_at
from ..model.quantized import packed_bits


@dataclass(frozen=True)
class Recording:
    """What the parts of a model computed from tokens (B, T)."""

    tokens: Tensor  # (B, T)
    wte: Tensor  # (B, T, C), token embeddings as they enter the stream
    wpe: Tensor | None  # (B, T, C), position embeddings; None where positions are rotary
    stream: Tensor  # (L + 1, B, T, C), residual stream before each block, and after the last
    weights: Tensor  # (L, B, H, T, T), attention of each query (row) to each key (column)
    heads: Tensor  # (L, B, T, C), the heads' outputs one after another, before c_proj
    attn: Tensor  # (L, B, T, C), what attention adds to the stream
    mlp: Tensor  # (L, B, T, C), what the MLP adds to the stream


@torch.no_grad()
def record(model: GPT, tokens: Tensor) -> Recording:
    """Run tokens through a model and record it.  (B, T)

    ValueError if there are more tokens than the context_length, or the model is quantized.
    """
    if packed_bits(model) is not None:
        raise ValueError(
            "the model is quantized, so its matrices are packed: inspect the one it was made from"
        )
    kept: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: kept.setdefault(name, []).append(output)

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, inputs: kept.setdefault(name, []).append(inputs[0])

    def attend(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        # The weights are what attention makes of an identity matrix as its values.
        identity = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:3], -1)
        kept.setdefault("weights", []).append(weights := attention(q, k, identity, *rest))
        return weights @ v

    modern = model.config.modern
    with hooks() as hook, attending_by(model, attend):
        hook(model.ln_0 if modern else model.wte, output=keep("wte"))
        if not modern:
            hook(model.wpe, output=keep("wpe"))
        for block in blocks(model):
            hook(block, input=keep_input("stream"))
            hook(block.attn.c_proj, input=keep_input("heads"))
            hook(block.attn, output=keep("attn"))
            hook(block.mlp, output=keep("mlp"))
        hook(model.ln_f, input=keep_input("stream"))
        model.features(tokens)
    wte = kept.pop("wte")[0]
    wpe = kept.pop("wpe")[0].expand_as(wte) if "wpe" in kept else None
    layers = {name: torch.stack(tensors) for name, tensors in kept.items()}
    return Recording(tokens=tokens, wte=wte, wpe=wpe, **layers)


def blocks(model: GPT) -> list[Any]:
    """Return the blocks of a model, which are GPT-2's or the modern ones."""
    return list(model.h)


def rest_of_pass(model: GPT, x: Tensor, layer: int) -> Tensor:
    """Return the features for a residual stream before a layer.  (B, T, C) -> (B, T, C)"""
    more: tuple[Tensor, ...] = ()
    if model.config.modern:
        positions = torch.arange(x.shape[1], device=x.device)
        more = (rotation_at(positions, model.config.head_size).to(x.dtype),)
    for block in blocks(model)[layer:]:
        x = block(x, *more)
    return model.ln_f(x)


@contextmanager
def hooks() -> Iterator[Callable[..., None]]:
    """Yield a function that adds hooks to a module; they are removed at the end.

    `input` gets (module, inputs) before its forward pass and may return other inputs; `output` gets
    (module, inputs, output) after it and may return another output.
    """
    with ExitStack() as stack:

        def hook(module: nn.Module, *, input: Any = None, output: Any = None) -> None:
            # PyTorch's handles remove their hook when they are closed.
            if input is not None:
                stack.enter_context(module.register_forward_pre_hook(input))
            if output is not None:
                stack.enter_context(module.register_forward_hook(output))

        yield hook


@contextmanager
def attending_by(model: GPT, function: Callable[..., Tensor]) -> Iterator[None]:
    """Let a model compute its attention by another function, and at the end as before.

    The function takes (B, H, T, D), (B, H, S, D), (B, H, S, D) and returns (B, H, T, D).
    """
    before = [(block.attn, block.attn.attend) for block in blocks(model)]
    model.attend_by(function)
    try:
        yield
    finally:
        for module, own in before:
            module.attend = own


def apart(model: GPT) -> GPT:
    """Return a model of other modules with the same weights: its hooks do not meet other uses."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def head_outputs(model: GPT, recording: Recording, layer: int) -> Tensor:
    """Return what each head of a layer adds to the stream.  -> (B, T, H, C)

    The bias of c_proj belongs to no head.
    """
    c_proj = blocks(model)[layer].attn.c_proj
    mixed = recording.heads[layer]  # (B, T, C)
    H, C = model.config.n_head, model.config.n_embd
    # c_proj is linear, so a head's part is what it makes of that head's channels alone.
    alone = torch.eye(H, dtype=mixed.dtype, device=mixed.device).repeat_interleave(C // H, dim=1)
    return c_proj(mixed.unsqueeze(2) * alone) - c_proj(mixed.new_zeros(C))  # (B, T, H, C)
