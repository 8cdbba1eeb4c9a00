"""Tables of other systems' names for our tensors, and the check that a file's tensors match them.

Works on names and shapes, as in a file's header. Knows nothing of tensors or files themselves.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..config.classifier import ClassifierConfig
from ..config.cost import Component, Shape, components
from ..config.model import GPTConfig


class WeightName(NamedTuple):
    """One of our tensors, and theirs with the same numbers; {} stands for the layer."""

    ours: str
    theirs: tuple[str, ...]  # several (query, key, value) are concatenated along the rows of ours
    transposed: bool = False  # theirs is (in, out), ours (out, in) as in nn.Linear


_COMPONENTS = {
    part.name.replace("h.0.", "h.{}."): part for part in components(GPTConfig(n_layer=1))
}


def weight_names(
    modules: Mapping[str, str | tuple[str, ...]],
    *,
    embedding: str = ".weight",
    norm: tuple[str, str] = (".weight", ".bias"),
    linear: tuple[str, str] = (".weight", ".bias"),
    transposed: bool = False,
) -> list[WeightName]:
    """Return a system's table, given its name, or names, for each of our modules.

    `embedding` (also for the head), `norm` and `linear` are the suffixes of its weights and biases.
    `transposed` means that its linear layers have matrices (in, out).
    """
    table = []
    for ours, part in _COMPONENTS.items():
        module, _, kind = ours.rpartition(".")
        if module not in modules:
            continue
        in_block, names = ours.startswith("h."), modules[module]
        endings = norm if "ln_" in module else linear if in_block else (embedding, "")
        ending = endings[0] if kind == "weight" else endings[1]
        theirs = tuple(f"{name}{ending}" for name in ([names] if isinstance(names, str) else names))
        is_matrix = in_block and len(part.shape) == 2
        table.append(WeightName(ours, theirs, transposed and is_matrix))
    return table


PREFIX = "transformer."  # of all names in GPT2LMHeadModel except the head's; some files omit it
HEADS = ("lm_head", "score")

_SAME = {name.rpartition(".")[0]: name.rpartition(".")[0] for name in _COMPONENTS}
OURS = weight_names(_SAME)  # also nanoGPT's
GPT2 = weight_names(_SAME, transposed=True)  # GPT2LMHeadModel's, whose linear layers are Conv1D
# GPT2ForSequenceClassification's
GPT2_CLASSIFIER = weight_names(_SAME | {"lm_head": "score"}, transposed=True)

_LAYER = "model.layers.{}."
NANOCHAT = weight_names(  # NanoChatForCausalLM's, the published form of the modern block
    {  # ours: theirs
        "wte": "model.embed_tokens",
        "h.{}.attn.c_attn": tuple(f"{_LAYER}self_attn.{part}_proj" for part in "qkv"),
        "h.{}.attn.c_proj": f"{_LAYER}self_attn.o_proj",
        "h.{}.mlp.c_fc": f"{_LAYER}mlp.fc1",
        "h.{}.mlp.c_proj": f"{_LAYER}mlp.fc2",
        "lm_head": "lm_head",
    }
)


class NoWeights(NamedTuple):
    """Tensors in other systems' files that are not weights, by the pattern of their names."""

    pattern: re.Pattern[str]
    why: str


CAUSAL = "a causal mask, not a weight"
MASKS = NoWeights(re.compile(r"h\.[0-9]+\.attn\.(bias|masked_bias)"), CAUSAL)  # in older GPT-2s


def hugging_face(config: GPTConfig) -> list[WeightName]:
    """Return the table of a configuration's Hugging Face class."""
    if isinstance(config, ClassifierConfig):
        return GPT2_CLASSIFIER
    return NANOCHAT if config.modern else GPT2


def full_name(name: str) -> str:
    """Return a tensor's name in GPT2LMHeadModel or the class for labels, with its prefix."""
    return name if name.startswith(HEADS) else PREFIX + name


def components_by_name(config: GPTConfig) -> dict[str, Component]:
    """Return every tensor that a model could have, by our name; some may be absent or tied."""
    return {part.name: part for part in components(config)}


def per_layer(table: Iterable[WeightName], config: GPTConfig) -> list[WeightName]:
    """Return a table with one entry for each layer instead of one for all."""
    return [
        name._replace(
            ours=name.ours.format(layer), theirs=tuple(each.format(layer) for each in name.theirs)
        )
        for name in table
        for layer in (range(config.n_layer) if "{}" in name.ours else (0,))
    ]


