"""Whether two forms of a model say the same: their logits on the same tokens.

Knows nothing of formats, and holds one layer of a model at a time.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.saved import without_weights
from ..checkpoint.tensors import Fetch, Stored
from ..config.model import GPTConfig

# Of the largest logit: ten times what float32 and another order of additions make of 48 layers.
ROUNDING = 1e-3


def some_tokens(config: GPTConfig) -> Tensor:
    """Two rows of random tokens, the same for every model of that size.  -> (B, T)"""
    generator = torch.Generator().manual_seed(0)
    length = min(16, config.context_length)
    return torch.randint(config.vocab_size, (2, length), generator=generator)


@torch.inference_mode()
def logits(stored: Stored, tokens: Tensor) -> Tensor:
    """What a stored model says, in float32.  (B, T) -> (B, T, V)

    Each layer's weights are fetched as the forward pass reaches it, and forgotten behind it.
    """
    model = without_weights(stored.config).eval()
    tied = {"lm_head.weight": "wte.weight"} if stored.config.tie_weights else {}
    for name, module in model.named_modules():
        kinds = [kind for kind, _ in module.named_parameters(recurse=False)]
        if kinds:
            names = {kind: tied.get(f"{name}.{kind}", f"{name}.{kind}") for kind in kinds}
            module.register_forward_pre_hook(partial(_fill, names, stored.fetch))
            module.register_forward_hook(partial(_empty, kinds))
    return model(tokens).logits


def _fill(names: dict[str, str], fetch: Fetch, module: nn.Module, inputs: Any) -> None:
    for kind, name in names.items():
        tensor = fetch(name).float().contiguous()
        setattr(module, kind, nn.Parameter(tensor, requires_grad=False))


def _empty(kinds: list[str], module: nn.Module, inputs: Any, output: Any) -> None:
    for kind in kinds:
        nothing = torch.empty(0, device="meta")
        setattr(module, kind, nn.Parameter(nothing, requires_grad=False))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """The largest difference between two sets of logits, (B, T, V); infinite beside a NaN."""
    difference = (one - other).abs()
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def rounding_of(reference: Tensor) -> float:
    """How much two exact forms of a model may differ, given what one of them says."""
    return ROUNDING * max(1.0, float(reference.abs().max()))
