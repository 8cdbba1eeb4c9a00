"""A model on its machine: where its weights are, their number format, and how it attends.

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
        """Where the weights are, and tokens have to be."""
        return next(iter(self.wte.state_dict().values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the activations: that of what the embedding gives."""
        return self.wte(torch.empty(0, dtype=torch.long, device=self.device)).dtype

    def attend_by(self, way: Attention) -> None:
        """Compute attention by this function: the formula, or one of `attention.WAYS`."""
        for module in self.modules():
            if hasattr(module, "attend"):
                module.attend = way  # type: ignore[assignment]
