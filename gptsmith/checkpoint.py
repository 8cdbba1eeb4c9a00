"""A model is one folder: tensors to disk and back, under the names Hugging Face uses for it.

Knows nothing of training: an optimizer is just more tensors, its state just more JSON.
"""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import folder as on_disk
from . import nanochat
from .config import GPTConfig
from .folder import DamagedError
from .model import GPT
from .tokenizers import Tokenizer, load_tokenizer

BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
PREFIX = "transformer."  # what GPT2LMHeadModel puts before every name but lm_head's
# GPT2LMHeadModel keeps these as (in, out); nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks that older files carry; not weights
OPTIMIZER = "training/optimizer.safetensors"
STATE = "training/state.json"


# -- writing


def save(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    optimizer: Mapping[str, Tensor] | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Write a model as a new Hugging Face folder (GPT-2's or NanoChat's), whole or not at all.

    `optimizer` (tensors by name) and `state` (JSON) make it a training checkpoint.
    """
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, "
            f"but the model's vocabulary only {model.config.vocab_size:,}"
        )
    with on_disk.written_whole(Path(folder)) as temporary:
        try:
            save_file(
                to_hugging_face(model), temporary / on_disk.WEIGHTS, metadata={"format": "pt"}
            )
            if optimizer is not None:
                (temporary / OPTIMIZER).parent.mkdir()
                save_file(dict(optimizer), temporary / OPTIMIZER, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder} could not be written: {error}") from error
        end_of_text = None if tokenizer is None else tokenizer.end_of_text
        ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
        config = {**model.config.to_hugging_face(), **ids, "dtype": "float32"}
        on_disk.write_json(temporary / on_disk.CONFIG, config)
        on_disk.write_json(
            temporary / "generation_config.json", {"_from_model_config": True, **ids}
        )
        if tokenizer is not None:
            tokenizer.save(temporary, model_max_length=model.config.context_length)
        if state is not None:
            on_disk.write_json(temporary / STATE, state)


def to_hugging_face(model: GPT) -> dict[str, Tensor]:
    """A model's tensors with the names and orientation that its Hugging Face class saves.

    GPT2LMHeadModel has every bias, so the ones that this model does without are written as zeros.
    """
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_weights:
        del weights["lm_head.weight"]
    if model.config.modern:
        return apart(model.config, weights)
    for name in every_name(model.config):
        if name not in weights:
            rows = weights[name.removesuffix("bias") + "weight"].shape[0]
            weights[name] = torch.zeros(rows)
    return {
        name if name.startswith("lm_head") else PREFIX + name: oriented(name, tensor)
        for name, tensor in weights.items()
    }


def apart(config: GPTConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors as NanoChat names them, with query, key and value apart."""
    names, result = nanochat.names(config), dict[str, Tensor]()
    for name, tensor in weights.items():
        rows = config.attention_rows if len(names[name]) == 3 else (len(tensor),)
        parts = [part.clone() for part in tensor.split(rows)]  # a file wants none that share memory
        result |= dict(zip(names[name], parts, strict=True))
    return result


def joined(config: GPTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `apart` took apart; tensors that are incomplete or unknown stay as they are."""
    for name, theirs in nanochat.names(config).items():
        if all(part in weights for part in theirs):
            weights[name] = torch.cat([weights.pop(part) for part in theirs])
    return weights


def oriented(name: str, tensor: Tensor) -> Tensor:
    """A tensor turned between our orientation and theirs; the turn is its own inverse."""
    return tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor.contiguous()


def every_name(config: GPTConfig) -> list[str]:
    """Our names of the tensors that a Hugging Face folder holds: all biases, no tied head."""
    blocks = [f"h.{layer}.{part}" for layer in range(config.n_layer) for part in BLOCK]
    names = [f"{part}.{kind}" for part in (*blocks, "ln_f") for kind in ("weight", "bias")]
    head = [] if config.tie_weights else ["lm_head.weight"]
    return ["wte.weight", "wpe.weight", *names, *head]


# -- reading


def load(
    name: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer | None]:
    """The model of a run, checkpoint or Hugging Face folder, in evaluation mode.

    The tokenizer is None where the folder has none. What a manifest lists is verified first.
    """
    folder = on_disk.find_model(name)
    model = load_model(folder, device=device, dtype=dtype)
    if not (folder / "tokenizer.json").is_file():
        return model, None
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size:,} tokens, "
            f"but the model's vocabulary only {model.config.vocab_size:,}: they are no pair"
        )
    return model, tokenizer


def load_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    dropout: float | None = None,
) -> GPT:
    """The model in a folder, in evaluation mode; ValueError where its tensors are not a model's.

    `dropout` replaces the folder's, as fine-tuning may want.
    """
    config = on_disk.read_config(folder)
    if dropout is not None:
        config = replace(config, dropout=dropout)
    on_disk.check_shapes(folder, config)
    weights = read_weights(folder, dtype)
    if config.modern:
        weights = joined(config, weights)
    else:
        config = with_biases_found(config, weights, folder)
    with torch.device("meta"):  # no memory and no time for weights that are replaced at once
        model = GPT(config)
    wanted = model.state_dict()
    if config.tie_weights:
        weights.setdefault("lm_head.weight", weights.get("wte.weight", torch.empty(0)))
    if not config.modern:
        absent_biases = set(every_name(config)) - set(wanted)
        for name in absent_biases:
            weights.pop(name, None)
    check_tensors(folder, weights, wanted)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.to(device).eval()


def read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of a folder as `dtype`; a GPT-2's under our names and orientation."""
    weights = {}
    for path in on_disk.weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for theirs in file.keys():  # noqa: SIM118 (it is no dict)
                    name = theirs.removeprefix(PREFIX)
                    if not name.endswith(MASKS):
                        weights[name] = oriented(name, file.get_tensor(theirs).to(dtype))
        except SafetensorError as error:
            raise DamagedError(f"{path} is not a whole safetensors file: {error}") from error
    return weights


def with_biases_found(config: GPTConfig, weights: Mapping[str, Tensor], folder: Path) -> GPTConfig:
    """The configuration with biases switched on where the tensors have them.

    Tensors are the truth: a folder fine-tuned elsewhere may have learned the biases that were
    written as zeros, and its "gptsmith" section still calls absent.
    """
    found = {name for name, tensor in weights.items() if name.endswith(".bias") and tensor.any()}
    qkv = any(name.endswith("attn.c_attn.bias") for name in found)
    rest = any(not name.endswith("attn.c_attn.bias") for name in found)
    truth = replace(config, bias=config.bias or rest, qkv_bias=config.has_qkv_bias or qkv)
    if (truth.bias, truth.has_qkv_bias) != (config.bias, config.has_qkv_bias):
        warnings.warn(
            f"{folder} has biases that its config.json calls absent: they are used", stacklevel=3
        )
        return truth
    return config


def check_tensors(
    folder: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> None:
    """Raise ValueError unless the tensors are exactly those wanted, by name and shape."""
    kind = "GPT-2" if "wpe.weight" in wanted else "NanoChat"
    if missing := sorted(wanted.keys() - weights.keys()):
        raise ValueError(f"{folder} lacks {len(missing)} tensors of a {kind}, {missing[0]} first")
    if extra := sorted(weights.keys() - wanted.keys()):
        raise ValueError(f"{folder} has {len(extra)} tensors no {kind} has, {extra[0]} first")
    for name, tensor in wanted.items():
        if weights[name].shape != tensor.shape:
            got, needed = tuple(weights[name].shape), tuple(tensor.shape)
            raise ValueError(f"{folder}: {name} is {got}, but config.json calls for {needed}")


def load_training(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's tensors and the training state of a checkpoint, as `save` was given them."""
    if not (folder / STATE).is_file() or not (folder / OPTIMIZER).is_file():
        raise ValueError(f"{folder} holds a model but no training state: start from it with --from")
    state = on_disk.read_json(folder / STATE)
    try:
        with safe_open(folder / OPTIMIZER, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, state  # noqa: SIM118
    except SafetensorError as error:
        raise DamagedError(f"{folder / OPTIMIZER} is not whole: {error}") from error
