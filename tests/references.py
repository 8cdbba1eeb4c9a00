"""The two systems that the model implements, restated at toy size, as plainly as they can be.

Each is written from the published description (the names, the equations, the order in which
weights are drawn), and shares nothing with the package.
"""

import math

import torch
from torch import Tensor, nn


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Biased variance, eps 1e-5."""
    centred = x - x.mean(-1, keepdim=True)
    variance = (centred * centred).mean(-1, keepdim=True)
    out = scale * centred / torch.sqrt(variance + 1e-5)
    return out if shift is None else out + shift


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Causal attention with explicit loops over batch and head.  (B, T, C) x 3 -> (B, T, C)"""
    out = torch.zeros_like(q)
    B, T, C = q.shape
    D = C // heads
    future = torch.triu(torch.ones(T, T, dtype=torch.bool), diagonal=1)
    for b in range(B):
        for h in range(heads):
            part = slice(h * D, (h + 1) * D)
            scores = q[b, :, part] @ k[b, :, part].T / math.sqrt(D)
            weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
            out[b, :, part] = weights @ v[b, :, part]
    return out


def nanogpt_forward(w: dict[str, Tensor], tokens: Tensor, *, n_layer: int, n_head: int) -> Tensor:
    """nanoGPT's forward pass on weights named as in its state dict; biases optional."""

    def linear(x: Tensor, name: str) -> Tensor:
        y = x @ w[f"{name}.weight"].T
        return y + w[f"{name}.bias"] if f"{name}.bias" in w else y

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    x = w["wte.weight"][tokens] + w["wpe.weight"][: tokens.shape[1]]
    for i in range(n_layer):
        q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1)
        x = x + linear(attend(q, k, v, n_head), f"h.{i}.attn.c_proj")
        hidden = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ w["lm_head.weight"].T


class BookModel(nn.Module):
    """The book's GPTModel: its parts in the order in which it makes them, as that order decides
    which random numbers each weight gets from torch.manual_seed."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        V, C = settings["vocab_size"], settings["emb_dim"]
        self.heads, self.layers = settings["n_heads"], settings["n_layers"]
        self.tokens = nn.Embedding(V, C)
        self.positions = nn.Embedding(settings["context_length"], C)
        self.blocks = nn.ModuleList()
        for _ in range(self.layers):
            block = nn.ModuleDict()
            for name in ("query", "key", "value"):
                block[name] = nn.Linear(C, C, bias=settings["qkv_bias"])
            block["out"] = nn.Linear(C, C)
            block["wide"] = nn.Linear(C, 4 * C)
            block["narrow"] = nn.Linear(4 * C, C)
            self.blocks.append(block)
        self.scales = nn.ParameterList(torch.ones(C) for _ in range(2 * self.layers + 1))
        self.shifts = nn.ParameterList(torch.zeros(C) for _ in range(2 * self.layers + 1))
        self.head = nn.Linear(C, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V), as in evaluation mode."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for i, block in enumerate(self.blocks):
            y = layer_norm(x, self.scales[2 * i], self.shifts[2 * i])
            y = attend(block["query"](y), block["key"](y), block["value"](y), self.heads)
            x = x + block["out"](y)
            y = block["wide"](layer_norm(x, self.scales[2 * i + 1], self.shifts[2 * i + 1]))
            cubic = math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
            x = x + block["narrow"](0.5 * y * (1 + torch.tanh(cubic)))
        return self.head(layer_norm(x, self.scales[-1], self.shifts[-1]))

    def weights_in_our_names(self) -> dict[str, Tensor]:
        """The state dict that our GPT loads: query, key and value stacked into c_attn."""
        out = {
            "wte.weight": self.tokens.weight,
            "wpe.weight": self.positions.weight,
            "ln_f.weight": self.scales[-1],
            "ln_f.bias": self.shifts[-1],
            "lm_head.weight": self.head.weight,
        }
        for i, block in enumerate(self.blocks):
            for kind in ("weight", "bias"):
                stacked = [getattr(block[name], kind) for name in ("query", "key", "value")]
                if stacked[0] is not None:
                    out[f"h.{i}.attn.c_attn.{kind}"] = torch.cat(stacked)
                out[f"h.{i}.attn.c_proj.{kind}"] = getattr(block["out"], kind)
                out[f"h.{i}.mlp.c_fc.{kind}"] = getattr(block["wide"], kind)
                out[f"h.{i}.mlp.c_proj.{kind}"] = getattr(block["narrow"], kind)
            for number in (1, 2):
                out[f"h.{i}.ln_{number}.weight"] = self.scales[2 * i + number - 1]
                out[f"h.{i}.ln_{number}.bias"] = self.shifts[2 * i + number - 1]
        return {name: tensor.detach() for name, tensor in out.items()}
