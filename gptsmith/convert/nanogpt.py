"""nanoGPT's `ckpt.pt`: a pickled dictionary with a model's sizes and its state dict.

nanoGPT keeps a char vocabulary in `meta.pkl`. Knows nothing of other formats.
"""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.names import MASKS, OURS, PREFIX, full_name
from ..checkpoint.tensors import Stored, stored_state, to_theirs
from ..config.cost import components
from ..config.model import GPTConfig
from ..tokenizers import Tokenizer, open_tokenizer
from ..tokenizers.pickled import CHARACTERS
from .pickles import is_torch_file, load_torch_file, save_torch_file, tensors_of

CHECKPOINT = "ckpt.pt"
_SAME = ("n_layer", "n_head", "n_embd", "bias", "vocab_size", "dropout")
SIZES = {**{name: name for name in _SAME}, "block_size": "context_length"}  # theirs: ours


def recognise(path: Path) -> bool:
    """Return whether a file, or the `ckpt.pt` of a folder, is a checkpoint with `model_args`."""
    file = path / CHECKPOINT if path.is_dir() else path
    if not is_torch_file(file):
        return False
    found = load_torch_file(file)
    return isinstance(found, dict) and {"model", "model_args"} <= found.keys()


def read(path: Path) -> Stored:
    """Open the model of a checkpoint, with the char tokenizer if there is a `meta.pkl`."""
    file = path / CHECKPOINT if path.is_dir() else path
    checkpoint = load_torch_file(file)
    if not isinstance(checkpoint, dict) or not {"model", "model_args"} <= checkpoint.keys():
        raise ValueError(f"{file} is not a nanoGPT checkpoint: it lacks 'model' and 'model_args'")
    tensors = tensors_of(checkpoint["model"], file)
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    config = config_of(checkpoint["model_args"], file)
    stored = stored_state(
        OURS, config, tensors, source=file, kind="nanoGPT", says="its model_args", ignored=MASKS
    )
    return replace(stored, tokenizer=characters_beside(file, checkpoint.get("config")))


def config_of(sizes: Any, file: Path) -> GPTConfig:
    """Return the configuration in `model_args`; nanoGPT has the erf GELU and a tied head."""
    if not isinstance(sizes, dict):
        raise ValueError(f"{file}: model_args is {type(sizes).__name__}, not a dictionary")
    if missing := sorted(SIZES.keys() - sizes.keys()):
        raise ValueError(f"{file}: model_args lacks {', '.join(missing)}")
    if unknown := sorted(str(key) for key in sizes.keys() - SIZES.keys()):
        raise ValueError(
            f"{file}: model_args has {', '.join(unknown)}, which nanoGPT does not know"
        )
    ours = {SIZES[key]: value for key, value in sizes.items()}
    try:
        return GPTConfig(**ours, activation="gelu_erf")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def characters_beside(file: Path, settings: Any) -> Tokenizer | None:
    """Return the char tokenizer of the `meta.pkl` beside a checkpoint or in its dataset's folder;
    None without one."""
    places = [file.with_name(CHARACTERS)]
    dataset = settings.get("dataset") if isinstance(settings, dict) else None
    if isinstance(dataset, str) and dataset == Path(dataset).name:
        places.append(file.resolve().parent.parent / "data" / dataset / CHARACTERS)
    found = [place for place in places if place.is_file()]
    return open_tokenizer(str(found[0])) if found else None


def nearest(config: GPTConfig) -> GPTConfig:
    """Return the closest nanoGPT model: erf GELU, tied head, biases everywhere or nowhere."""
    return replace(
        config,
        activation="gelu_erf",
        tie_weights=True,
        bias=config.bias or config.has_qkv_bias,
        qkv_bias=None,
        n_inner=None,
        norm_eps=1e-5,
    )


def write(stored: Stored, out: Path, dtype: str) -> None:
    """Write `ckpt.pt`, and `meta.pkl` for a char tokenizer, into a folder.

    With a char tokenizer, the checkpoint names the dataset "gptsmith", where nanoGPT's sample.py
    looks for `meta.pkl`. Otherwise it names none, and sample.py uses GPT-2's tokenizer.
    """
    config, tokenizer = stored.config, stored.tokenizer
    entries = to_theirs(OURS, config, stored.fetch, dtype)
    state = {full_name(entry.name): entry.tensor() for entry in entries}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    checkpoint = {
        "model": state,
        "optimizer": fresh_optimizer(config),
        "model_args": {theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "iter_num": 0,
        "best_val_loss": 1e9,  # nanoGPT's initial value
        "config": {},
    }
    if tokenizer is not None and tokenizer.kind == "char":
        checkpoint["config"] = {"dataset": "gptsmith"}
        vocab = tokenizer.vocab
        meta = {"vocab_size": len(vocab), "stoi": vocab, "itos": {i: c for c, i in vocab.items()}}
        (out / CHARACTERS).write_bytes(pickle.dumps(meta))
    save_torch_file(checkpoint, out / CHECKPOINT)


def fresh_optimizer(config: GPTConfig) -> dict[str, Any]:
    """Return the state of nanoGPT's AdamW before the first step, so that its train.py can resume.

    The first group are the matrices, with weight decay; the second are biases and norms.
    """
    shapes = [part.shape for part in components(config) if part.count]
    groups: list[dict[str, Any]] = [
        {"params": [nn.Parameter(torch.empty(0)) for shape in shapes if len(shape) in dimensions]}
        for dimensions in ((2,), (1,))
    ]
    groups[0]["weight_decay"], groups[1]["weight_decay"] = 0.1, 0.0
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()
