"""Verify a conversion by comparing logits before and after, and report it.

Knows nothing of formats. Only one layer of a stored model is in memory at a time.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.building import without_weights
from ..checkpoint.names import TensorMatch
from ..checkpoint.saving import generation_config
from ..checkpoint.tensors import Stored
from ..config.cost import parameter_count
from ..config.model import GPTConfig
from ..tokenizers import Usage
from ..tokenizers.tokenizer import END_OF_TEXT

# Relative to the largest logit: ten times the difference that another order of float32 additions
# makes over 48 layers.
ROUNDING = 1e-3

WIDTH, INDENT = 100, 13  # columns of the report
NO_BREAK = "\u00a0"


# -- the logits


def some_tokens(config: GPTConfig) -> Tensor:
    """Return two rows of random tokens, the same for all models of a size.  -> (B, T)"""
    generator = torch.Generator().manual_seed(0)
    length = min(16, config.context_length)
    return torch.randint(config.vocab_size, (2, length), generator=generator)


@torch.inference_mode()
def logits(stored: Stored, tokens: Tensor) -> Tensor:
    """Compute a stored model's logits in float32.  (B, T) -> (B, T, V)

    Each module's weights are fetched just before its forward pass, and freed after it.
    """
    model = without_weights(stored.config).eval()
    for name, module in model.named_modules():
        if kinds := [kind for kind, _ in module.named_parameters(recurse=False)]:
            names = {kind: f"{name}.{kind}" for kind in kinds}
            module.register_forward_pre_hook(partial(_fill, names, stored))
            module.register_forward_hook(partial(_empty, kinds))
    return model(tokens).logits


def _fill(names: dict[str, str], stored: Stored, module: nn.Module, inputs: Any) -> None:
    for kind, name in names.items():
        tensor = stored.tensor(name).float().contiguous()
        setattr(module, kind, nn.Parameter(tensor, requires_grad=False))


def _empty(kinds: list[str], module: nn.Module, inputs: Any, output: Any) -> None:
    for kind in kinds:
        nothing = torch.empty(0, device="meta")
        setattr(module, kind, nn.Parameter(nothing, requires_grad=False))


def largest_difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference between two sets of logits, (B, T, V); inf if one is NaN."""
    difference = (one - other).abs()
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def rounding_of(reference: Tensor) -> float:
    """Return the difference that rounding may cause, given a model's logits, (B, T, V)."""
    return ROUNDING * max(1.0, float(reference.abs().max()))


# -- the report


def told(stored: Stored) -> list[str]:
    """Describe what a folder says about the use of its model, except for our own defaults."""
    usage, tokenizer = stored.usage, stored.tokenizer
    words = ["chat template" if n == "default" else f"chat template {n}" for n in usage.templates]
    said = [(name, text) for name, text in usage.tokenizer.items() if text != END_OF_TEXT and text]
    ours = generation_config(stored, Usage())
    generation = generation_config(stored, usage)
    if tokenizer is not None:
        ends = sorted(tokenizer.ends - {tokenizer.end_of_text})
        words += [f"end token {id}" for id in ends]
        ours["eos_token_id"] = generation["eos_token_id"]
    said += [(name, value) for name, value in generation.items() if ours.get(name) != value]
    return words + [f"{name} {value}" for name, value in said]


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """The report of a conversion: `str` is a summary, `to_json` is complete."""

    source: str
    source_format: str
    target: str
    target_format: str
    dtype: str
    bytes: int
    config: GPTConfig  # of the model that was read
    tensors: TensorMatch
    lost: tuple[str, ...]  # what the target cannot express, in words
    padding: int  # dropped rows of the embedding, which had no token
    tokenizer: str
    difference: float  # the largest between the logits before and after
    original: str  # the comparison with the original system, in words

    def __str__(self) -> str:
        config = self.config
        numbers = sum(map(prod, self.tensors.read.values()))
        rows = [
            (
                "model",
                f"{parameter_count(config):,} parameters: {config.n_layer} layers, "
                f"{config.n_head} heads, {config.n_embd:,} channels, "
                f"context {config.context_length:,}, vocabulary {config.vocab_size:,}",
            ),
            ("read", f"{numbers:,} numbers in {len(self.tensors.read):,} tensors"),
            ("", grouped(self.tensors.read)),
            *(("ignored", line) for line in explained(self.tensors.ignored)),
            *(("missing", line) for line in explained(self.tensors.missing)),
        ]
        if self.padding:
            rows.append(("padding", f"{self.padding} rows beyond the vocabulary, left out"))
        rows += [("lost", words) for words in self.lost]
        rows += [
            ("tokenizer", self.tokenizer),
            ("logits", f"largest difference to those before: {self.difference:.2g}"),
            ("", self.original),
            ("written", f"{self.target}: {self.target_format}, {self.dtype}, {self.bytes:,} bytes"),
        ]
        lines = wrapped(row for row in rows if row[1])
        return "\n".join([f"{self.source}: {self.source_format}", *lines])

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values, with every tensor by name."""
        return {
            "source": {"path": self.source, "format": self.source_format},
            "target": {
                "path": self.target,
                "format": self.target_format,
                "dtype": self.dtype,
                "bytes": self.bytes,
            },
            "parameters": parameter_count(self.config),
            "read": {name: list(shape) for name, shape in self.tensors.read.items()},
            "ignored": self.tensors.ignored,
            "missing": self.tensors.missing,
            "lost": list(self.lost),
            "padding": self.padding,
            "tokenizer": self.tokenizer,
            "largest_logit_difference": self.difference,
            "original": self.original,
        }


def grouped(names: Iterable[str]) -> str:
    """Group names whose layer number differs: "wte.weight, 12 h.*.ln_1.weight"."""
    patterns = Counter(re.sub(r"[0-9]+(?=[./])", "*", name, count=1) for name in names)
    return ", ".join(name if n == 1 else f"{n}{NO_BREAK}{name}" for name, n in patterns.items())


def explained(reasons: Mapping[str, str]) -> list[str]:
    """Group names by their reason, one line for each."""
    return [
        f"{why}: {grouped(name for name, reason in reasons.items() if reason == why)}"
        for why in dict.fromkeys(reasons.values())
    ]


def wrapped(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return rows of a name and a text as lines, wrapped to WIDTH."""
    lines = []
    for name, words in rows:
        first, *rest = wrap(words, WIDTH - INDENT, break_long_words=False) or [""]
        lines += [f"  {name:<{INDENT - 2}}{first}", *(" " * INDENT + line for line in rest)]
    return [line.replace(NO_BREAK, " ") for line in lines]
