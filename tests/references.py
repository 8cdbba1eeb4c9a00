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


class NanoGPT(nn.Module):
    """nanoGPT's GPT by the names of its state dict; its `model_args` make it."""

    def __init__(
        self,
        n_layer: int,
        n_head: int,
        n_embd: int,
        block_size: int,
        bias: bool,
        vocab_size: int,
        dropout: float,
    ) -> None:
        super().__init__()
        C, self.sizes = n_embd, {"n_layer": n_layer, "n_head": n_head}

        def block() -> nn.ModuleDict:
            attn = {"c_attn": nn.Linear(C, 3 * C, bias), "c_proj": nn.Linear(C, C, bias)}
            mlp = {"c_fc": nn.Linear(C, 4 * C, bias), "c_proj": nn.Linear(4 * C, C, bias)}
            return nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(C, bias=bias),
                    "attn": nn.ModuleDict(attn),
                    "ln_2": nn.LayerNorm(C, bias=bias),
                    "mlp": nn.ModuleDict(mlp),
                }
            )

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, C),
                "wpe": nn.Embedding(block_size, C),
                "drop": nn.Dropout(dropout),
                "h": nn.ModuleList(block() for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(C, bias=bias),
            }
        )
        self.lm_head = nn.Linear(C, vocab_size, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V), as in evaluation mode."""
        weights = {k.removeprefix("transformer."): v for k, v in self.state_dict().items()}
        return nanogpt_forward(weights, tokens, **self.sizes)


class BookNorm(nn.Module):
    """The book's LayerNorm, by its names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, C)"""
        return layer_norm(x, self.scale, self.shift)


class BookModel(nn.Module):
    """The book's GPTModel by the names of its state dict: its parts in the order in which it makes
    them, as that order decides which random numbers each weight gets from torch.manual_seed."""

    def __init__(self, settings: dict) -> None:
        super().__init__()
        V, C, P = settings["vocab_size"], settings["emb_dim"], settings["context_length"]
        self.heads = settings["n_heads"]
        self.tok_emb, self.pos_emb = nn.Embedding(V, C), nn.Embedding(P, C)
        self.trf_blocks = nn.ModuleList()
        for _ in range(settings["n_layers"]):
            att = nn.ModuleDict()
            for name in ("W_query", "W_key", "W_value"):
                att[name] = nn.Linear(C, C, bias=settings["qkv_bias"])
            att["out_proj"] = nn.Linear(C, C)
            att.register_buffer("mask", torch.triu(torch.ones(P, P), diagonal=1))
            layers = nn.ModuleDict({"0": nn.Linear(C, 4 * C), "2": nn.Linear(4 * C, C)})
            block = {"att": att, "ff": nn.ModuleDict({"layers": layers})}
            block |= {"norm1": BookNorm(C), "norm2": BookNorm(C)}
            self.trf_blocks.append(nn.ModuleDict(block))
        self.final_norm = BookNorm(C)
        self.out_head = nn.Linear(C, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V), as in evaluation mode."""
        x = self.tok_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1]))
        for block in self.trf_blocks:
            att, layers = block["att"], block["ff"]["layers"]
            y = block["norm1"](x)
            y = attend(att["W_query"](y), att["W_key"](y), att["W_value"](y), self.heads)
            x = x + att["out_proj"](y)
            y = layers["0"](block["norm2"](x))
            cubic = math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
            x = x + layers["2"](0.5 * y * (1 + torch.tanh(cubic)))
        return self.out_head(self.final_norm(x))

    def weights_in_our_names(self) -> dict[str, Tensor]:
        """The state dict that our GPT loads: query, key and value stacked into c_attn."""
        out = {
            "wte.weight": self.tok_emb.weight,
            "wpe.weight": self.pos_emb.weight,
            "ln_f.weight": self.final_norm.scale,
            "ln_f.bias": self.final_norm.shift,
            "lm_head.weight": self.out_head.weight,
        }
        for i, block in enumerate(self.trf_blocks):
            att, layers = block["att"], block["ff"]["layers"]
            for kind in ("weight", "bias"):
                stacked = [getattr(att[f"W_{name}"], kind) for name in ("query", "key", "value")]
                if stacked[0] is not None:
                    out[f"h.{i}.attn.c_attn.{kind}"] = torch.cat(stacked)
                out[f"h.{i}.attn.c_proj.{kind}"] = getattr(att["out_proj"], kind)
                out[f"h.{i}.mlp.c_fc.{kind}"] = getattr(layers["0"], kind)
                out[f"h.{i}.mlp.c_proj.{kind}"] = getattr(layers["2"], kind)
            for number in (1, 2):
                out[f"h.{i}.ln_{number}.weight"] = block[f"norm{number}"].scale
                out[f"h.{i}.ln_{number}.bias"] = block[f"norm{number}"].shift
        return {name: tensor.detach() for name, tensor in out.items()}
