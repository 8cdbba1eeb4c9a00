"""The KV cache: keys and values of the tokens already read, so that they are computed only once.

The caller owns it and passes it to the model. Knows nothing of attention or sampling.

Shapes:  L layers    B batch    G heads of keys and values    T new tokens
         S cached tokens of the longest row                   D channels per head
"""

import torch
from torch import Tensor

from ..config.model import GPTConfig


class KVCache:
    """Keys and values of every layer, allocated once and filled from the left.

    Each layer writes T new positions of every row with `extend`; the model then calls `advance`
    once. The arrays are (L, B, capacity, G, D), so that the tokens of a row are contiguous; for
    GPT-2 in float32 they take 72 KiB per token.

    Rows may have different `lengths`. Prompts of different lengths are read padded on the right,
    and each row is then rewound to its own end; the padding's keys and values are overwritten
    before any query sees them.
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
                f"the cache's capacity is {self.capacity} tokens: 1 to the model's context_length "
                f"{config.context_length} is needed"
            )
        shape = (config.n_layer, batch_size, self.capacity, config.kv_heads, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch_size
        self.ends: Tensor | None = None  # the lengths, (B, 1); None where all are equal

    @property
    def size(self) -> int:
        """Memory of the keys and values, in bytes."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def length(self) -> int:
        """Length of the longest row, in tokens."""
        return max(self.lengths)

    def row_positions(self, tokens: int) -> Tensor | None:
        """Positions of each row's next tokens, (B, T); None where all rows have the same length."""
        return None if self.ends is None else self.positions(tokens)

    def positions(self, tokens: int) -> Tensor:
        """Positions of each row's next tokens.  -> (B, T)"""
        ends, device = self.ends, self.keys.device
        if ends is None:
            ends = torch.tensor(self.lengths, device=device).unsqueeze(1)
        return ends + torch.arange(tokens, device=device)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values; return all of them so far.

        (B, G, T, D), (B, G, T, D) -> (B, G, S + T, D), (B, G, S + T, D)
        """
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
        """Raise ValueError unless the cache has that many rows, with room for the new tokens."""
        if rows != self.keys.shape[1]:
            raise ValueError(f"{rows} rows do not fit a cache of {self.keys.shape[1]}")
        if self.length + tokens > self.capacity:
            raise ValueError(f"{self.length + tokens} tokens do not fit a cache of {self.capacity}")

    def advance(self, tokens: int) -> None:
        """Count `tokens` new positions in every row, once every layer has written them."""
        self.lengths = [length + tokens for length in self.lengths]
        if self.ends is not None:
            self.ends = self.ends + tokens

    def rewind(self, lengths: int | list[int]) -> None:
        """Drop all but the first `lengths` tokens of each row; the memory stays allocated.

        `lengths` is one number for all rows, or one per row. ValueError where a row has fewer.
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
        """Return one row as a cache that shares the memory but keeps a length of its own."""
        view = KVCache.__new__(KVCache)
        view.capacity = self.capacity
        view.keys, view.values = self.keys[:, row : row + 1], self.values[:, row : row + 1]
        view.lengths, view.ends = [self.lengths[row]], None
        return view
