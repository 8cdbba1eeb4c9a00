"""GPT-2, or with the modern block NanoChat: tokens in, logits (and loss) out.

Knows nothing of text, files, optimizers, devices or sampling.

Shapes:  B batch        T tokens given         S tokens seen so far      V vocabulary
         C channels     H heads                D channels per head
         G heads of keys and values (H, unless grouped)
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.model import GPTConfig
from .attention import attend
from .cache import KVCache
from .loss import head_loss, mean_loss


class Output(NamedTuple):
    """What the model says: `logits, loss = model(tokens, targets)`."""

    logits: Tensor  # (B, T, V)
    loss: Tensor | None  # (), nats per counted token; None without targets


THETA = 10000.0  # the slowest pair of channels turns once in about 2 pi THETA tokens


def rotation_at(positions: Tensor, head_size: int) -> Tensor:
    """Cosine and sine of the angle of each pair of channels.  (T,) -> (2, T, 1, D / 2)

    (B, T) -> (2, B, T, 1, D / 2), where rows are at different positions.
    """
    pairs = torch.arange(0, head_size, 2, device=positions.device) / head_size
    angles = positions[..., None, None] / THETA**pairs
    return torch.stack((angles.cos(), angles.sin()))


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Turn channel i with channel i + D / 2, so that only distances count.  (B, T, H, D) -> same"""
    cos, sin = rotation
    one, other = heads.chunk(2, dim=-1)
    return torch.cat((one * cos + other * sin, other * cos - one * sin), dim=-1)


def make_norm(config: GPTConfig, channels: int) -> nn.Module:
    """GPT-2's LayerNorm, or RMS norm, which has no weights."""
    if config.norm == "layer":
        return nn.LayerNorm(channels, config.norm_eps, bias=config.bias)
    return nn.RMSNorm(channels, config.norm_eps, elementwise_affine=False)


class SquaredReLU(nn.Module):
    """max(x, 0) squared.  (B, T, M) -> (B, T, M)"""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and those before it.  (B, T, C) -> (B, T, C)"""

    in_blocks = False  # how attention is computed, not what: see attention.py

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.head_size, self.dropout = config.n_head, config.head_size, config.dropout
        self.kv_heads = config.kv_heads
        rows = sum(config.attention_rows)  # query, key and value at once
        self.c_attn = nn.Linear(C, rows, bias=config.has_qkv_bias)
        if config.qk_norm:
            self.qk_norm = make_norm(config, config.head_size)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotation: Tensor | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        (B, T, C), H, G = x.shape, self.n_head, self.kv_heads
        heads = self.c_attn(x).view(B, T, -1, self.head_size)  # (B, T, H + 2 G, D)
        if rotation is None:
            q, k, v = heads.split((H, G, G), dim=2)
        else:
            qk, v = heads.split((H + G, G), dim=2)
            q, k = self.qk_norm(rotate(qk, rotation)).to(v.dtype).split((H, G), dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D), twice (B, G, T, D)
        positions = None
        if cache is not None:
            positions = cache.row_positions(T)
            k, v = cache.extend(layer, k, v)  # (B, G, S, D)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, dropout, positions=positions, in_blocks=self.in_blocks)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.drop(self.c_proj(y))


class MLP(nn.Module):
    """Each token thinks on its own.  (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_size, bias=config.bias)
        gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.activation = SquaredReLU() if config.activation == "relu2" else gelu
        self.c_proj = nn.Linear(config.mlp_size, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """Communicate, then compute; both added to the residual stream.  (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotation: Tensor | None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation, cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole model; `GPTConfig` selects nanoGPT's, the book's, OpenAI's or the modern form."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.context_length, config.n_embd)
        else:
            self.ln_0 = make_norm(config, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialize()
        self.tie_weights()

    @property
    def device(self) -> torch.device:
        """Where its weights are, and its tokens have to be."""
        return next(iter(self.wte.state_dict().values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its activations: that of what the embedding gives."""
        return self.wte(torch.empty(0, dtype=torch.long, device=self.device)).dtype

    def initialize(self) -> None:
        """Draw fresh weights as GPT-2 does: N(0, 0.02), and zero biases.

        The two projections of each block that add to the residual stream are scaled down by
        1/sqrt(2 n_layer), so that the stream's variance does not grow with depth.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith("c_proj")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def tie_weights(self) -> None:
        """Make the output head the token embedding itself, where the configuration says so."""
        if self.config.tie_weights:
            self.lm_head.weight = self.wte.weight

    def attend_in_blocks(self, yes: bool) -> None:
        """Compute attention the way that is faster on CPUs in bfloat16, or PyTorch's own."""
        for module in self.modules():
            if isinstance(module, CausalSelfAttention):
                module.in_blocks = yes

    def features(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The residual stream after the last norm, ready for the head.  (B, T) -> (B, T, C)

        With a cache, the tokens continue those that it holds of each row, and it advances past
        them.
        """
        T, seen = tokens.shape[1], 0 if cache is None else cache.length
        if seen + T > self.config.context_length:
            limit = self.config.context_length
            raise ValueError(f"{seen + T} tokens are more than the context_length of {limit}")
        positions = None if cache is None else cache.row_positions(T)  # (B, T)
        if positions is None:
            positions = torch.arange(seen, seen + T, device=tokens.device)  # (T,)
        x, rotation = self.wte(tokens), None  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.wpe(positions)
        else:
            x = self.ln_0(x)
            rotation = rotation_at(positions, self.config.head_size).to(x.dtype)
        x = self.drop(x)
        for layer, block in enumerate(self.h):
            x = block(x, rotation, cache, layer)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> Output:
        """(B, T) and targets (B, T) -> logits (B, T, V) and loss ().

        The loss is the mean over the targets that are not -1, in nats per token, in float32; it is
        0 where none counts.
        """
        logits = self.lm_head(self.features(tokens, cache))
        return Output(logits, None if targets is None else mean_loss(logits, targets))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The loss of `forward` alone, to learn from: no logits are kept.  (B, T), (B, T) -> ()"""
        return head_loss(self.features(tokens), self.lm_head.weight, targets)
