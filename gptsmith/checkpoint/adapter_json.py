"""Convert the settings of adapters to PEFT's `adapter_config.json` and back.

Knows nothing of tensors, or of where the base is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.fields import SettingError
from ..config.lora import LoRASettings
from ..machine.files import read_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
OWN = "gptsmith.json"  # what PEFT has no place for: which weights the adapter belongs to, and sizes
SCORE = "base_model.model.score.weight"  # a classifier's head, in PEFT's name
# Fields that change the mathematics, or the base's weights, with the values that we support; PEFT
# turns fan_in_fan_out on by itself, since GPT-2's matrices are (in, out) in transformers.
_ORDINARY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_CLS", None),
    "bias": ("none",),
    "fan_in_fan_out": (True, False),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
}
# Fields that are read below, or whose values do not matter once the tensors are there.
_READ = {"base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"}
_READ |= {"use_rslora", "rank_pattern", "alpha_pattern", "trainable_token_indices"}
_CHOOSING = {"exclude_modules", "layers_to_transform", "layers_pattern"}
_HARMLESS = {"auto_mapping", "ensure_weight_tying", "eva_config", "inference_mode", "revision"}
_HARMLESS |= {"megatron_core", "peft_version", "qalora_group_size"}


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def has_labels(folder: Path) -> bool:
    """Return whether an adapter's model scores labels, with a head that is in its folder."""
    return read_json(folder / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"


def read_own(folder: Path) -> dict[str, Any]:
    """Return what we wrote beside an adapter: "base" and "vocab_size"; nothing if PEFT wrote it."""
    return read_json(folder / OWN) if (folder / OWN).is_file() else {}


def read_adapter_config(folder: Path) -> LoRASettings:
    """Return the adapters that a folder describes; ValueError if they are not plain LoRA."""
    try:
        return from_peft(read_json(folder / ADAPTER_CONFIG))
    except SettingError as error:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: {error.problem}") from error
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def from_peft(theirs: Mapping[str, Any]) -> LoRASettings:
    """Return the adapters of an adapter_config.json; ValueError if they are not plain LoRA."""
    for key, ordinary in _ORDINARY.items():
        if (got := theirs.get(key, ordinary[0])) not in ordinary:
            raise ValueError(
                f"{ADAPTER_CONFIG} has {key} {got!r}, but only plain LoRA is understood, with "
                f"{' or '.join(map(repr, ordinary))}"
            )
    for key in theirs.keys() - _ORDINARY.keys() - _READ - _CHOOSING - _HARMLESS:
        if theirs[key]:
            raise ValueError(
                f"{ADAPTER_CONFIG} has {key} {theirs[key]!r}, but only plain LoRA is understood, "
                "without it"
            )
    targets = theirs.get("target_modules")
    listed = isinstance(targets, list) and not any(map(theirs.get, _CHOOSING))
    return LoRASettings(
        rank=theirs.get("r", 8),
        alpha=number(theirs, "lora_alpha", 8),
        dropout=number(theirs, "lora_dropout", 0.0),
        targets=tuple(map(str, targets or ()))
        if listed
        else (),  # else the tensors' names say which
        rank_stabilized=bool(theirs.get("use_rslora", False)),
        ranks=section(theirs, "rank_pattern"),
        alphas=section(theirs, "alpha_pattern"),
        base=str(theirs.get("base_model_name_or_path") or ""),
        tokens=learned_tokens(theirs.get("trainable_token_indices")),
    )


def number(theirs: Mapping[str, Any], key: str, otherwise: float) -> float:
    """Return a field that must be a number."""
    value = theirs.get(key, otherwise)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{ADAPTER_CONFIG} has {key} {value!r}: a number is needed")
    return value


def section(theirs: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a field that must be an object of numbers by pattern."""
    value = theirs.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{ADAPTER_CONFIG} has {key} {value!r}: an object is needed")
    return {pattern: number(value, pattern, 0) for pattern in value}


def learned_tokens(value: Any) -> tuple[int, ...]:
    """Return the tokens of trainable_token_indices: a list, or one by the embedding's name."""
    if isinstance(value, dict) and set(value) == {"wte"}:
        value = value["wte"]
    ids = [] if value is None else value
    if not isinstance(ids, list) or not all(type(id) is int and id >= 0 for id in ids):
        raise ValueError(
            f"{ADAPTER_CONFIG} has trainable_token_indices {value!r}: a list of token ids is needed"
        )
    return tuple(ids)


def to_peft(lora: LoRASettings, *, classifier: bool = False) -> dict[str, Any]:
    """Return the adapter_config.json of adapters, as PEFT reads it."""
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if classifier else "CAUSAL_LM",
        "base_model_name_or_path": lora.base or None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "rank_pattern": dict(lora.ranks),
        "alpha_pattern": dict(lora.alphas),
        "target_modules": list(lora.targets),
        "fan_in_fan_out": True,
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": ["score"] if classifier else None,
        "trainable_token_indices": list(lora.tokens) or None,
        "inference_mode": True,
    }
