"""The keys and values of the tokens already read, so that they are not computed again.

Belongs to the caller, who passes it to the model; knows nothing of attention or sampling.

Shapes:  L layers    B batch    G heads of keys and values    T new tokens    S seen so far
         D channels per head
"""

import torch
from torch import Tensor

from .config import GPTConfig


class KVCache:
    """Keys and values of every layer, allocated once and filled from the left.

    Each layer extends it by the same T positions; the model then advances it once. The arrays are
    (L, B, capacity, G, D), so that a row's tokens so far lie together: for GPT-2 in float32,
    72 KiB per token.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        *,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = config.context_length if capacity is None else capacity
        if not 1 <= self.capacity <= config.context_length:
            raise ValueError(
                f"a cache of {self.capacity} tokens: between 1 and the model's context_length "
                f"{config.context_length} is needed"
            )
        shape = (config.n_layer, batch_size, self.capacity, config.kv_heads, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new positions and return all it has: (B, G, T, D) -> (B, G, S + T, D)."""
        all_keys, all_values = self.up_to(layer, self.length + keys.shape[2])
        all_keys[:, self.length :] = keys.transpose(1, 2)
        all_values[:, self.length :] = values.transpose(1, 2)
        return all_keys.transpose(1, 2), all_values.transpose(1, 2)

    def up_to(self, layer: int, end: int) -> tuple[Tensor, Tensor]:
        """A layer's first `end` positions, which the caller may write: (B, end, G, D), twice."""
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit a cache of {self.capacity}")
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def positions(self, tokens: int) -> Tensor:
        """Where the next tokens stand.  -> (T,)"""
        return torch.arange(self.length, self.length + tokens)

    def check_room(self, rows: int, tokens: int) -> None:
        """Raise ValueError where so many more tokens for each of so many rows do not fit."""
        if rows != self.keys.shape[1]:
            raise ValueError(f"{rows} rows do not fit a cache of {self.keys.shape[1]}")
        if self.length + tokens > self.capacity:
            raise ValueError(f"{self.length + tokens} tokens do not fit a cache of {self.capacity}")

    def advance(self, tokens: int) -> None:
        """Count `tokens` new positions as seen, once every layer has written them."""
        self.length += tokens

    def rewind(self, length: int) -> None:
        """Forget what came after the first `length` tokens, keeping the memory."""
        if not 0 <= length <= self.length:
            raise ValueError(f"a cache of {self.length} tokens cannot go back to {length}")
        self.length = length
