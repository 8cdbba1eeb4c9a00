"""What other systems call our tensors: tables of (ours, theirs, turned), and what fits them.

Knows nothing of tensors themselves or of files: names and shapes, as a file's header has them.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ..config.cost import Component, Shape, components
from ..config.model import GPTConfig


class Row(NamedTuple):
    """A tensor of ours, and those of theirs with the same numbers; {} stands for the layer."""

    ours: str
    theirs: tuple[str, ...]  # several lie below one another in ours: query, key and value
    turned: bool = False  # (in, out) there, (out, in) here, as nn.Linear has it


def same(*parts: str) -> list[Row]:
    """Rows of tensors that are called the same."""
    return [Row(part, (part,)) for part in parts]


PREFIX = "transformer."  # before every name of GPT2LMHeadModel's but the head's; not always there

# ours                                theirs                                    turned
GPT2 = [  # GPT2LMHeadModel's
    *same("wte.weight", "wpe.weight", "lm_head.weight", "ln_f.weight", "ln_f.bias"),
    *same("h.{}.ln_1.weight", "h.{}.ln_1.bias", "h.{}.ln_2.weight", "h.{}.ln_2.bias"),
    *same("h.{}.attn.c_attn.bias", "h.{}.attn.c_proj.bias"),
    *same("h.{}.mlp.c_fc.bias", "h.{}.mlp.c_proj.bias"),
    Row("h.{}.attn.c_attn.weight", ("h.{}.attn.c_attn.weight",), turned=True),
    Row("h.{}.attn.c_proj.weight", ("h.{}.attn.c_proj.weight",), turned=True),
    Row("h.{}.mlp.c_fc.weight", ("h.{}.mlp.c_fc.weight",), turned=True),
    Row("h.{}.mlp.c_proj.weight", ("h.{}.mlp.c_proj.weight",), turned=True),
]

_LAYER = "model.layers.{}."
_QKV = tuple(f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkv")
NANOCHAT = [  # NanoChatForCausalLM's, the published form of the modern block
    Row("wte.weight", ("model.embed_tokens.weight",)),
    Row("lm_head.weight", ("lm_head.weight",)),
    Row("h.{}.attn.c_attn.weight", _QKV),
    Row("h.{}.attn.c_proj.weight", (f"{_LAYER}self_attn.o_proj.weight",)),
    Row("h.{}.mlp.c_fc.weight", (f"{_LAYER}mlp.fc1.weight",)),
    Row("h.{}.mlp.c_proj.weight", (f"{_LAYER}mlp.fc2.weight",)),
]


class NoWeight(NamedTuple):
    """Tensors of somebody's files that are no weights, by the pattern of their names."""

    pattern: re.Pattern[str]
    why: str


CAUSAL = "a causal mask, no weight"
MASKS = NoWeight(re.compile(r"h\.[0-9]+\.attn\.(bias|masked_bias)"), CAUSAL)  # in older GPT-2s


def hugging_face(config: GPTConfig) -> list[Row]:
    """The table of the Hugging Face class that a configuration belongs to."""
    return NANOCHAT if config.modern else GPT2


def full_name(name: str) -> str:
    """The name of one of GPT-2's tensors with the prefix that it has in GPT2LMHeadModel."""
    return name if name.startswith("lm_head") else PREFIX + name


TIED = "the tied head, which is wte.weight"
ZEROS = "zeros, as the model has no such bias"


def parts(config: GPTConfig) -> dict[str, Component]:
    """Every tensor that the model could have, by our name; some are absent, the head maybe tied."""
    return {part.name: part for part in components(config)}


def rows(table: Iterable[Row], config: GPTConfig) -> list[Row]:
    """A table written out: a row for each layer."""
    return [
        Row(row.ours.format(layer), tuple(name.format(layer) for name in row.theirs), row.turned)
        for row in table
        for layer in (range(config.n_layer) if "{}" in row.ours else (0,))
    ]


def their_shapes(row: Row, config: GPTConfig, shape: Shape) -> dict[str, Shape]:
    """Name and shape of each of their tensors for one of ours, of this shape."""
    heights = config.attention_rows if len(row.theirs) == 3 else shape[:1]
    shapes = [(height, *shape[1:]) for height in heights]
    if row.turned:
        shapes = [shape[::-1] for shape in shapes]
    return dict(zip(row.theirs, shapes, strict=True))


@dataclass(frozen=True, kw_only=True)
class Account:
    """What became of each tensor in a file, and which of ours it does not hold."""

    read: dict[str, Shape] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)  # their name: why
    missing: dict[str, str] = field(default_factory=dict)  # our name: why that is well


def account(
    table: Iterable[Row],
    config: GPTConfig,
    found: Mapping[str, Shape],
    *,
    place: object,
    kind: str = "GPT-2",
    says: str = "its configuration",
    ignored: NoWeight | None = None,
    zero_biases: bool = False,
) -> Account:
    """Explain every tensor of a file; ValueError for one that is missing, unknown or misshapen.

    `ignored` says which tensors are known to be no weights. With `zero_biases` the file
    may hold, as zeros, the biases that the model does without. The errors name the `place`, what
    `says` how the tensors ought to be, and the `kind` of model.
    """
    check_layers(table, config, found, f"{place} has {{}} layers, but {says} calls for {{}}")
    ours, result = parts(config), Account()
    if ignored is not None:
        known_names = (name for name in found if ignored.pattern.fullmatch(name))
        result.ignored.update(dict.fromkeys(known_names, ignored.why))
    known, lacking = dict[str, Shape](), list[str]()
    for row in rows(table, config):
        part = ours[row.ours]
        if part.absent and not zero_biases:
            continue
        shapes = their_shapes(row, config, part.shape)
        known |= shapes
        absent = [name for name in shapes if name not in found]
        if part.absent:
            result.ignored.update({name: ZEROS for name in shapes if name in found})
        elif part.tied:
            result.ignored.update({name: TIED for name in shapes if name in found})
            result.missing.update({row.ours: TIED} if absent else {})
        else:
            lacking += absent
            result.read.update(shapes)
    if lacking:
        raise ValueError(f"{place} lacks {len(lacking)} tensors of a {kind}, {lacking[0]} first")
    if extra := sorted(found.keys() - known.keys() - result.ignored.keys()):
        raise ValueError(f"{place} has {len(extra)} tensors no {kind} has, {extra[0]} first")
    for name in known:
        if name in found and tuple(found[name]) != known[name]:
            got, needed = tuple(found[name]), known[name]
            raise ValueError(f"{place}: {name} is {got}, but {says} calls for {needed}")
    return result


def check_layers(
    table: Iterable[Row], config: GPTConfig, found: Iterable[str], message: str
) -> None:
    """ValueError unless a file has as many layers as the configuration, before any is listed."""
    starts = {name.partition("{}")[0] for row in table for name in row.theirs if "{}" in name}
    numbers = re.compile(f"(?:{'|'.join(map(re.escape, sorted(starts)))})([0-9]+)")
    layers = {match[1] for name in found if (match := numbers.match(name))}
    if len(layers) != config.n_layer:
        raise ValueError(message.format(len(layers), config.n_layer))
