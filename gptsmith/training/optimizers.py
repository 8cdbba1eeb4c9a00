"""Which parameters learn how, and the optimizers' state by parameter name.

Knows nothing of schedules or the loop.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..model import GPT
from ..settings import TrainingSettings
from .muon import Muon


def make_optimizers(model: GPT, settings: TrainingSettings) -> list[Optimizer]:
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest.

    Each group has "times": its learning rate as a multiple of the schedule's.
    """
    if settings.optimizer == "adamw":
        return [adamw(list(model.parameters()), settings)]
    matrices = [p for p in model.h.parameters() if p.ndim == 2]
    inside = set(matrices)
    muon = Muon(
        matrices,
        settings.muon_learning_rate,
        momentum=settings.muon_momentum,
        weight_decay=settings.weight_decay,
        stacks={p: 3 for name, p in model.named_parameters() if name.endswith("c_attn.weight")},
    )
    for group in muon.param_groups:
        group["times"] = settings.muon_learning_rate / settings.learning_rate
    return [adamw([p for p in model.parameters() if p not in inside], settings), muon]


def adamw(parameters: list[Tensor], settings: TrainingSettings) -> Optimizer:
    """Fused AdamW: matrices and embeddings decay; biases and the gains of norms do not."""
    decayed = [p for p in parameters if p.ndim >= 2]
    plain = [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay, "times": 1.0},
            {"params": plain, "weight_decay": 0.0, "times": 1.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )


def state_tensors(model: GPT, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as named tensors on the CPU: "exp_avg.h.0.attn.c_attn.weight", ..."""
    return {
        f"{key}.{name}": value.detach().cpu().clone()
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def load_state_tensors(
    model: GPT, optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Give the optimizers the state that `state_tensors` took; ValueError where it does not fit."""
    parameters = dict(model.named_parameters())
    owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        if name not in parameters:
            raise ValueError(f"the optimizer's state has {full_name}, which this model has not")
        parameter = parameters[name]
        # Step counts live where fused AdamW wants them: beside the parameter, always in float32.
        owners[parameter].state[parameter][key] = tensor.to(parameter.device, copy=True)
