"""The modern block, as in NanoChat: the residual stream of `gpt.py` with other modules.

Rotary positions instead of a position embedding, RMSNorm without weights, normalized queries and
keys, grouped-query attention, squared ReLU, no biases. Knows nothing of the head or the loss.

Shapes:  B batch        T tokens given         S tokens seen so far      C channels
         H heads        G heads of keys and values                       D channels per head
         M channels inside the MLP
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import GPTConfig
from .attention import Attention, by_kernel
from .cache import KVCache
from .dropout import UNSEEDED, BlockSeeds, Dropout, seeds_by_place

THETA = 10000.0  # the slowest pair of channels turns once in about 2 pi THETA tokens


def rotation_at(positions: Tensor, head_size: int) -> Tensor:
    """Return cosine and sine of each channel pair's angle.  (T,) -> (2, T, 1, D / 2)

    (B, T) -> (2, B, T, 1, D / 2) where rows are at different positions.
    """
    pairs = torch.arange(0, head_size, 2, device=positions.device) / head_size
    angles = positions[..., None, None] / THETA**pairs
    return torch.stack((angles.cos(), angles.sin()))


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotate channel i with channel i + D / 2, by an angle that grows with the position.

    The product of a query and a key then depends on their distance, not on where they are.
    (B, T, H, D) -> (B, T, H, D)
    """
    cos, sin = rotation
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def rms_norm(config: GPTConfig, channels: int) -> nn.RMSNorm:
    """Return this block's norm, which has no weights."""
    return nn.RMSNorm(channels, config.norm_eps, elementwise_affine=False)


class SquaredReLU(nn.Module):
    """max(x, 0) squared.  (B, T, M) -> (B, T, M)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class GroupedAttention(nn.Module):
    """Grouped-query attention: H / G query heads share a key and a value head.

    (B, T, C) -> (B, T, C)
    """

    attend: Attention = staticmethod(by_kernel)

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, self.dropout = config.n_embd, config.dropout
        self.n_head, self.kv_heads = config.n_head, config.kv_heads
        self.c_attn = nn.Linear(C, sum(config.attention_rows), bias=False)
        self.qk_norm = rms_norm(config, config.head_size)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.drop = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        seeds: BlockSeeds = UNSEEDED,
    ) -> Tensor:
        (B, T, C), H, G = x.shape, self.n_head, self.kv_heads
        heads = self.c_attn(x).view(B, T, H + 2 * G, C // H)
        qk, v = heads.split((H + G, G), dim=2)
        # A rotation does not change a vector's length, so the norm may follow it, as in NanoChat.
        q, k = self.qk_norm(rotate(qk, rotation)).to(v.dtype).split((H, G), dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D), twice (B, G, T, D)
        positions = None
        if cache is not None:
            positions = cache.row_positions(T)
            k, v = cache.extend(layer, k, v)  # (B, G, S, D)
        if G < H:
            k, v = (part.repeat_interleave(H // G, dim=1) for part in (k, v))  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout, positions, seeds.weights)
        return self.drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), seeds.attn)


class MLP(nn.Module):
    """Linear, activation function, linear: each token alone.  (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_size, bias=False)
        self.activation = SquaredReLU()
        self.c_proj = nn.Linear(config.mlp_size, config.n_embd, bias=False)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor, seeds: BlockSeeds = UNSEEDED) -> Tensor:
        return self.drop(self.c_proj(self.activation(self.c_fc(x))), seeds.mlp)  # C -> M -> C


class Block(nn.Module):
    """Communicate, then compute; both added to the residual stream.  (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = rms_norm(config, config.n_embd)
        self.attn = GroupedAttention(config)
        self.ln_2 = rms_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        seeds: BlockSeeds = UNSEEDED,
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation, cache, layer, seeds)
        return x + self.mlp(self.ln_2(x), seeds)


def add_parts(model: nn.Module, config: GPTConfig) -> None:
    """Add to a model the modules between its token embedding and its head."""
    model.ln_0 = rms_norm(config, config.n_embd)
    model.drop = Dropout(config.dropout)
    model.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
    model.ln_f = rms_norm(config, config.n_embd)


def residual_stream(
    model: Any,
    tokens: Tensor,
    positions: Tensor,
    cache: KVCache | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Return the residual stream after the last block.  (B, T), (T,) or (B, T) -> (B, T, C)"""
    of_embeddings, of_blocks = seeds_by_place(seeds, len(model.h))
    x = model.ln_0(model.wte(tokens))
    rotation = rotation_at(positions, model.config.head_size).to(x.dtype)
    x = model.drop(x, of_embeddings)
    for layer, block in enumerate(model.h):
        x = block(x, rotation, cache, layer, of_blocks[layer])
    return x