def their_shapes(name: WeightName, config: GPTConfig, shape: Shape) -> dict[str, Shape]:
    """Return the name and shape of each of their tensors for one of ours, which has `shape`."""
    heights = config.attention_rows if len(name.theirs) == 3 else shape[:1]
    shapes = [(height, *shape[1:]) for height in heights]
    if name.transposed:
        shapes = [shape[::-1] for shape in shapes]
    return dict(zip(name.theirs, shapes, strict=True))


# -- a file's tensors, compared with the expected ones


class TensorInfo(NamedTuple):
    """A tensor as its file describes it."""

    file: Path
    shape: Shape
    dtype: str  # as in file headers, such as "F32": see machine/dtypes.py
    start: int  # offset in the file, in bytes
    bytes: int


TIED = "the tied head, which is wte.weight"
ZEROS = "zeros, as the model has no such bias"


@dataclass(frozen=True, kw_only=True)
class TensorMatch:
    """Which tensors of a file are read or ignored, and which of ours are not in it."""

    read: dict[str, Shape] = field(default_factory=dict)  # by their names
    ignored: dict[str, str] = field(default_factory=dict)  # their name: why
    missing: dict[str, str] = field(default_factory=dict)  # our name: why that is fine


def match_tensors(
    table: Iterable[WeightName],
    config: GPTConfig,
    found: Mapping[str, Shape],
    *,
    source: object,
    kind: str = "GPT-2",
    says: str = "its configuration",
    ignored: NoWeights | None = None,
    zero_biases: bool = False,
) -> TensorMatch:
    """Match every tensor of a file; ValueError if one is missing, unknown or has a wrong shape.

    `ignored` are tensors that are not weights. With `zero_biases`, the file may contain zeros for
    biases that the model does not have. The errors name the `source`, the `kind` of model, and what
    `says` which shapes are expected.
    """
    table = list(table)
    check_layers([each for name in table for each in name.theirs], config, found, source, says)
    ours, match, expected = components_by_name(config), TensorMatch(), dict[str, Shape]()
    if ignored is not None:
        no_weights = (name for name in found if ignored.pattern.fullmatch(name))
        match.ignored.update(dict.fromkeys(no_weights, ignored.why))
    for name in per_layer(table, config):
        part = ours[name.ours]
        if part.absent and not zero_biases:
            continue
        shapes = their_shapes(name, config, part.shape)
        if not (part.absent or part.tied):
            match.read.update(shapes)
            continue
        there = {each: shape for each, shape in shapes.items() if each in found}
        match.ignored.update(dict.fromkeys(there, ZEROS if part.absent else TIED))
        if part.tied and not there:
            match.missing[name.ours] = TIED
        expected |= there
    unexplained = {n: shape for n, shape in found.items() if n not in match.ignored}
    there = {name: found[name] for name in expected}
    check_shapes(match.read | expected, unexplained | there, source=source, kind=kind, says=says)
    return match


def check_shapes(
    expected: Mapping[str, Shape],
    found: Mapping[str, Shape],
    *,
    source: object,
    kind: str,
    says: str,
    note: str = "",
) -> None:
    """Raise ValueError if a tensor of a file is missing, unknown or has a wrong shape."""
    if lacking := [name for name in expected if name not in found]:
        raise ValueError(f"{source} lacks {len(lacking)} tensors of a {kind}, {lacking[0]} first")
    if extra := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{source} has {len(extra)} tensors no {kind} has, {extra[0]} first")
    for name, needed in expected.items():
        if (got := tuple(found[name])) != needed:
            raise ValueError(f"{source}: {name} is {got}, but {says} calls for {needed}{note}")


def check_layers(
    names: Iterable[str], config: GPTConfig, found: Iterable[str], source: object, says: str
) -> None:
    """Raise ValueError unless a file has as many layers as the configuration says.

    Called before the layers are enumerated, since a bad configuration could ask for billions.
    `names` are those of the blocks' tensors, with {} for the layer.
    """
    starts = {name.partition("{}")[0] for name in names if "{}" in name}
    numbers = re.compile(f"(?:{'|'.join(map(re.escape, sorted(starts)))})([0-9]+)")
    layers = len({match[1] for name in found if (match := numbers.match(name))})
    if layers != config.n_layer:
        raise ValueError(f"{source} has {layers} layers, but {says} calls for {config.n_layer}")
