"""Muon: momentum whose matrices are made orthogonal, so that a step turns every direction alike.

For the matrices inside the blocks (Jordan and others, 2024); embeddings, gains and biases learn by
AdamW beside it. Matrices of one shape are orthogonalized together, in bfloat16, which is what makes
it fast where they are small. Knows nothing of models.

Shapes:  M matrices of one shape    R rows    C columns
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Of the quintic a x + b x^3 + c x^5, whose five-fold application sends every singular value in
# (0, 1] to about one: Jordan's figures.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon:
    """Steps of one size for every singular direction of a matrix, with decoupled weight decay.

    `stacks` maps a parameter (R, C) to how many matrices lie in it below one another, as query, key
    and value do in `c_attn`; each is orthogonalized alone. A wide matrix steps by `lr` in spectral
    norm, a tall one by sqrt(R/C) times as much, so that outputs change by as much per channel.

    torch.optim.Muon goes from matrix to matrix, at half the speed for small ones, and knows no
    stacks.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        stacks: dict[Tensor, int] | None = None,
    ) -> None:
        group = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), **group}]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.stacks = stacks or {}

    @torch.no_grad()
    def step(self) -> None:
        """Learn from the gradients; parameters without one stay."""
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            for shape, members in self.by_shape(learning).items():
                self.step_together(members, shape, group)

    def by_shape(self, parameters: list[Tensor]) -> dict[tuple[int, int], list[Tensor]]:
        """Parameters by the shape of the matrices in them."""
        shapes = defaultdict(list)
        for p in parameters:
            shapes[len(p) // self.stacks.get(p, 1), p.shape[1]].append(p)
        return shapes

    def step_together(
        self, members: list[Tensor], shape: tuple[int, int], group: dict[str, Any]
    ) -> None:
        """One step of all parameters whose matrices have a shape (R, C)."""
        rate, momentum = group["lr"], group["momentum"]
        for p in members:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [p.grad for p in members if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in members]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov: where it is going
        matrices = torch.cat([each.view(-1, *shape) for each in ahead])  # (M, R, C)
        directions = orthogonal(matrices).to(members[0].dtype).flatten(0, 1)  # (M R, C)
        if group["weight_decay"]:
            torch._foreach_mul_(members, 1 - rate * group["weight_decay"])
        size = rate * math.sqrt(max(1.0, shape[0] / shape[1]))
        torch._foreach_add_(members, directions.split([len(p) for p in members]), alpha=-size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors and singular values near one.  (M, R, C) -> the same

    Newton-Schulz iterations in bfloat16; the values end between about 0.7 and 1.2, which is as good
    as one for learning. A zero matrix stays zero.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
