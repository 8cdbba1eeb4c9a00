"""minGPT's models: a state dict, as `model.pt` or as JSON, and the number of heads beside it.

A state dict says every size but the number of heads, which is in the `config.json` that minGPT
writes beside it, or in the JSON itself. Knows nothing of other formats.
"""

import base64
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.names import MASKS, OURS, PREFIX, full_name
from ..checkpoint.tensors import Stored, stored_state, to_theirs
from ..config.model import GPTConfig
from ..machine.devices import torch_dtype
from ..machine.dtypes import dtype_named
from ..machine.files import read_json, write_json
from .pickles import is_torch_file, load_torch_file, save_torch_file, tensors_of

WEIGHTS, SIZES = "model.pt", "config.json"
# The heads of minGPT's `model_type`s, whose configuration may have no n_head.
HEADS = {
    "openai-gpt": 12,
    "gpt2": 12,
    "gpt2-medium": 16,
    "gpt2-large": 20,
    "gpt2-xl": 25,
    "gopher-44m": 16,
    "gpt-mini": 6,
    "gpt-micro": 4,
    "gpt-nano": 3,
}


def recognise(path: Path) -> bool:
    """Return whether a file, or the `model.pt` of a folder, is a state dict that only minGPT has.

    Masks and a head of its own tell it from nanoGPT's, whose names are the same.
    """
    file = weights_in(path)
    if not (is_torch_file(file) or is_json(file)):
        return False
    try:
        tensors, _ = contents(file)
    except ValueError:
        return False  # somebody else's file
    if not {"wte.weight", "lm_head.weight", "h.0.attn.bias", "h.0.ln_1.bias"} <= tensors.keys():
        return False
    return not torch.equal(tensors["wte.weight"], tensors["lm_head.weight"])


def read(path: Path) -> Stored:
    """Open the model of a state dict; ValueError if nothing says the number of heads."""
    file = weights_in(path)
    tensors, settings = contents(file)
    config = config_of(tensors, settings, file)
    return stored_state(
        OURS, config, tensors, source=file, kind="minGPT", says="its sizes", ignored=MASKS
    )


def weights_in(path: Path) -> Path:
    """Return the file itself, or the `model.pt` of a folder."""
    return path / WEIGHTS if path.is_dir() else path


def is_json(file: Path) -> bool:
    """Return whether a file begins like a JSON object."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return stream.read(64).lstrip().startswith(b"{")


# -- what a file holds


def contents(file: Path) -> tuple[dict[str, Tensor], Any]:
    """Return the tensors of a file (any shapes), by our names, and minGPT's settings of the model.

    The settings are None if there are none in a JSON file, or beside a file of torch.save.
    """
    state: Any
    if is_json(file):
        state = read_json(file)
        settings = state.pop("config", None)
        state = {name: tensor_of(name, packed, file) for name, packed in state.items()}
    else:
        state, beside = load_torch_file(file), file.with_name(SIZES)
        settings = read_json(beside).get("model") if beside.is_file() else None
    tensors = tensors_of(state, file)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, settings


def tensor_of(name: str, packed: Any, file: Path) -> Tensor:
    """Return a tensor (any shape) of a JSON object."""
    try:
        data = np.frombuffer(base64.b64decode(packed["data"], validate=True), np.uint8).copy()
        dtype = torch_dtype(dtype_named(packed["dtype"]))
        return torch.from_numpy(data).view(dtype).reshape(packed["shape"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file}: {name} is not a tensor ({reason}): an object with shape, dtype and data, "
            "little-endian numbers in base64, is needed"
        ) from error


def config_of(tensors: Mapping[str, Tensor], settings: Any, file: Path) -> GPTConfig:
    """Return the configuration: sizes of the embeddings (V, C) and (P, C), and heads as said."""
    said: dict[str, Any] = settings if isinstance(settings, dict) else {}
    heads = said.get("n_head") or HEADS.get(str(said.get("model_type")))
    if heads is None:
        raise ValueError(
            f"{file} does not say how many heads the model has: put minGPT's {SIZES} beside it, or "
            'a file of that name with {"model": {"n_head": 4}}'
        )
    sizes = {name: tensors[name].shape for name in ("wte.weight", "wpe.weight") if name in tensors}
    if [*map(len, sizes.values())] != [2, 2]:
        raise ValueError(f"{file} lacks the embeddings of a minGPT, wte.weight and wpe.weight")
    layers = {name.split(".")[1] for name in tensors if name.startswith("h.")}
    try:
        return GPTConfig(
            n_layer=len(layers),
            n_head=heads,
            n_embd=sizes["wte.weight"][1],
            vocab_size=sizes["wte.weight"][0],
            context_length=sizes["wpe.weight"][0],
            dropout=said.get("resid_pdrop", 0.0),
            tie_weights=False,
        )
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def nearest(config: GPTConfig) -> GPTConfig:
    """Return the closest minGPT model: tanh GELU, untied head, biases everywhere."""
    return replace(
        config,
        activation="gelu_tanh",
        tie_weights=False,
        bias=True,
        qkv_bias=None,
        n_inner=None,
        norm_eps=1e-5,
    )


def write(stored: Stored, out: Path, dtype: str) -> None:
    """Write the state dict, and its configuration as minGPT's, into a folder."""
    config, P = stored.config, stored.config.context_length
    state = {full_name(e.name): e.tensor() for e in to_theirs(OURS, config, stored.fetch, dtype)}
    mask = torch.ones(P, P).tril().view(1, 1, P, P)  # a buffer, so a strict load needs it
    state |= {f"{PREFIX}h.{layer}.attn.bias": mask for layer in range(config.n_layer)}
    save_torch_file(state, out / WEIGHTS)
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), config.dropout)
    model = {"model_type": None, **sizes, "block_size": P, **rates}
    write_json(out / SIZES, {"model": model})
