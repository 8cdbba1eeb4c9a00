"""The product with a linear layer, perhaps with an adapter, and its gradients, written out.

For code that computes its own backward pass; `lora.py` has the definition. Gradients are computed
of what learns only, so that a frozen matrix costs no product.

Shapes:  N tokens    K inputs    O outputs    R rank    B batch
"""

from typing import NamedTuple

from torch import Tensor, nn

from .dropout import drop
from .lora import LoRALinear


class Adapter(NamedTuple):
    """What a layer's adapter has besides its matrices."""

    scale: float = 0.0
    dropout: float = 0.0
    seeds: Tensor | None = None  # (B,)

    @property
    def drawn(self) -> bool:
        """Whether PyTorch's generator would draw what is dropped."""
        return self.dropout > 0 and self.seeds is None


def adapter_of(layer: nn.Linear) -> tuple[Adapter, tuple[Tensor | None, Tensor | None]]:
    """Return a layer's adapter, with its matrices (R, K) and (O, R): both None without one."""
    if not isinstance(layer, LoRALinear):
        return Adapter(), (None, None)
    dropout = layer.dropout if layer.training else 0.0
    return Adapter(layer.scale, dropout, layer.seeds), (layer.lora_A, layer.lora_B)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of a Product's three matrices


class Product(NamedTuple):
    """The product with a layer's matrix (O, K) and its adapter's (R, K) and (O, R), if it has one.

    All are in the dtype in which they are multiplied.
    """

    weight: Tensor
    a: Tensor | None
    b: Tensor | None
    adapter: Adapter

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the product, and what the adapter's first matrix makes of x, for `backward`.

        (N, K) -> (N, O), (N, R)
        """
        y = x @ self.weight.T
        if self.a is None or self.b is None:
            return y, None
        low = self.dropped(x) @ self.a.T
        return y.addmm_(low, self.b.T, alpha=self.adapter.scale), low

    def backward(
        self, d: Tensor, x: Tensor, low: Tensor | None, learns: bool, *, further: bool = True
    ) -> tuple[Tensor, Gradients]:
        """Return the gradients of x and of the matrices.  (N, O), (N, K), (N, R) -> (N, K)

        That of the weights only if the layer `learns`; that of x is left out, as a tensor of no
        meaning, unless something `further` back learns.
        """
        d_weight = (d.T @ x).float() if learns else None
        d_x = d @ self.weight if further else d
        if self.a is None or self.b is None or low is None:
            return d_x, (d_weight, None, None)
        d_low = d @ self.b * self.adapter.scale
        d_b = d.T @ low * self.adapter.scale
        d_a = d_low.T @ self.dropped(x)
        if further and self.adapter.dropout:
            d_x += self.dropped(d_low @ self.a)
        elif further:
            d_x.addmm_(d_low, self.a)
        return d_x, (d_weight, d_a.float(), d_b.float())

    def dropped(self, x: Tensor) -> Tensor:
        """Drop some of what enters the adapter, or of its gradient.  (N, K) -> (N, K)"""
        _, p, seeds = self.adapter
        if not p or seeds is None:
            return x
        return drop(x.view(len(seeds), -1, x.shape[1]), p, seeds).view_as(x)
