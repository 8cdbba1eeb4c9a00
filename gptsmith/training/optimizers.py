"""Which optimizer updates which parameters, and the optimizers' state by parameter name.

Knows nothing of schedules or the loop.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..config.settings import TrainingSettings
from ..model.gpt import GPT
from .muon import Muon
from .sharding import is_sharded, local, sharded_like
from .update import CompiledUpdate


class AdamW:
    """AdamW, fused by PyTorch or, with `compiled`, in C++.

    Weights of matrices and embeddings decay; biases and the norms' gains do not. Calls PyTorch's
    function, since importing its class loads the compiler, which takes 1.4 s.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        settings: TrainingSettings,
        compiled: CompiledUpdate | None = None,
    ) -> None:
        decayed = [p for p in parameters if p.ndim >= 2]
        plain = [p for p in parameters if p.ndim < 2]
        rate = {"lr": settings.learning_rate, "times": 1.0}
        self.settings, self.compiled = settings, compiled
        self.param_groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": settings.weight_decay, **rate},
            {"params": plain, "weight_decay": 0.0, **rate},
        ]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            for p in updated:
                if not self.state[p]:
                    self.state[p] = {
                        "step": torch.zeros((), device=p.device),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            states = [self.state[p] for p in updated]
            self.update(updated, states, group["lr"], group["weight_decay"])

    def update(
        self,
        parameters: list[Tensor],
        states: list[dict[str, Tensor]],
        lr: float,
        weight_decay: float,
    ) -> None:
        """Update parameters of any shapes; of sharded ones, this process's rows."""
        beta1, beta2, eps = self.settings.beta1, self.settings.beta2, self.settings.epsilon
        if self.compiled is not None:
            self.compiled.adamw(
                parameters,
                states,
                lr=lr,
                betas=(beta1, beta2),
                eps=eps,
                weight_decay=weight_decay,
            )
            return
        adamw(
            [local(p) for p in parameters],
            [local(p.grad) for p in parameters if p.grad is not None],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )


class Optimizer(Protocol):
    """What a training step needs of an optimizer.

    In each parameter group, "times" is the learning rate as a multiple of the schedule's.
    """

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, dict[str, Tensor]]  # kept in checkpoints, by parameter name
    compiled: CompiledUpdate | None  # does the same in C++, with the same state

    def step(self) -> None:
        """Update the parameters from their gradients."""
        ...


def adamw_for_all(model: GPT, settings: TrainingSettings) -> list[Optimizer]:
    """Return AdamW for all parameters that learn."""
    return [AdamW([p for p in model.parameters() if p.requires_grad], settings)]


def muon_for_blocks(model: GPT, settings: TrainingSettings) -> list[Optimizer]:
    """Return Muon for the blocks' matrices, and AdamW for the rest."""
    matrices = [p for p in model.h.parameters() if p.ndim == 2 and p.requires_grad]
    # Query, key and value lie in c_attn. With fewer heads of keys, as many heads of queries at a
    # time make one matrix, so that all pieces have the same shape.
    pieces = model.config.n_head // model.config.kv_heads + 2
    inside = set(matrices)
    muon = Muon(
        matrices,
        settings.muon_learning_rate,
        momentum=settings.muon_momentum,
        weight_decay=settings.weight_decay,
        stacks={
            p: pieces
            for name, p in model.named_parameters()
            if name.endswith("c_attn.weight") and p in inside
        },
    )
    for group in muon.param_groups:
        group["times"] = settings.muon_learning_rate / settings.learning_rate
    rest: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p not in inside]
    return [AdamW(rest, settings), muon]


OPTIMIZERS = {
    "adamw": adamw_for_all,
    "muon": muon_for_blocks,
}


def make_optimizers(model: GPT, settings: TrainingSettings) -> list[Optimizer]:
    """Return the optimizers that the settings name, which share the model's parameters."""
    return OPTIMIZERS[settings.optimizer](model, settings)


def state_tensors(model: GPT, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return the optimizers' state as named tensors: "exp_avg.h.0.attn.c_attn.weight", ...

    They are the optimizers' own, not copies, which a checkpoint is written from one by one; they
    have their parameter's shape, and are sharded like it, or, as step counts, ().
    """
    return {
        f"{key}.{name}": value.detach()
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        if parameter in optimizer.state
        for key, value in optimizer.state[parameter].items()
    }


def load_state_tensors(
    model: GPT, optimizers: Sequence[Optimizer], tensors: Mapping[str, Tensor]
) -> None:
    """Restore the state, of any shapes, that `state_tensors` returned.

    ValueError where it names a parameter that the model does not have.
    """
    parameters = dict(model.named_parameters())
    owners = {p: o for o in optimizers for group in o.param_groups for p in group["params"]}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition(".")
        if name not in parameters:
            raise ValueError(
                f"the optimizer's state has {full_name}, but the model has no parameter {name}: "
                "it belongs to another model"
            )
        parameter = parameters[name]
        # Fused AdamW needs its step counts on the parameter's device, and in float32.
        shard = is_sharded(parameter) and tensor.shape == parameter.shape
        own = sharded_like(tensor, parameter) if shard else tensor.to(parameter.device, copy=True)
        owners[parameter].state[parameter][key] = own
