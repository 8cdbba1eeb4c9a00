"""GPT-2: tokens in, logits out.

nanoGPT's model, and the GPTModel of "Build a Large Language Model (From Scratch)", here called the
book, are this one with other names for its modules:

    here                 nanoGPT                    the book's GPTModel
    wte                  transformer.wte            tok_emb
    wpe                  transformer.wpe            pos_emb
    drop                 transformer.drop           drop_emb
    h.0                  transformer.h.0            trf_blocks.0
    h.0.ln_1             ... ln_1                   ... norm1
    h.0.attn.c_attn      ... attn.c_attn            ... att.W_query, att.W_key, att.W_value
    h.0.attn.c_proj      ... attn.c_proj            ... att.out_proj
    h.0.ln_2             ... ln_2                   ... norm2
    h.0.mlp.c_fc         ... mlp.c_fc               ... ff.layers.0
    h.0.mlp.c_proj       ... mlp.c_proj             ... ff.layers.2
    ln_f                 transformer.ln_f           final_norm
    lm_head              lm_head                    out_head

and with these settings of `GPTConfig`:

                         bias     qkv_bias   tie_weights   activation   init
    OpenAI's GPT-2       True     True       True          gelu_tanh    gpt2
    nanoGPT              False    False      True          gelu_erf     gpt2
    the book             True     False      False         gelu_tanh    book

Knows nothing of text, files, optimizers or sampling.

Shapes:  B batch        T tokens given         S tokens seen so far      V vocabulary
         C channels     H heads                D channels per head       M channels inside the MLP
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config.lora import LoRASettings
from ..config.model import GPTConfig
from . import modern
from .attention import Attention, by_kernel
from .cache import KVCache
from .dropout import UNSEEDED, BlockSeeds, Dropout, drop, seeds_by_place
from .loss import CrossEntropy, cross_entropy, head_loss, mean_loss
from .placed import Placed


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    positions: Tensor | None = None,
    seeds: Tensor | None = None,
) -> Tensor:
    """Compute causal attention: softmax(q k' / sqrt(D)) v.

    (B, H, T, D), (B, H, S, D), (B, H, S, D) -> (B, H, T, D)

    The queries are at the last T of the S positions or, where rows have different lengths, at
    `positions` (B, T). The seeds (B,) decide which weights are dropped; without them, PyTorch's
    generator does. This is the definition; models use the faster functions of `attention.py` unless
    `attend_by(attention)` chooses this one.
    """
    T, S, D = q.shape[2], k.shape[2], q.shape[3]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)
    key_positions = torch.arange(S, device=q.device)
    # (T,), or (B, 1, T) where rows have different lengths
    query_positions = key_positions[S - T :] if positions is None else positions.unsqueeze(1)
    future = key_positions > query_positions.unsqueeze(-1)  # (T, S) or (B, 1, T, S)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    return drop(weights, dropout, seeds) @ v  # (B, H, T, D)


class QueryKeyValue(nn.Linear):
    """Query, key and value projections as one layer.  (B, T, C) -> (B, T, 3 C)

    Each third is initialized like the separate layer that the book has for it.
    """

    def reset_parameters(self) -> None:
        C = self.in_features
        for start in (0, C, 2 * C):
            nn.init.kaiming_uniform_(self.weight[start : start + C], a=math.sqrt(5))
            if self.bias is not None:
                nn.init.uniform_(self.bias[start : start + C], -1 / math.sqrt(C), 1 / math.sqrt(C))


class CausalSelfAttention(nn.Module):
    """Each token gathers values from itself and earlier tokens.  (B, T, C) -> (B, T, C)"""

    attend: Attention = staticmethod(by_kernel)

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        self.c_attn = QueryKeyValue(C, 3 * C, bias=config.has_qkv_bias)
        self.c_proj = nn.Linear(C, C, bias=config.bias)
        self.drop = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        seeds: BlockSeeds = UNSEEDED,
    ) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=2)
        )
        positions = None
        if cache is not None:
            positions = cache.row_positions(T)
            k, v = cache.extend(layer, k, v)  # (B, H, S, D)
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, dropout, positions, seeds.weights)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.drop(self.c_proj(y), seeds.attn)


class MLP(nn.Module):
    """Linear, activation function, linear: each token alone.  (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_size, bias=config.bias)
        self.activation = nn.GELU("tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(config.mlp_size, config.n_embd, bias=config.bias)
        self.drop = Dropout(config.dropout)

    def forward(self, x: Tensor, seeds: BlockSeeds = UNSEEDED) -> Tensor:
        return self.drop(self.c_proj(self.activation(self.c_fc(x))), seeds.mlp)  # C -> M -> C


class Block(nn.Module):
    """Communicate, then compute; both added to the residual stream.  (B, T, C) -> (B, T, C)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        layer: int = 0,
        seeds: BlockSeeds = UNSEEDED,
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, layer, seeds)
        return x + self.mlp(self.ln_2(x), seeds)


class Output(NamedTuple):
    """What the model returns: `logits, loss = model(tokens, targets)`."""

    logits: Tensor  # (B, T, V)
    loss: Tensor | None  # (), nats per counted token; None without targets


class GPT(Placed):
    """The model that `config` describes: `logits, loss = model(tokens, targets)`."""

    h: nn.ModuleList
    ln_f: nn.Module
    cross_entropy: CrossEntropy = staticmethod(cross_entropy)
    lora: LoRASettings | None = None  # of its adapters, which lora.py adds

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.block == "modern":
            modern.add_parts(self, config)
        else:
            self.wpe = nn.Embedding(config.context_length, config.n_embd)
            self.drop = Dropout(config.dropout)
            self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialize()
        self.tie_weights()

    def initialize(self) -> None:
        """Initialize the weights as GPT-2 does: N(0, 0.02), and zero biases.

        The two projections of each block that add to the residual stream are scaled down by
        1/sqrt(2 n_layer), so that the stream's variance does not grow with depth. With `init`
        "book" the weights keep the initialization of PyTorch's layers.
        """
        if self.config.init == "book":
            return
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith("c_proj")
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def tie_weights(self) -> None:
        """Use the token embedding's weights as the output head, if the configuration says so."""
        if self.config.tie_weights:
            self.lm_head.weight = self.wte.weight

    def features(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        seeds: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Return the residual stream after the final norm.  (B, T) -> (B, T, C)

        With a cache, the tokens continue the cached ones of each row and are added to them. In
        training, `dropout_seeds` (B, P) decide what is dropped, or else PyTorch's generator.
        `positions` (B, T) are the tokens' where they do not simply follow one another.
        ValueError where they exceed the context_length or the cache.
        """
        T, seen = tokens.shape[1], 0 if cache is None else cache.length
        if seen + T > self.config.context_length:
            limit = self.config.context_length
            raise ValueError(f"{seen + T} tokens are more than the context_length of {limit}")
        if cache is not None:
            positions = cache.row_positions(T)  # (B, T)
        if positions is None:
            positions = torch.arange(seen, seen + T, device=tokens.device)  # (T,)
        if self.config.block == "modern":
            x = modern.residual_stream(self, tokens, positions, cache, seeds)
        else:
            of_embeddings, of_blocks = seeds_by_place(seeds, len(self.h))
            x = self.drop(self.wte(tokens) + self.wpe(positions), of_embeddings)  # (B, T, C)
            for layer, block in enumerate(self.h):
                x = block(x, cache, layer, of_blocks[layer])
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        seeds: Tensor | None = None,
    ) -> Output:
        """Return logits (B, T, V) and loss () for tokens (B, T) and targets (B, T).

        The loss is the mean cross entropy over the targets that are not -1, in nats per token, in
        float32; it is 0 where all are -1.
        """
        logits = self.lm_head(self.features(tokens, cache, seeds))
        return Output(logits, None if targets is None else mean_loss(logits, targets))

    def loss(self, tokens: Tensor, targets: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Return the loss of `forward` without keeping the logits.  (B, T), (B, T) -> ()"""
        features = self.features(tokens, None, seeds)
        return head_loss(features, self.lm_head.weight, targets, self.cross_entropy)
