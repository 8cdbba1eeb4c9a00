"""The keys and values of the tokens already read, so that they are not computed again.

Belongs to the caller, who passes it to the model; knows nothing of attention or sampling.

Shapes:  L layers    B batch    G heads of keys and values    T new tokens    S seen so far,
         by the row that has seen most    D channels per head
"""

import torch
from torch import Tensor

from ..config.model import GPTConfig


class KVCache:
    """Keys and values of every layer, allocated once and filled from the left.

    Each layer extends it by T positions of every row; the model then advances it once. The arrays
    are (L, B, capacity, G, D), so that a row's tokens so far lie together: for GPT-2 in float32,
    72 KiB per token.

    Rows may be of different `lengths`. Prompts that are, are read padded on the right, and each row
    is then rewound to its own end: what lies beyond that is overwritten before it counts.
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
        self.lengths = [0] * batch_size
        self.ends: Tensor | None = None  # the lengths as (B, 1), where they differ

    @property
    def size(self) -> int:
        """In bytes."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def length(self) -> int:
        """Of the longest row, in tokens."""
        return max(self.lengths)

    def row_positions(self, tokens: int) -> Tensor | None:
        """Where the next tokens of each row go, (B, T); None where all rows are equally long."""
        return None if self.ends is None else self.positions(tokens)

    def positions(self, tokens: int) -> Tensor:
        """Where the next tokens of each row go.  -> (B, T)"""
        ends, device = self.ends, self.keys.device
        if ends is None:
            ends = torch.tensor(self.lengths, device=device).unsqueeze(1)
        return ends + torch.arange(tokens, device=device)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new positions and return all it has: (B, G, T, D) -> (B, G, S + T, D)."""
        start, T = self.length, keys.shape[2]
        self.check_room(len(keys), T)
        all_keys, all_values = self.keys[layer, :, : start + T], self.values[layer, :, : start + T]
        positions = self.row_positions(T)
        if positions is None:
            all_keys[:, start:] = keys.transpose(1, 2)
            all_values[:, start:] = values.transpose(1, 2)
        else:
            rows = torch.arange(len(positions), device=positions.device).unsqueeze(1)  # (B, 1)
            all_keys[rows, positions] = keys.transpose(1, 2)
            all_values[rows, positions] = values.transpose(1, 2)
        return all_keys.transpose(1, 2), all_values.transpose(1, 2)

    def check_room(self, rows: int, tokens: int) -> None:
        """Raise ValueError where so many more tokens for each of so many rows do not fit."""
        if rows != self.keys.shape[1]:
            raise ValueError(f"{rows} rows do not fit a cache of {self.keys.shape[1]}")
        if self.length + tokens > self.capacity:
            raise ValueError(f"{self.length + tokens} tokens do not fit a cache of {self.capacity}")

    def advance(self, tokens: int) -> None:
        """Count `tokens` new positions of every row as seen, once every layer has written them."""
        self.lengths = [length + tokens for length in self.lengths]
        if self.ends is not None:
            self.ends = self.ends + tokens

    def rewind(self, lengths: int | list[int]) -> None:
        """Forget what came after the first `lengths` tokens, keeping the memory.

        One number is for every row; a list has each row's own.
        """
        B = len(self.lengths)
        kept = [lengths] * B if isinstance(lengths, int) else lengths
        if len(kept) != B:
            raise ValueError(f"a cache of {B} rows cannot go back to {len(kept)} lengths")
        for length, seen in zip(kept, self.lengths, strict=True):
            if not 0 <= length <= seen:
                raise ValueError(f"a cache of {seen} tokens cannot go back to {length}")
        self.hold(kept)

    def hold(self, lengths: list[int]) -> None:
        """Set the rows' lengths without checking that so many tokens are there."""
        if lengths != self.lengths:
            self.lengths, self.ends = [*lengths], None
            if len(set(lengths)) > 1:
                self.ends = torch.tensor(lengths, device=self.keys.device).unsqueeze(1)

    def row(self, row: int) -> "KVCache":
        """One row as a cache of its own in the same memory; neither tells the other its length."""
        alone = KVCache.__new__(KVCache)
        alone.capacity = self.capacity
        alone.keys, alone.values = self.keys[:, row : row + 1], self.values[:, row : row + 1]
        alone.lengths, alone.ends = [self.lengths[row]], None
        return alone
