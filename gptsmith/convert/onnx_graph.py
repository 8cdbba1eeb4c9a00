"""The model as an ONNX graph: each function adds nodes instead of computing.

The functions follow `model/gpt.py` and `model/modern.py`. Knows nothing of files.

Shapes:  B batch        T tokens given         S tokens seen so far, these included
         C channels     H heads                D channels per head       V vocabulary
         G heads of keys and values (H, unless grouped)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..checkpoint.tensors import Entry
from ..config.model import GPTConfig

FLOAT = 1  # float32 in TensorProto.DataType
# Infinity would make NaN of padding on the left, which sees nothing at all.
LOWEST = float(np.finfo(np.float32).min)
ROTATION = "rotation"  # the only tensor that is not a weight: `rotation_at` for every position


# -- a graph


class Node(NamedTuple):
    """A node: its operator, inputs, outputs and attributes."""

    name: str
    operator: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    attributes: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The nodes so far. Methods add nodes and return the names of their outputs.

    Nodes are named after their place in the model: "h.0.attn.Softmax".
    """

    weights: Mapping[str, Entry]
    place: str = ""
    nodes: list[Node] = field(default_factory=list)
    numbers: dict[str, np.ndarray] = field(default_factory=dict)

    def inside(self, part: str) -> "Graph":
        """Return the same graph, for adding the nodes of a part of the model."""
        return replace(self, place=f"{self.place}{part}.")

    def node(self, operator: str, *inputs: str, to: str = "", **attributes: Any) -> str:
        """Add any ONNX operator with one output."""
        name = self.place + (to or operator)
        self.nodes.append(Node(name, operator, inputs, (name,), attributes))
        return name

    def split(self, x: str, names: Sequence[str], sizes: Sequence[int], axis: int) -> list[str]:
        """Split a tensor into parts of these sizes along an axis."""
        outputs = [self.place + name for name in names]
        name = f"{self.place}Split.{'.'.join(names)}"
        self.nodes.append(Node(name, "Split", (x, self.number(sizes)), outputs, {"axis": axis}))
        return outputs

    def number(self, value: int | float | Sequence[int]) -> str:
        """Add a constant: whole numbers as int64, a float as float32."""
        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"{array.dtype}_{array.tolist()}".replace(" ", "")
        self.numbers[name] = array
        return name

    def weight(self, name: str) -> str:
        """Return the name of a weight in float32, adding a cast if it is stored otherwise."""
        if self.weights[name].dtype == "float32":
            return name
        cast = f"{name}.Cast"  # once, though the embedding may also be the head
        if not any(node.name == cast for node in self.nodes):
            self.nodes.append(Node(cast, "Cast", (name,), (cast,), {"to": FLOAT}))
        return cast

    def affine(self, operator: str, x: str, to: str, **attributes: Any) -> str:
        """Add an operator with a weight and, if the model has it, a bias."""
        names = (f"{self.place}{to}.weight", f"{self.place}{to}.bias")
        found = [self.weight(name) for name in names if name in self.weights]
        return self.node(operator, x, *found, to=to, **attributes)


# -- the model, as in model/gpt.py and model/modern.py


class Shared(NamedTuple):
    """What is the same in every block."""

    mask: str  # (B, 1, T, S): 0, or the lowest number for later tokens and padding
    by_head: str  # the shape (B, T, -1, D)
    turns: Sequence[str]  # cosine and sine of the rotation, (B, T, 1, D / 2) each, or none


def linear(g: Graph, x: str, to: str) -> str:
    """Add nn.Linear as Gemm with transposed B, which is (out, in).  (B T, in) -> (B T, out)

    In onnxruntime this is as fast as MatMul with (in, out), and keeps our tensors as they are.
    """
    return g.affine("Gemm", x, to, transB=1)


def norm(g: Graph, config: GPTConfig, x: str, to: str) -> str:
    """Add LayerNorm, or RMS norm without weights, over the last axis."""
    if not config.modern:
        return g.affine("LayerNormalization", x, to, epsilon=float(config.norm_eps))
    n = g.inside(to)
    mean = n.node("ReduceMean", n.node("Mul", x, x), n.number([-1]))
    root = n.node("Sqrt", n.node("Add", mean, n.number(float(config.norm_eps))))
    return n.node("Div", x, root)


def rotate(g: Graph, x: str, turns: Sequence[str], half: int) -> str:
    """Turn channel i with channel i + D / 2.  (B, T, heads, D) -> same"""
    cos, sin = turns
    one, other = g.split(x, ("one", "other"), (half, half), axis=-1)
    left = g.node("Add", g.node("Mul", one, cos, to="oc"), g.node("Mul", other, sin, to="os"))
    right = g.node("Sub", g.node("Mul", other, cos, to="ro"), g.node("Mul", one, sin, to="rs"))
    return g.node("Concat", left, right, axis=-1)


def extend(g: Graph, config: GPTConfig, x: str, layer: int, part: str) -> str:
    """Return keys or values of all tokens for each query head.  (B, T, G, D) -> (B, H, S, D)"""
    x = g.node("Transpose", x, to=f"{part}.Transpose", perm=(0, 2, 1, 3))  # (B, G, T, D)
    past = f"past_key_values.{layer}.{part}"
    x = replace(g, place="").node("Concat", past, x, to=f"present.{layer}.{part}", axis=2)
    if config.kv_heads == config.n_head:
        return x
    shape, times = (0, config.n_head, -1, config.head_size), config.n_head // config.kv_heads
    g = g.inside(part)
    x = g.node("Unsqueeze", x, g.number([2]))  # (B, G, 1, S, D)
    x = g.node("Tile", x, g.number((1, 1, times, 1, 1)))
    return g.node("Reshape", x, g.number(shape))


