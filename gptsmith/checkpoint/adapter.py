"""The tensors of a PEFT adapter folder: read them, check them against their base, write them.

Knows nothing of how the base is found, or of training.

Shapes:  R rank    K learned tokens    C channels
"""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.cost import components
from ..config.lora import LoRASettings
from ..config.model import GPTConfig
from ..machine.files import write_json
from ..model.classifier import Classifier
from ..model.gpt import GPT
from ..model.lora import LearnedEmbedding, add_lora, lora_delta, lora_layers
from .adapter_json import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    OWN,
    SCORE,
    has_labels,
    read_adapter_config,
    read_own,
    to_peft,
)
from .folder import adapted_config
from .header import safetensors_header
from .names import TensorMatch, components_by_name
from .safetensors import entries_of, fetch_from, write_safetensors
from .tensors import Fetch, Stored, with_more_tokens

FORMAT = {"format": "gptsmith-adapter", "version": 1}
SAMPLED = 64  # numbers of each tensor that a base's fingerprint is made of

PREFIX = "base_model.model."
HEAD = SCORE.removeprefix(PREFIX)
ROWS = "wte.token_adapter.trainable_tokens_delta"
_PART = re.compile(r"(h\.[0-9]+\.[a-z_.]+)\.lora_([AB])\.weight")
# With a resized embedding, PEFT also saves the whole of it, and the rows again for a tied head.
_AGAIN = re.compile(r"(wte|lm_head)\.token_adapter\.base_layer\.weight|lm_head\.token_adapter\..*")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A folder's adapters: their settings, and a function that fetches their tensors."""

    folder: Path
    lora: LoRASettings
    fetch: Fetch  # by the names in the file, without the prefix
    shapes: dict[str, tuple[int, ...]]
    layers: tuple[str, ...]  # by their names in our model
    config: GPTConfig  # of the model that they make of their base

    def pair(self, layer: str) -> tuple[Tensor, Tensor]:
        """Return a layer's matrices A (R, in) and B (out, R), in float32."""
        a, b = (self.fetch(f"{layer}.lora_{each}.weight").float() for each in "AB")
        return a, b


def open_adapter(folder: Path, base: GPTConfig) -> Adapter:
    """Open a folder's adapters; ValueError if there are tensors that are not plain LoRA's."""
    lora = read_adapter_config(folder)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {ADAPTER_WEIGHTS}, only {ADAPTER_CONFIG}")
    tensors = safetensors_header(path)
    named = {n.removeprefix(PREFIX).removeprefix("transformer."): n for n in tensors}
    shapes = {name: tensors[full].shape for name, full in named.items() if not _AGAIN.match(name)}
    layers = dict.fromkeys(found[1] for name in shapes if (found := _PART.fullmatch(name)))
    expected = {f"{layer}.lora_{each}.weight" for layer in layers for each in "AB"}
    expected |= {ROWS} if lora.tokens else set()
    expected |= {HEAD} if has_labels(folder) else set()
    if strange := sorted(shapes.keys() - expected):
        raise ValueError(f"{path} has {strange[0]}, which is no part of LoRA on GPT-2's blocks")
    if lacking := sorted(expected - shapes.keys()) or ([] if layers else ["any adapter"]):
        raise ValueError(f"{path} lacks {lacking[0]}")
    get = fetch_from(tensors)
    return Adapter(
        folder=folder,
        lora=lora if lora.targets else replace(lora, targets=tuple(layers)),
        fetch=lambda name: get(named[name]),
        shapes=shapes,
        layers=tuple(layers),
        config=adapted_config(folder, base),
    )


def check_base(adapter: Adapter, base: Stored, place: object) -> None:
    """Raise ValueError if an adapter belongs to another base: by its shapes or its fingerprint."""
    lora, ours = adapter.lora, components_by_name(base.config)
    another = f"{adapter.folder} is an adapter for another base than {place}"
    if base.config.modern:
        raise ValueError(f"{another}, which is not a GPT-2")
    config = adapter.config
    wanted = {ROWS: (len(lora.tokens), config.n_embd), HEAD: (config.head_rows, config.n_embd)}
    for layer in adapter.layers:
        part = ours.get(f"{layer}.weight")
        if part is None or len(part.shape) != 2:
            raise ValueError(f"{another}, which has no layer {layer}")
        (out, inside), rank = part.shape, lora.rank_of(layer)
        wanted |= {f"{layer}.lora_A.weight": (rank, inside)}
        wanted |= {f"{layer}.lora_B.weight": (out, rank)}
    for name, shape in adapter.shapes.items():
        if shape != wanted[name]:
            raise ValueError(f"{another}: {name} is {shape}, but {wanted[name]} is needed")
    layers = [p.name.removesuffix(".weight") for p in ours.values() if len(p.shape) == 2]
    missing = [each for each in layers if each.startswith("h.") and lora.covers(each)]
    if lacking := [each for each in missing if each not in adapter.layers]:
        raise ValueError(f"{adapter.folder / ADAPTER_WEIGHTS} lacks the adapter of {lacking[0]}")
    recorded = recorded_base(adapter.folder)
    if recorded is not None and recorded != fingerprint(base.config, base.fetch):
        raise ValueError(f"{another}: its weights differ from those that it was trained on")


