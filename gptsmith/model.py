"""GPT-2: tokens in, logits (and loss) out.

Knows nothing of text, files, optimizers, devices or sampling.

Shapes:  B batch        T tokens given         S tokens seen so far      V vocabulary
         C channels     H heads                D channels per head
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .attention import attend
from .cache import KVCache
from .config import GPTConfig
from .loss import head_loss, mean_loss


class Output(NamedTuple):
    """What the model says: `logits, loss = model(tokens, targets)`."""

    logits: Tensor  # (B, T, V)
    loss: Tensor | None  # (), nats per counted token; None without targets


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and those before it.  (B, T, C) -> (B, T, C)"""

    in_blocks = False  # how attention is computed, not what: see attention.py

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head, self.head_size, self.dropout = config.n_head, config.head_size, config.dropout
        self.c_attn = nn.Linear(C, 3 * C, bias=config.has_qkv_bias)  # query, key and value at once
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, C = x.shape
        heads = (B, T, self.n_head, self.head_size)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            k, v = cache.extend(layer, k, v)  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, dropout, in_blocks=self.in_blocks)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.drop(self.c_proj(y))


class MLP(nn.Module):
    """Each token thinks on its own.  (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_size, bias=config.bias)
        self.gelu = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(config.mlp_size, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Communicate, then compute; both added to the residual stream.  (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, layer)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The whole model; `GPTConfig` selects between nanoGPT's, the book's and OpenAI's form."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.context_length, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialize()
        self.tie_weights()

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

        With a cache, the tokens continue those that it holds, and it advances past them.
        """
        T, seen = tokens.shape[1], 0 if cache is None else cache.length
        if seen + T > self.config.context_length:
            limit = self.config.context_length
            raise ValueError(f"{seen + T} tokens are more than the context_length of {limit}")
        positions = torch.arange(seen, seen + T, device=tokens.device)
        x = self.drop(self.wte(tokens) + self.wpe(positions))  # (B, T, C)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
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