def attention(g: Graph, config: GPTConfig, x: str, layer: int, shared: Shared) -> str:
    """Each token gathers from itself and those before it.  (B T, C) -> (B T, C)"""
    H, G, D = config.n_head, config.kv_heads, config.head_size
    heads = g.node("Reshape", linear(g, x, "c_attn"), shared.by_head, to="heads")
    if shared.turns:
        qk, v = g.split(heads, ("qk", "v"), (H + G, G), axis=2)
        qk = norm(g, config, rotate(g.inside("rotate"), qk, shared.turns, D // 2), "qk_norm")
        q, k = g.split(qk, ("q", "k"), (H, G), axis=2)
    else:
        q, k, v = g.split(heads, ("q", "k", "v"), (H, G, G), axis=2)
    q = g.node("Transpose", q, to="query.Transpose", perm=(0, 2, 1, 3))  # (B, H, T, D)
    q = g.node("Mul", q, g.number(D**-0.5), to="query")
    k = extend(g, config, k, layer, "key")
    v = extend(g, config, v, layer, "value")
    scores = g.node("MatMul", q, g.node("Transpose", k, perm=(0, 1, 3, 2)), to="scores")
    scores = g.node("Add", scores, shared.mask, to="masked")  # (B, H, T, S)
    y = g.node("MatMul", g.node("Softmax", scores, axis=-1), v, to="gathered")
    y = g.node("Transpose", y, to="by_token", perm=(0, 2, 1, 3))  # (B, T, H, D)
    return linear(g, g.node("Reshape", y, g.number((-1, config.n_embd))), "c_proj")


def mlp(g: Graph, config: GPTConfig, x: str) -> str:
    """Each token thinks on its own.  (B T, C) -> (B T, C)"""
    x = linear(g, x, "c_fc")
    if config.modern:
        x = g.node("Relu", x)
        x = g.node("Mul", x, x, to="squared")
    else:
        approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        x = g.node("Gelu", x, approximate=approximate)
    return linear(g, x, "c_proj")


def block(g: Graph, config: GPTConfig, x: str, layer: int, shared: Shared) -> str:
    """Communicate, then compute; both added to the residual stream.  (B T, C) -> (B T, C)"""
    y = attention(g.inside("attn"), config, norm(g, config, x, "ln_1"), layer, shared)
    x = g.node("Add", x, y, to="communicated")
    y = mlp(g.inside("mlp"), config, norm(g, config, x, "ln_2"))
    return g.node("Add", x, y, to="computed")


def gpt(config: GPTConfig, weights: Mapping[str, Entry]) -> Graph:
    """Return the whole model's graph: "input_ids" (B, T) to "logits" (B, T, V).

    It also takes "attention_mask" (B, S), 0 for padding; "position_ids" (B, T); and the KV cache,
    "past_key_values.0.key" and so on (B, G, S - T, D), which may be empty. It returns the cache
    with the new tokens, "present.0.key" and so on (B, G, S, D).

    Beyond the context limit the tables have no rows, so onnxruntime refuses.
    """
    g = Graph(weights=weights)
    shape = g.node("Shape", "input_ids")  # of two numbers: B, T
    by_head = g.node("Concat", shape, g.number((-1, config.head_size)), to="by_head", axis=0)
    x = g.node("Gather", g.weight("wte.weight"), "input_ids", to="wte")  # (B, T, C)
    turns: list[str] = []
    if not config.modern:
        x = g.node("Add", x, g.node("Gather", g.weight("wpe.weight"), "position_ids", to="wpe"))
    else:
        turned = g.node("Gather", ROTATION, "position_ids", to="turns", axis=1)  # (2, B, T, 1, D/2)
        turns = [
            g.node("Gather", turned, g.number(i), to=to) for i, to in enumerate(("cos", "sin"))
        ]
        x = norm(g, config, x, "ln_0")
    shared = Shared(mask(g.inside("mask")), by_head, turns)
    x = g.node("Reshape", x, g.number((-1, config.n_embd)), to="stream")  # (B T, C)
    for layer in range(config.n_layer):
        x = block(g.inside(f"h.{layer}"), config, x, layer, shared)
    head = g.weight("wte.weight" if config.tie_weights else "lm_head.weight")
    x = g.node("Gemm", norm(g, config, x, "ln_f"), head, to="lm_head", transB=1)  # (B T, V)
    wanted = g.node("Concat", shape, g.number([config.vocab_size]), to="logits.shape", axis=0)
    g.node("Reshape", x, wanted, to="logits")
    return g


def mask(g: Graph) -> str:
    """Return what is added to scores, (B, 1, T, S): 0, or LOWEST for what a token cannot see."""
    zero, one = g.number(0), g.number(1)
    past = g.node("Shape", "past_key_values.0.key", to="past.shape")
    seen = g.node("Gather", past, g.number(2), to="seen")  # S - T
    total = g.node("Gather", g.node("Shape", "attention_mask"), one, to="total")  # S
    row = g.node("Unsqueeze", g.node("Range", seen, total, one, to="rows"), g.number([1]))  # (T, 1)
    earlier = g.node("LessOrEqual", g.node("Range", zero, total, one), row)  # (T, S)
    token = g.node("Greater", "attention_mask", zero)  # (B, S), rather than padding
    token = g.node("Unsqueeze", token, g.number((1, 2)), to="token")  # (B, 1, 1, S)
    visible = g.node("And", earlier, token)
    return g.node("Where", visible, g.number(0.0), g.number(LOWEST))
