"""Muon: momentum with orthogonalized updates, so that all directions of a matrix change alike.

For the matrices inside the blocks (Jordan and others, 2024); AdamW updates embeddings, gains and
biases. Matrices of one shape are orthogonalized in one batch and in bfloat16, which makes it fast
for small ones. Processes divide the matrices among them. Knows nothing of models.

Shapes:  M matrices of one shape    R rows    C columns
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..machine.processes import Pending, begin_shares, my_share
from .sharding import is_sharded, local, of_whole_matrices
from .update import Choices, CompiledUpdate

# Jordan's coefficients of a x + b x^3 + c x^5. Applied five times, this polynomial takes every
# singular value in (0, 1], unless it is tiny, to about one.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class Muon:
    """Muon with Nesterov momentum and decoupled weight decay.

    `stacks` maps a parameter to the number of (R, C) matrices stacked in its rows, as query, key
    and value are in `c_attn`; each is orthogonalized on its own. The update's spectral norm is `lr`
    for a wide matrix and sqrt(R/C) times that for a tall one, so that the outputs of both change
    by as much per channel.

    With `compiled`, C++ makes the same updates on a CPU, faster; `exact` is for PyTorch's. Matrices
    are orthogonalized in bfloat16, or in float32 where that is wanted: then the number of
    processes, and so of matrices in each, changes no loss by more than float32's own rounding.

    torch.optim.Muon handles one matrix after another, which is half as fast for small ones, and it
    has no stacks.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        stacks: dict[Tensor, int] | None = None,
        compiled: CompiledUpdate | None = None,
    ) -> None:
        group = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.param_groups: list[dict[str, Any]] = [{"params": list(parameters), **group}]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.stacks = stacks or {}
        self.compiled = compiled
        self.exact = False

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient.

        Each process updates its share of each shape and receives the others, which takes less time
        than if each made all updates (benchmarks/notes.md). Of sharded matrices, it orthogonalizes
        its share and updates its rows of all.
        """
        pending = list[Pending]()
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            for p in updated:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for shape, members in self.by_shape(updated).items():
                if is_sharded(members[0]):
                    self.step_together(members, shape, group)
                    continue
                if mine := list(my_share(members)):
                    self.step_together(mine, shape, group)
                # The momentum too, so that all have what a checkpoint needs, to the bit.
                pending += begin_shares((p, self.state[p]["momentum_buffer"]) for p in members)
        for each in pending:
            each.wait()

    def by_shape(self, parameters: list[Tensor]) -> dict[tuple[int, int], list[Tensor]]:
        """Group parameters by the shape (R, C) of their matrices."""
        shapes = defaultdict(list)
        for p in parameters:
            shapes[len(p) // self.stacks.get(p, 1), p.shape[1]].append(p)
        return shapes

    def step_together(
        self, members: list[Tensor], shape: tuple[int, int], group: dict[str, Any]
    ) -> None:
        """Update the parameters whose matrices have one shape (R, C)."""
        rate, momentum = group["lr"], group["momentum"]
        buffers = [self.state[p]["momentum_buffer"] for p in members]
        if self.compiled is not None:
            choices = Choices(rate, momentum, group["weight_decay"], QUINTIC, ITERATIONS)
            self.compiled.muon(members, buffers, shape, choices)
            return
        weights, buffers = [*map(local, members)], [*map(local, buffers)]
        gradients = [local(p.grad) for p in members if p.grad is not None]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)  # Nesterov momentum
        precision = torch.float32 if self.exact else torch.bfloat16
        work, rows = partial(directions, shape=shape, precision=precision), [*map(len, members)]
        if is_sharded(members[0]):
            steps = of_whole_matrices(updates, rows, work)
        else:
            steps = [*work(torch.cat(updates)).split(rows)]
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - rate * group["weight_decay"])
        size = rate * math.sqrt(max(1.0, shape[0] / shape[1]))
        torch._foreach_add_(weights, steps, alpha=-size)


def directions(stacked: Tensor, shape: tuple[int, int], precision: torch.dtype) -> Tensor:
    """Orthogonalize matrices of one shape (R, C), one below the other.  (M R, C) -> (M R, C)"""
    return orthogonal(stacked.view(-1, *shape), precision).to(stacked.dtype).flatten(0, 1)


def orthogonal(matrices: Tensor, precision: torch.dtype = torch.bfloat16) -> Tensor:
    """Move the singular values of matrices to about one.  (M, R, C) -> (M, R, C)

    Newton-Schulz iterations, in bfloat16 unless `precision` says otherwise. The singular values end
    between about 0.7 and 1.2, which trains as well as exactly one. A zero matrix stays zero.
    """
    tall = matrices.shape[1] > matrices.shape[2]  # transposed, so that x @ x.mT is the small one
    x = (matrices.mT if tall else matrices).to(precision)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
