"""Low-rank adapters (LoRA): which linear layers have one, of which rank, and how many parameters.

An adapter adds scale * x A' B' to what a frozen linear layer computes of x, where A is (R, in) and
B is (out, R). Knows nothing of PyTorch or files.

Letters:  R rank    C channels    M channels inside the MLP    L blocks
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import TypeVar

from . import cost
from .fields import SettingError
from .finetune import LORA_TARGETS, FinetuneSettings
from .model import GPTConfig

TARGETS = tuple(LORA_TARGETS.split(","))

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class LoRASettings:
    """The adapters of a model; patterns are as in PEFT's adapter_config.json."""

    rank: int
    alpha: float
    dropout: float = 0.0  # of what enters an adapter, not the layer itself
    targets: tuple[str, ...] = TARGETS  # ends of the layers' names, after a dot
    rank_stabilized: bool = False  # scale is alpha over the root of the rank (rsLoRA)
    ranks: Mapping[str, int] = field(default_factory=dict)  # of layers whose names match a pattern
    alphas: Mapping[str, float] = field(default_factory=dict)
    base: str = ""  # where the model is that the adapters belong to
    tokens: tuple[int, ...] = ()  # whose rows of the embedding are learned too

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.ranks.values()):
            if type(rank) is not int or rank < 1:
                raise SettingError("lora", f"is rank {rank!r}: at least 1 is needed")

    def rank_of(self, layer: str) -> int:
        """Return the rank of a layer's adapter, given its name in the model: h.0.attn.c_attn."""
        return matching(self.ranks, layer, self.rank)

    def scale_of(self, layer: str) -> float:
        """Return what a layer's adapter is multiplied by: alpha over the rank, or over its root."""
        rank = self.rank_of(layer)
        alpha = matching(self.alphas, layer, self.alpha)
        return alpha / (sqrt(rank) if self.rank_stabilized else rank)

    def covers(self, layer: str) -> bool:
        """Return whether a layer of that name gets an adapter."""
        return any(f".transformer.{layer}".endswith(f".{target}") for target in self.targets)


def matching(patterns: Mapping[str, T], layer: str, otherwise: T) -> T:
    """Return the value of the first pattern that fits the end of a layer's name, as PEFT does."""
    name = f"transformer.{layer}"
    found = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(found, otherwise)


def lora_settings(finetune: FinetuneSettings, base: str) -> LoRASettings:
    """Return the adapters that a run's settings ask for, on the model at `base`."""
    assert finetune.lora is not None
    alpha = finetune.lora_scale * finetune.lora
    return LoRASettings(
        rank=finetune.lora,
        alpha=alpha,
        dropout=finetune.lora_dropout,
        targets=tuple(finetune.lora_targets.split(",")),
        base=base,
    )


def adapter_terms(config: GPTConfig, lora: LoRASettings) -> list[tuple[str, str, int]]:
    """Return name, arithmetic and parameters of each kind of layer that has an adapter.

    An adapter of a matrix (out, in) has R (in + out) parameters; the names are those in `h.0`.
    """
    terms = []
    for part in cost.block_components(config):
        layer = part.name.removesuffix(".weight")
        if len(part.shape) != 2 or not lora.covers(f"h.0.{layer}"):
            continue
        (out, inside), R, L = part.shape, lora.rank, config.n_layer
        terms.append((layer, f"{L} x {R} x ({inside:,} + {out:,})", L * R * (inside + out)))
    return terms


def adapter_count(config: GPTConfig, lora: LoRASettings) -> int:
    """Return the number of the adapters' parameters, where all have the same rank."""
    return sum(count for _, _, count in adapter_terms(config, lora))


def learned_count(config: GPTConfig, finetune: FinetuneSettings, *, labels: int = 0) -> int:
    """Return how many parameters a run learns: all, or adapters, or the last blocks and the head.

    `labels` are those of a classifier, whose head always learns; it is no part of the config.
    """
    head = labels * config.n_embd
    if finetune.lora is not None:
        return adapter_count(config, lora_settings(finetune, "")) + head
    if finetune.freeze is None:
        return cost.parameter_count(config) + head
    last = min(int(finetune.freeze.rpartition("-")[2]), config.n_layer)
    after = sum(part.count for part in cost.components(config) if part.name.startswith("ln_f"))
    if not labels:  # a tied head is the embedding, which learns with it
        head = config.vocab_size * config.n_embd
    return last * cost.block_count(config) + after + head
