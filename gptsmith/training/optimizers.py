"""Which parameters learn how, and the optimizer's state by parameter name.

Knows nothing of schedules or the loop.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..model import GPT
from ..settings import TrainingSettings


def adamw(model: GPT, settings: TrainingSettings) -> torch.optim.AdamW:
    """Fused AdamW: matrices and embeddings decay; biases and the gains of norms do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon, fused=True
    )


def state_tensors(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors on the CPU: "exp_avg.h.0.attn.c_attn.weight", ..."""
    return {
        f"{key}.{name}": value.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_state_tensors(
    model: GPT, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimizer the state that `state_tensors` took; ValueError where it does not fit."""
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        if name not in parameters:
            raise ValueError(f"the optimizer's state has {full_name}, which this model has not")
        # Step counts live where fused AdamW wants them: beside the parameter, always in float32.
        optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device, copy=True)
