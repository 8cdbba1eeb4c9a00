"""Save a model as a Hugging Face folder, whole or not at all.

Knows nothing of training: an optimizer is just more tensors, its state just more JSON.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.classifier import ClassifierConfig
from ..machine.dtypes import NUMBER_FORMATS, nearest_dtype
from ..machine.files import write_json, written_whole
from ..model.gpt import GPT
from ..model.quantized import packed_bits
from ..tokenizers import Tokenizer, Usage
from ..tokenizers.usage import GENERATION, IDS
from .adapter import write_adapter
from .config_json import quantized_json, to_hugging_face
from .names import full_name, hugging_face
from .opening import check_pair
from .safetensors import write_shards
from .tensors import Entry, Stored, packed_entries, to_theirs, with_all, with_packed
from .training_state import write_training
from .whole import CONFIG


def save(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    optimizer: Mapping[str, Tensor] | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Write a model as a new Hugging Face folder, completely or not at all.

    Its class is GPT2LMHeadModel, GPT2ForSequenceClassification, or NanoChat's. Of a model with
    adapters, the folder has only these, as PEFT writes them. `optimizer` (tensors by name) and
    `state` (JSON) make it a training checkpoint.
    """
    save_gathered(model, tokenizer, folder, optimizer=optimizer, state=state, gather=Tensor.detach)


def save_gathered(
    model: GPT,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    optimizer: Mapping[str, Tensor] | None,
    state: dict[str, Any] | None,
    gather: Callable[[Tensor], Tensor],
) -> None:
    """Do what `save` does with tensors that are in parts.

    When a tensor is written, `gather` is called with it, and returns it whole, in any shape.
    """
    stored = replace(stored_model(model, gather), tokenizer=tokenizer)
    check_pair(stored.config, tokenizer, "the model")
    with written_whole(Path(folder)) as temporary:
        if model.lora is not None:
            write_adapter(model, temporary)
            write_usage(stored, temporary)
        else:
            write(stored, temporary)
        write_training(temporary, optimizer, state, gather)


def stored_model(model: GPT, gather: Callable[[Tensor], Tensor] = Tensor.detach) -> Stored:
    """Return a model in memory, of any shape, as a stored one, without a tokenizer; packing is
    kept. `gather` returns each of its tensors."""
    state = model.state_dict(keep_vars=True)

    def get(name: str) -> Tensor:
        return gather(state[name])

    stored = Stored(config=model.config, fetch=get, tokenizer=None)
    if (bits := packed_bits(model)) is None:
        return stored
    return with_packed(replace(stored, dtype=nearest_dtype(model.dtype)), bits, get)


def write(stored: Stored, folder: Path, *, shard_bytes: int | None = None) -> None:
    """Write a stored model into an existing folder, in `stored.dtype`, one tensor at a time.

    Files have at most `shard_bytes`, unless a single tensor is larger.
    """
    if stored.bits is not None:
        entries = packed_entries(stored, stored.bits)
    else:
        entries = hugging_face_entries(stored)
    write_shards(entries, folder, shard_bytes)
    write_description(stored, folder, dtype=NUMBER_FORMATS[stored.dtype].torch)


def write_description(stored: Stored, folder: Path, **more: Any) -> None:
    """Write config.json, including `more`, the tokenizer, and what the folder says of their use."""
    config, tokenizer = stored.config, stored.tokenizer
    generation = generation_config(stored, stored.usage)
    theirs = to_hugging_face(config) if stored.bits is None else quantized_json(config, stored.bits)
    theirs |= {name: generation[name] for name in IDS} | more
    if isinstance(config, ClassifierConfig):
        theirs["pad_token_id"] = pad = config.pad_token_id
        if tokenizer is not None and pad in tokenizer.specials:
            tokenizer = tokenizer.padding_with(tokenizer.specials[pad])
            stored = replace(stored, tokenizer=tokenizer)
    elif "max_new_tokens" in generation:  # transformers 4's pipeline looks for it here only
        fewer = {"max_new_tokens": generation["max_new_tokens"]}
        theirs["task_specific_params"] = {"text-generation": fewer}
    if tokenizer is not None:
        theirs["gptsmith"] = {**theirs.get("gptsmith", {}), "tokenizer": tokenizer.fingerprint}
    write_json(folder / CONFIG, theirs)
    write_usage(stored, folder)


def write_usage(stored: Stored, folder: Path) -> None:
    """Write the tokenizer, and how to generate with the model."""
    if stored.tokenizer is not None:
        stored.tokenizer.save(folder, context_length=stored.config.context_length)
    write_json(folder / GENERATION, generation_config(stored, stored.usage))


def generation_config(stored: Stored, usage: Usage) -> dict[str, Any]:
    """Return the generation_config.json of a model that is used as `usage` says."""
    tokenizer = stored.tokenizer
    return usage.generation_config(
        end=None if tokenizer is None else tokenizer.end_of_text,
        vocab_size=stored.config.vocab_size if tokenizer is None else tokenizer.vocab_size,
        context_length=stored.config.context_length,
    )


def hugging_face_entries(stored: Stored) -> list[Entry]:
    """Return a model's tensors with the names and orientation of its Hugging Face class.

    GPT2LMHeadModel has every bias, so absent ones are written as zeros. They are in the order of
    the safetensors library, so that saving the same weights with transformers gives the same bytes.
    """
    config, table = stored.config, hugging_face(stored.config)
    wider = config if config.modern else replace(config, bias=True, qkv_bias=True)
    entries = to_theirs(table, wider, with_all(config, stored.fetch, wider), stored.dtype)
    if not config.modern:
        entries = [entry._replace(name=full_name(entry.name)) for entry in entries]
    return sorted(entries, key=lambda entry: entry.name)
