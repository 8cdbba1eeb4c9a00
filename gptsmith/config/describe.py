"""Describe a model on one page: its tensors, shapes, parameters, memory and FLOPs.

Needs only a GPTConfig, not weights or PyTorch; the figures and letters are those of cost.py, with B
for the texts of a batch.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from . import cost
from .fitting import Devices, devices_json, devices_lines
from .lora import LoRASettings, adapter_count, adapter_terms
from .model import GPTConfig
from .tables import WIDTH, columns, figures, flushed, human_bytes, human_flops, shape_text


@dataclass(frozen=True)
class Term:
    """One line of a parameter count: "12 blocks", "12 x 7,085,568", 85,026,816."""

    name: str
    arithmetic: str
    count: int


@dataclass(frozen=True)
class Stage:
    """One step of a forward pass: its module or operation, what it does, and its output shape."""

    name: str
    does: str
    shape: str  # in letters: "(B, H, T, D)"


@dataclass(frozen=True)
class Description:
    """The description of a model: `str` gives the page, `to_json` the same figures as values."""

    title: str
    config: GPTConfig
    lora: LoRASettings | None = None  # adapters that would be trained in place of the weights
    devices: Devices | None = None  # those that would train it together

    def __str__(self) -> str:
        sections = (_tensors, _sums, _forward, _memory, _flops)
        parts = [_heading(self.title, self.config), *(section(self.config) for section in sections)]
        if self.lora is not None:
            parts.append(_adapters(self.config, self.lora))
        if self.devices is not None:
            parts.append(devices_lines(self.config, self.devices))
        return "\n\n".join("\n".join(part) for part in parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain values: parameter counts, memory in bytes, and FLOPs per token."""
        config, more = self.config, {}
        if self.lora is not None:
            more["lora"] = adapters_json(config, self.lora)
        if self.devices is not None:
            more["devices"] = devices_json(config, self.devices)
        return {
            **more,
            "title": self.title,
            "config": asdict(config),
            "sizes": cost.sizes(config),
            "parameters": {
                "components": [
                    {**asdict(part), "count": part.count} for part in cost.components(config)
                ],
                "block": [asdict(term) for term in block_terms(config)],
                "block_total": cost.block_count(config),
                "terms": [asdict(term) for term in terms(config)],
                "total": cost.parameter_count(config),
            },
            "forward": [asdict(stage) for stage in forward_stages(config)],
            "memory": cost.memory(config),
            "flops_per_token": {
                "multiplied_parameters": cost.multiplied_parameters(config),
                "forward": cost.flops_per_token(config, training=False),
                "training": cost.flops_per_token(config, training=True),
            },
        }


def adapters_json(config: GPTConfig, lora: LoRASettings) -> dict[str, Any]:
    """Return the parameters of adapters, and the memory of training them, in bytes."""
    learned = adapter_count(config, lora)
    how = cost.plain_pass(config)
    whole = cost.training_memory(config, 1, how)
    needed = cost.training_memory(config, 1, how, learned=learned)
    return {
        "rank": lora.rank,
        "terms": [asdict(Term(*term)) for term in adapter_terms(config, lora)],
        "learned": learned,
        "head_per_label": config.n_embd,
        "memory": {
            "gradients": cost.FLOAT32 * learned,
            "optimizer": 2 * cost.FLOAT32 * learned,
            "training": needed,
            "saved": whole - needed,
        },
    }


# ---- What the page says --------------------------------------------------------------------------


def block_terms(config: GPTConfig) -> list[Term]:
    """Return the terms of a block's parameter count: attention, MLP and two norms."""
    part = {part.name: part.count for part in cost.block_components(config)}

    def linear(name: str) -> int:
        return part[f"{name}.weight"] + part[f"{name}.bias"]

    out, (rows, keys, _) = linear("attn.c_proj"), config.attention_rows
    q = linear("attn.c_attn") * rows // (rows + 2 * keys)
    k = linear("attn.c_attn") * keys // (rows + 2 * keys)
    qkv = f"3 x {q:,} (q, k, v)" if k == q else f"{q:,} (q) + 2 x {k:,} (k, v)"
    wide, narrow = linear("mlp.c_fc"), linear("mlp.c_proj")
    norm = part["ln_1.weight"] + part["ln_1.bias"]
    return [
        Term("attention", f"{qkv} + {out:,} (out)", q + 2 * k + out),
        Term("MLP", f"{wide:,} (in) + {narrow:,} (out)", wide + narrow),
        Term("two norms", f"2 x {norm:,}" if norm else "no weights", 2 * norm),
    ]


