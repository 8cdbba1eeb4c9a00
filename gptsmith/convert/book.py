"""The GPTModel of "Build a Large Language Model (From Scratch)": state dict and configuration.

A state dict does not contain the number of heads, so the configuration dictionary is a JSON file
beside it. Knows nothing of other formats.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.names import CAUSAL, NoWeights, weight_names
from ..checkpoint.tensors import Stored, stored_state, to_theirs
from ..config.model import GPTConfig
from ..machine.files import read_json, write_json
from .pickles import is_torch_file, load_torch_file, save_torch_file, tensors_of

WEIGHTS, SIZES = "model.pth", "config.json"
ENDINGS = (".pth", ".pt")

_BLOCK = "trf_blocks.{}."
NAMES = weight_names(
    {  # ours: theirs
        "wte": "tok_emb",
        "wpe": "pos_emb",
        "h.{}.ln_1": f"{_BLOCK}norm1",
        "h.{}.attn.c_attn": tuple(f"{_BLOCK}att.W_{part}" for part in ("query", "key", "value")),
        "h.{}.attn.c_proj": f"{_BLOCK}att.out_proj",
        "h.{}.ln_2": f"{_BLOCK}norm2",
        "h.{}.mlp.c_fc": f"{_BLOCK}ff.layers.0",
        "h.{}.mlp.c_proj": f"{_BLOCK}ff.layers.2",
        "ln_f": "final_norm",
        "lm_head": "out_head",
    },
    norm=(".scale", ".shift"),
)
MASKS = NoWeights(re.compile(r"trf_blocks\.[0-9]+\.att\.mask"), CAUSAL)


def recognise(path: Path) -> bool:
    """Return whether a file, or the only such file in a folder, is a state dict with `tok_emb`."""
    try:
        file = weights_in(path)
    except ValueError:
        return False
    return is_torch_file(file) and "tok_emb.weight" in state_of(load_torch_file(file))


def read(path: Path) -> Stored:
    """Open the model of a state dict, with the configuration dictionary beside it."""
    file = weights_in(path)
    tensors = tensors_of(state_of(load_torch_file(file)), file)
    config = config_beside(file)
    return stored_state(
        NAMES, config, tensors, source=file, kind="the book's GPTModel", ignored=MASKS
    )


def weights_in(path: Path) -> Path:
    """Return the file itself, or the only file in a folder that may hold a state dict."""
    if path.is_file():
        return path
    files = sorted(file for file in path.glob("*") if file.suffix in ENDINGS)
    if len(files) != 1:
        problem = f"{path} holds {len(files)} files of weights"
        raise ValueError(f"{problem}: name the one to read" if files else problem)
    return files[0]


def state_of(found: Any) -> dict[str, Tensor]:
    """Return the state dict (any shapes), also if it was saved together with the optimizer's."""
    if isinstance(found, dict) and isinstance(found.get("model_state_dict"), dict):
        found = found["model_state_dict"]
    return found if isinstance(found, dict) else {}


def config_beside(file: Path) -> GPTConfig:
    """Return the configuration in the JSON file beside the weights that has the book's keys."""
    found = []
    for path in sorted(file.parent.glob("*.json")):
        try:
            value = read_json(path)
        except ValueError:
            continue  # somebody else's file
        if "emb_dim" in value:
            found.append((path, value))
    if len(found) != 1:
        raise ValueError(
            f"{file.parent} holds {len(found)} JSON files with the book's configuration: one is "
            f'needed, as {{"vocab_size": 50257, "context_length": 1024, "emb_dim": 768, '
            f'"n_heads": 12, "n_layers": 12, "drop_rate": 0.1, "qkv_bias": false}}'
        )
    path, value = found[0]
    try:
        return GPTConfig.from_book(value)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def nearest(config: GPTConfig) -> GPTConfig:
    """Return the closest GPTModel: tanh GELU, untied head, biases (optional in the attention)."""
    return replace(
        config,
        activation="gelu_tanh",
        bias=True,
        qkv_bias=config.has_qkv_bias,
        tie_weights=False,
        n_inner=None,
        norm_eps=1e-5,
    )


def write(stored: Stored, out: Path, dtype: str) -> None:
    """Write the state dict and its configuration dictionary into a folder."""
    config = stored.config
    entries = to_theirs(NAMES, config, stored.fetch, dtype)
    state = {entry.name: entry.tensor() for entry in entries}
    P = config.context_length
    mask = torch.ones(P, P).triu(1)  # a buffer in GPTModel, so a strict load needs it
    state |= {f"trf_blocks.{layer}.att.mask": mask for layer in range(config.n_layer)}
    save_torch_file(state, out / WEIGHTS)
    write_json(out / SIZES, config.to_book())