def with_adapter(base: Stored, adapter: Adapter) -> Stored:
    """Return the base with the adapters added to its weights as they are fetched, in float32."""
    lora, layers = adapter.lora, set(adapter.layers)
    grown = with_more_tokens(base, adapter.config.vocab_size)

    def fetch(name: str) -> Tensor:
        tensor, layer = grown.fetch(name), name.removesuffix(".weight")
        if layer in layers and name.endswith(".weight"):
            return tensor.float() + lora_delta(*adapter.pair(layer), lora.scale_of(layer))
        if name == "wte.weight" and lora.tokens:
            ids = torch.tensor(lora.tokens)
            return tensor.float().index_copy(0, ids, adapter.fetch(ROWS).float())
        return tensor

    def fetch_head(name: str) -> Tensor:
        return adapter.fetch(HEAD) if name == "lm_head.weight" else fetch(name)

    match = TensorMatch(
        read={**base.tensors.read, **adapter.shapes},
        ignored=base.tensors.ignored,
        missing=base.tensors.missing,
    )
    return replace(
        grown,
        config=adapter.config,
        fetch=fetch_head if HEAD in adapter.shapes else fetch,
        tensors=match,
        bits=None,
        dtype="float32",
    )


@torch.no_grad()
def put_adapter(model: GPT, adapter: Adapter, base: str) -> None:
    """Give the base's model a folder's adapters, as they were, to train them further."""
    lora = replace(adapter.lora, base=base)
    add_lora(model, lora)
    for name, layer in lora_layers(model):
        for parameter, tensor in zip((layer.lora_A, layer.lora_B), adapter.pair(name), strict=True):
            parameter.copy_(tensor)
    if isinstance(model.wte, LearnedEmbedding):
        model.wte.rows.copy_(adapter.fetch(ROWS))
    if isinstance(model, Classifier):
        model.lm_head.weight.copy_(adapter.fetch(HEAD))


def write_adapter(model: GPT, folder: Path) -> None:
    """Write a model's adapters into an existing folder, as PEFT does."""
    assert model.lora is not None
    tensors = dict[str, Tensor]()
    for name, layer in lora_layers(model):
        full = f"{PREFIX}transformer.{name}"
        tensors[f"{full}.lora_A.weight"], tensors[f"{full}.lora_B.weight"] = (
            layer.lora_A,
            layer.lora_B,
        )
    if isinstance(model.wte, LearnedEmbedding):
        tensors[f"{PREFIX}transformer.{ROWS}"] = model.wte.rows
    own: dict[str, Any] = {"vocab_size": model.config.vocab_size}
    if classifier := isinstance(model, Classifier):
        tensors[SCORE] = model.lm_head.weight
        own |= {"labels": list(model.labels), "pad_token_id": model.pad_token_id}
    write_safetensors(folder / ADAPTER_WEIGHTS, entries_of(dict(sorted(tensors.items()))))
    write_json(folder / ADAPTER_CONFIG, to_peft(model.lora, classifier=classifier))
    base = {"fingerprint": fingerprint(model.config, model.state_dict().__getitem__)}
    write_json(folder / OWN, {**FORMAT, **own, "base": base})


# -- which weights an adapter belongs to


def fingerprint(config: GPTConfig, fetch: Fetch) -> str:
    """Return a hash of some numbers of each tensor of the blocks, which `fetch` fetches by name.

    The numbers are hashed in float32. Embedding and head are left out, as they may grow.
    """
    digest = hashlib.sha256()
    for part in components(config):
        if part.count and part.name.startswith("h."):
            tensor, each = fetch(part.name).detach(), torch.arange(SAMPLED)
            # Another step in each dimension, so that the numbers are from all over a matrix.
            places = [
                each * step % size for step, size in zip((7919, 104729), tensor.shape, strict=False)
            ]
            numbers = tensor[tuple(place.to(tensor.device) for place in places)]
            digest.update(
                part.name.encode() + numbers.float().cpu().numpy().astype("<f4").tobytes()
            )
    return digest.hexdigest()


def recorded_base(folder: Path) -> str | None:
    """Return the fingerprint of the weights that an adapter was trained on; None if unknown."""
    base = read_own(folder).get("base")
    return base.get("fingerprint") if isinstance(base, dict) else None
