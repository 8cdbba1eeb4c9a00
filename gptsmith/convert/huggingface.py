"""Hugging Face folders: our own, and those of other tools, also with pickled weights.

Knows nothing of other formats; `checkpoint` reads and writes the folder's files.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import opening, saving
from ..checkpoint.folder import read_config
from ..checkpoint.tensors import Stored
from ..checkpoint.verifying import verify
from ..checkpoint.whole import CONFIG, WEIGHTS, WEIGHTS_INDEX, match_unpacked
from ..config.model import GPTConfig
from ..machine.dtypes import nearest_dtype
from ..machine.files import read_json
from ..machine.shell import typed
from ..tokenizers import Tokenizer, load_tokenizer, read_usage
from .pickles import load_torch_file, tensors_of

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def recognise(path: Path) -> bool:
    """Return whether a folder's config.json names a transformers model, of any architecture."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and ("model_type" in config or "architectures" in config)


def read(path: Path) -> Stored:
    """Open the model and tokenizer of a folder, with weights in any of its file formats.

    DamagedError if the folder has a manifest and a file is not as it says.
    """
    verify(path, training=False)
    if not any((path / name).is_file() for name in (WEIGHTS, WEIGHTS_INDEX)) and any(
        (path / name).is_file() for name in (PICKLED, PICKLED_INDEX)
    ):
        stored = from_pickles(path)
    else:
        stored = opening.open_folder(path, with_tokenizer=False)
        if stored.bits is not None:
            raise ValueError(
                f"{path} is gptsmith's own quantized folder, which needs no import; to unpack it: "
                f"`gptsmith export {typed(path)} OUT --to huggingface`"
            )
    return replace(stored, tokenizer=tokenizer_of(path), defaults=read_usage(path))


def from_pickles(folder: Path) -> Stored:
    """Open a folder whose weights torch.save wrote, in one file or several."""
    config, files = read_config(folder), [PICKLED]
    if not (folder / PICKLED).is_file():
        places = read_json(folder / PICKLED_INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{folder / PICKLED_INDEX} has no weight_map of names to files")
        files = sorted({str(name) for name in places.values()})
    tensors = dict[str, Tensor]()
    for name in files:
        if not (folder / name).is_file() or Path(name).name != name:
            raise FileNotFoundError(f"{folder / name} is missing, though the index lists it")
        tensors |= tensors_of(load_torch_file(folder / name), folder / name)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    match = match_unpacked(folder, config, shapes)
    stored = opening.stored_unpacked(folder, config, match, tensors, tensors.__getitem__)
    return replace(stored, dtype=nearest_dtype(stored.fetch("wte.weight").dtype))


def tokenizer_of(folder: Path) -> Tokenizer | None:
    """Load the tokenizer of a folder in any of GPT-2's three file formats; None without one."""
    names = ("tokenizer.json", "vocab.json", "encoder.json")
    return load_tokenizer(folder) if any((folder / name).is_file() for name in names) else None


def nearest(config: GPTConfig) -> GPTConfig:
    """Return the model itself: the "gptsmith" section has what GPT2Config cannot express."""
    return config


def write(stored: Stored, out: Path, dtype: str, *, shard_bytes: int | None = None) -> None:
    """Write the folder, in files of at most `shard_bytes`."""
    saving.write(replace(stored, dtype=dtype), out, shard_bytes=shard_bytes)


def run(path: Path, tokens: Tensor) -> Tensor:
    """Return the logits that transformers computes, in float32.  (B, T) -> (B, T, V)"""
    import transformers

    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True
        )
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    with torch.inference_mode():
        return model.eval()(tokens).logits
