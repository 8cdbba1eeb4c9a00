"""Read the folder of any model, without its tensors: a whole one, or an adapter's.

Needs no PyTorch.
"""

from dataclasses import replace
from pathlib import Path

from ..config.classifier import ClassifierConfig
from ..config.model import GPTConfig
from .adapter_json import (
    ADAPTER_WEIGHTS,
    OWN,
    SCORE,
    has_labels,
    is_adapter,
    read_adapter_config,
    read_own,
)
from .finding import find_base
from .header import safetensors_header
from .whole import ModelFolder, read_whole, whole_description


def read_folder(folder: Path, base: str | Path | None = None) -> ModelFolder:
    """Return a folder's description; ValueError if its tensors do not match its config.json.

    For an adapter, the tensors are those of its base.
    """
    if is_adapter(folder):
        found = read_whole(find_base(folder, base))
        return found._replace(path=folder, config=adapted_config(folder, found.config), bits=None)
    return read_whole(folder)


def read_config(folder: Path, base: str | Path | None = None) -> GPTConfig:
    """Return the configuration in a folder's `config.json`, or in that of an adapter's base."""
    return read_description(folder, base)[0]


def read_bits(folder: Path) -> int | None:
    """Return the bits of a folder's packed matrices; None if it is not quantized."""
    return None if is_adapter(folder) else read_description(folder)[1]


def read_description(folder: Path, base: str | Path | None = None) -> tuple[GPTConfig, int | None]:
    """Return the configuration of a model, and the bits of packed matrices.

    Those of an adapter are of the model that it makes of its base, which is never packed.
    """
    if is_adapter(folder):
        return adapted_config(folder, read_config(find_base(folder, base))), None
    return whole_description(folder)


def adapted_config(folder: Path, base: GPTConfig) -> GPTConfig:
    """Return the configuration of a base with an adapter: with rows for the tokens that it adds.

    With a head of labels it is a classifier's, whose labels PEFT does not name.
    """
    own, tokens = read_own(folder), read_adapter_config(folder).tokens
    V, labels, pad = own.get("vocab_size", 0), own.get("labels"), own.get("pad_token_id")
    if type(V) is not int or not (labels is None or isinstance(labels, list)):
        raise ValueError(
            f"{folder / OWN} has vocab_size {V!r} and labels {labels!r}: it was edited"
        )
    config = replace(base, vocab_size=max(base.vocab_size, V, *(id + 1 for id in tokens)))
    if labels is None and not isinstance(base, ClassifierConfig) and has_labels(folder):
        score = safetensors_header(folder / ADAPTER_WEIGHTS).get(SCORE)
        labels = [f"LABEL_{number}" for number in range(0 if score is None else score.shape[0])]
    return config if labels is None else ClassifierConfig.of(config, tuple(labels), pad)
