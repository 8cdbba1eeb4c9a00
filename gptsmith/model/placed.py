"""A model on its machine: its device, its dtype, and the function that computes its attention.

Knows nothing of what the model computes.

Shapes:  B batch    H heads    T queries    S positions so far    D channels per head
"""

import torch
from torch import nn

from .attention import Attention


class Placed(nn.Module):
    """A module with a token embedding `wte`, whose attention modules have a function `attend`."""

    wte: nn.Embedding

    @property
    def device(self) -> torch.device:
        """Device of the weights, where tokens have to be."""
        # A packed embedding has buffers in the place of `weight`.
        return [*self.wte.parameters(), *self.wte.buffers()][0].device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        # By looking up no token, since a packed embedding's weights have another dtype.
        return self.wte(torch.empty(0, dtype=torch.long, device=self.device)).dtype

    def attend_by(self, function: Attention) -> None:
        """Compute attention by `gpt.attention`, or by one of `attention.WAYS`."""
        for module in self.modules():
            if hasattr(module, "attend"):
                module.attend = function  # type: ignore[assignment]