def terms(config: GPTConfig) -> list[Term]:
    """Return the terms of the model's parameter count, which add up to the total."""
    V, P, C, L = (cost.sizes(config)[letter] for letter in "VPCL")
    block = cost.block_count(config)
    norm = "no weights" if config.modern else f"{C:,} + {C:,}" if config.bias else f"{C:,}"
    positions = "none: rotary" if config.modern else f"{P:,} x {C:,}"
    count = {part.name: part.count for part in cost.components(config)}
    head = "tied to wte" if config.tie_weights else f"{config.head_rows:,} x {C:,}"
    return [
        Term("token embedding", f"{V:,} x {C:,}", V * C),
        Term("position embedding", positions, count["wpe.weight"]),
        Term("1 block" if L == 1 else f"{L} blocks", f"{L} x {block:,}", L * block),
        Term("final norm", norm, count["ln_f.weight"] + count["ln_f.bias"]),
        Term("head", head, count["lm_head.weight"]),
    ]


def forward_stages(config: GPTConfig) -> list[Stage]:
    """Return the steps of a forward pass from tokens to logits, with one block in full."""
    activations = {"gelu_tanh": "GELU (tanh)", "gelu_erf": "GELU (erf)", "relu2": "ReLU^2"}
    name, _, kind = activations[config.activation].partition(" ")
    norm = f"normalize to {'mean square 1' if config.modern else 'mean 0, variance 1'}"
    grouped = config.kv_heads < config.n_head
    embedded = [Stage("wte + wpe", "token embedding plus position embedding", "(B, T, C)")]
    rotated = []
    if config.modern:
        heads = "(B, T, H+G, D)" if grouped else "(B, T, 2H, D)"
        embedded = [Stage("wte", "token embedding", "(B, T, C)"), Stage("ln_0", norm, "(B, T, C)")]
        rotated = [Stage("h.attn.qk_norm", "rotate and normalize q and k", heads)]
    qkv = "(B, T, C+2GD)" if grouped else "(B, T, 3C)"
    scored = "label" if (letter := cost.head_letter(config)) == "K" else "next token"
    return [
        Stage("tokens", "ids from 0 to V - 1", "(B, T)"),
        *embedded,
        Stage("h.ln_1", norm, "(B, T, C)"),
        Stage("h.attn.c_attn", "project to query, key and value", qkv),
        *rotated,
        Stage("  q, k, v", "split each into heads", "(B, H, T, D)"),
        Stage("  softmax", "attention weights, from q k' / sqrt(D)", "(B, H, T, T)"),
        Stage("  weights v", "weighted sum of the values", "(B, H, T, D)"),
        Stage("h.attn.c_proj", "concatenate the heads, project", "(B, T, C)"),
        Stage("  + residual", "add to the residual stream", "(B, T, C)"),
        Stage("h.ln_2", norm, "(B, T, C)"),
        Stage("h.mlp.c_fc", "up-projection, each token alone", "(B, T, M)"),
        Stage(f"  {name}", f"activation function {kind}".rstrip(), "(B, T, M)"),
        Stage("h.mlp.c_proj", "down-projection", "(B, T, C)"),
        Stage("  + residual", "add to the residual stream", "(B, T, C)"),
        Stage("ln_f", norm, "(B, T, C)"),
        Stage("lm_head", f"logits: a score for every {scored}", f"(B, T, {letter})"),
    ]


# ---- How it looks --------------------------------------------------------------------------------


def _heading(title: str, config: GPTConfig) -> list[str]:
    sizes = cost.sizes(config)

    def legend(**words: str) -> tuple[str, ...]:
        return tuple(f"{letter} {word} {sizes[letter]:,}" for letter, word in words.items())

    rows = [
        legend(V="vocabulary", C="channels", H="heads", L="blocks"),
        (*legend(P="positions", M="MLP channels", D="channels per head"), ""),
    ]
    if config.kv_heads < config.n_head:
        rows.append((*legend(G="heads of keys and values"), "", "", ""))
    if "K" in sizes:
        rows.append((*legend(K="labels"), "", "", ""))
    total = f"{cost.parameter_count(config):,} parameters"
    return [flushed(title, total), "=" * WIDTH, *columns(rows, "<<<<", gap=4)]


def _tensors(config: GPTConfig) -> list[str]:
    """Return the lines of every tensor, with one block for all."""
    whole = [part for part in cost.components(config) if not part.name.startswith("h.")]
    block = [replace(part, name=f"  {part.name}") for part in cost.block_components(config)]
    parts = [*whole[:2], *block, *whole[2:]]
    rows = [(f"  {part.name}", shape_text(part.shape), part.formula) for part in parts]
    lines = columns(rows, "<<<", gap=4)
    counts = [
        "is wte.weight" if part.tied else "absent" if part.absent else f"{part.count:,}"
        for part in parts
    ]
    lines = [flushed(*pair) for pair in zip(lines, counts, strict=True)]
    last = config.n_layer - 1
    lines.insert(2, f"  h.0 to h.{last}, each" if last else "  h.0")
    return ["TENSORS  matrices are (out, in)", *lines]


def _sums(config: GPTConfig) -> list[str]:
    """Return the parameter counts of one block and of the whole model."""

    def addition(parts: list[Term], name: str, total: int) -> list[str]:
        assert sum(part.count for part in parts) == total, "a term is missing"
        lines = figures((part.name, part.arithmetic, f"{part.count:,}") for part in parts)
        return [*lines, flushed("", "-" * len(f"{total:,}")), flushed(f"  {name}", f"{total:,}")]

    return [
        "PARAMETERS",
        *addition(block_terms(config), "one block", cost.block_count(config)),
        "",
        *addition(terms(config), "the model", cost.parameter_count(config)),
    ]


def _forward(config: GPTConfig) -> list[str]:
    """Return the shapes of a forward pass, in letters and in numbers."""
    H, G, wide = config.n_head, config.kv_heads, sum(config.attention_rows)
    sizes = {**cost.sizes(config), "3C": wide, "C+2GD": wide, "2H": 2 * H, "H+G": H + G}

    def numbers(shape: str) -> str:
        return shape_text([sizes.get(axis, axis) for axis in shape[1:-1].split(", ")])

    rows = [(f"  {s.name}", s.does, s.shape, numbers(s.shape)) for s in forward_stages(config)]
    return [
        f"FORWARD  B texts of T tokens each, T up to {config.context_length:,}; "
        f"block h is repeated {config.n_layer} times",
        *columns(rows, "<<<<"),
    ]


def _memory(config: GPTConfig) -> list[str]:
    """Return the memory of training and generation, in float32."""
    held, context = cost.memory(config), f"one context of {config.context_length:,} tokens"
    dropped = "; dropout keeps (T, T) too" if config.dropout else ", for the backward pass"
    keys = config.kv_heads * config.head_size
    cached = f"2 x {config.n_layer} x {keys} numbers per token"
    rows = [
        ("weights", "one number per parameter", "weights"),
        ("gradients", "one number per parameter", "gradients"),
        ("optimizer", "AdamW: running means of gradient and its square", "optimizer"),
        ("activations", context + dropped, "activations_per_context"),
        ("training", "all of these and heap fragmentation, estimated", "training"),
        ("KV cache", cached, "kv_cache_per_token"),
        ("", context, "kv_cache_per_context"),
    ]
    lines = figures((name, what, human_bytes(held[key])) for name, what, key in rows)
    return ["MEMORY  float32; --json has the bytes", *lines]


def _flops(config: GPTConfig) -> list[str]:
    """Return the FLOPs per token: formulas and figures."""
    attention = "4 C C" if config.kv_heads == config.n_head else "2 C C + 2 C G D"
    head = cost.head_letter(config)
    backward = "backward costs twice the forward pass"
    multiplied = cost.multiplied_parameters(config)
    forward, training = (cost.flops_per_token(config, training=each) for each in (False, True))
    rows = [
        ("N", f"L ({attention} + 2 C M) + {head} C multiply each token", f"{multiplied:,}"),
        ("forward", "2 N + 4 L C T", human_flops(forward)),
        ("training", f"6 N + 12 L C T: {backward}", human_flops(training)),
    ]
    return [f"ARITHMETIC  per token, with T = {config.context_length:,}", *figures(rows)]


def _adapters(config: GPTConfig, lora: LoRASettings) -> list[str]:
    """Return the parameters of adapters, and the memory of training only these."""
    values, C = adapters_json(config, lora), config.n_embd
    memory, learned = values["memory"], f"{values['learned']:,}"
    rows = [
        (
            "gradients, AdamW",
            "3 x 4 bytes for each that learns",
            human_bytes(memory["gradients"] + memory["optimizer"]),
        ),
        ("training", "with the frozen weights and one context", human_bytes(memory["training"])),
        ("", "less than training all weights", human_bytes(memory["saved"])),
    ]
    return [
        f"LORA  rank {lora.rank}, on the linear layers of the blocks: L x R x (in + out)",
        *figures(
            (term["name"], term["arithmetic"], f"{term['count']:,}") for term in values["terms"]
        ),
        flushed("", "-" * len(learned)),
        flushed("  learned", learned),
        *figures([("a classifier's head", f"2 labels x {C:,}, beside them", f"{2 * C:,}")]),
        *figures(rows),
    ]
