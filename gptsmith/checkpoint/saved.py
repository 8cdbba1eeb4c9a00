"""Save a model as a Hugging Face folder, and read it.

Knows nothing of training: an optimizer is just more tensors, its state just more JSON.
"""

import warnings
from collections.abc import Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..config.classifier import ClassifierConfig
from ..config.cost import components
from ..config.model import GPTConfig
from ..config.quantization import packed_matrices
from ..machine.dtypes import NUMBER_FORMATS, nearest_dtype
from ..machine.environment import cores
from ..machine.files import read_json, write_json, written_whole
from ..model.classifier import Classifier, new_model
from ..model.gpt import GPT
from ..model.quantized import packed_bits, put_packed
from ..tokenizers import Tokenizer, Usage, load_tokenizer, read_usage
from ..tokenizers.usage import GENERATION, IDS
from .adapter import check_base, open_adapter, put_adapter, with_adapter, write_adapter
from .adapter_json import is_adapter
from .config_json import quantized_json, to_hugging_face
from .folder import (
    CONFIG,
    find_base,
    read_folder,
    safetensors_header,
)
from .names import PREFIX, TensorMatch, full_name, hugging_face
from .safetensors import entries_of, fetch_from, write_safetensors, write_shards
from .tensors import (
    Entry,
    Fetch,
    Stored,
    from_theirs,
    packed_entries,
    packing,
    to_theirs,
    with_all,
    with_more_tokens,
    with_packed,
)

OPTIMIZER = "training/optimizer.safetensors"
STATE = "training/state.json"
MOST_READERS = 4


# -- writing


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
    stored = replace(stored_model(model), tokenizer=tokenizer)
    check_pair(stored.config, tokenizer, "the model")
    with written_whole(Path(folder)) as temporary:
        if model.lora is not None:
            write_adapter(model, temporary)
            write_usage(stored, temporary)
        else:
            write(stored, temporary)
        if optimizer is not None:
            (temporary / OPTIMIZER).parent.mkdir()
            write_safetensors(temporary / OPTIMIZER, entries_of(optimizer))
        if state is not None:
            write_json(temporary / STATE, state)


def stored_model(model: GPT) -> Stored:
    """Return a model in memory as a stored one, without a tokenizer; packing is kept."""
    get = model.state_dict().__getitem__
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


# -- reading


def load_folder(
    folder: Path,
    *,
    tokenizer: Tokenizer | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    bits: int | None = None,
    unpacked: bool = False,
    base: str | Path | None = None,
) -> tuple[GPT, Tokenizer | None]:
    """Load the model of a folder that `find_model` returned, and its tokenizer, unless it is given.

    The other arguments are those of `loading.load`.
    """
    stored = open_folder(folder, with_tokenizer=tokenizer is None, base=base)
    if tokenizer is not None:
        check_pair(stored.config, tokenizer, folder)
        stored = replace(stored, tokenizer=tokenizer)
    if bits is not None:
        stored = packing(stored, bits)
    model = build(stored, device=device, dtype=dtype, unpacked=unpacked, readers=cores())
    return model, stored.tokenizer


def load_adapted(
    folder: Path,
    *,
    base: str | Path | None = None,
    device: torch.device | str = "cpu",
    dropout: float | None = None,
) -> GPT:
    """Load an adapter beside the frozen weights of its base, to train it further.

    In float32 and evaluation mode; `dropout` replaces the base's. ValueError for another base.
    """
    place = find_base(folder, base)
    stored = open_folder(place, with_tokenizer=False)
    adapter = open_adapter(folder, stored.config)
    check_base(adapter, stored, place)
    vocab_size = adapter.config.vocab_size
    model = load_model(place, device=device, dropout=dropout, vocab_size=vocab_size)
    if isinstance(adapter.config, ClassifierConfig):
        model = Classifier.of(model, adapter.config.labels, adapter.config.pad_token_id)
    put_adapter(model, adapter, str(place.resolve()))
    return model


def load_model(
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    dropout: float | None = None,
    vocab_size: int = 0,
) -> GPT:
    """Load the model of a folder in float32 and evaluation mode, unpacked if it is quantized.

    `dropout` replaces the folder's, for fine-tuning; the vocabulary grows to at least `vocab_size`.
    """
    stored = open_folder(folder, with_tokenizer=False)
    if stored.bits is not None:
        warnings.warn(f"{folder} is quantized to {stored.bits} bits: unpacked", stacklevel=2)
    if dropout is not None:
        stored = replace(stored, config=replace(stored.config, dropout=dropout))
    stored = with_more_tokens(stored, vocab_size)
    return build(stored, device=device, unpacked=True)


def open_folder(
    folder: Path, *, with_tokenizer: bool = True, base: str | Path | None = None
) -> Stored:
    """Open a model's folder; ValueError if its tensors do not match its config.json.

    Reads no tensors yet, except biases that config.json calls absent. An adapter is added to the
    weights of its base, `base` or the one that it names, as they are read.
    """
    if is_adapter(folder):
        return open_merged(folder, find_base(folder, base), with_tokenizer=with_tokenizer)
    if base is not None:
        raise ValueError(f"{folder} is a whole model, and no adapter: leave out the base")
    found = read_folder(folder)
    get = fetch_from(found.tensors)
    if found.bits is not None:

        def get_ours(name: str) -> Tensor:
            return get(full_name(name))

        stored = Stored(config=found.config, fetch=get_ours, tokenizer=None, tensors=found.match)
        stored = with_packed(stored, found.bits, get_ours)
    else:
        stored = stored_unpacked(folder, found.config, found.match, found.tensors, get)
        largest = max(found.tensors.values(), key=lambda tensor: tensor.bytes)
        stored = replace(stored, dtype=nearest_dtype(largest.dtype))
    tokenizer = None
    if with_tokenizer and (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    check_pair(stored.config, tokenizer, folder)
    return replace(stored, tokenizer=tokenizer, defaults=read_usage(folder))


def open_merged(folder: Path, base: Path, *, with_tokenizer: bool) -> Stored:
    """Open the model that an adapter makes of its base; ValueError if it is for another base."""
    own = (folder / "tokenizer.json").is_file()
    stored = open_folder(base, with_tokenizer=with_tokenizer and not own)
    adapter = open_adapter(folder, stored.config)
    check_base(adapter, stored, base)
    merged = with_adapter(stored, adapter)
    if own:
        tokenizer = load_tokenizer(folder) if with_tokenizer else None
        merged = replace(merged, tokenizer=tokenizer, defaults=read_usage(folder))
    check_pair(merged.config, merged.tokenizer, folder)
    return merged


def stored_unpacked(
    folder: Path, config: GPTConfig, match: TensorMatch, names: Iterable[str], get: Fetch
) -> Stored:
    """Return the model in a Hugging Face class's tensors, which `get` fetches by `names`."""
    exact = {name.removeprefix(PREFIX): name for name in names}
    fetch = from_theirs(hugging_face(config), config, lambda name: get(exact[name]))
    if not config.modern:
        config = with_biases_found(config, fetch, exact, folder)
    return Stored(config=config, fetch=fetch, tokenizer=None, tensors=match)


def with_biases_found(
    config: GPTConfig, fetch: Fetch, found: Container[str], folder: Path
) -> GPTConfig:
    """Return the configuration with biases switched on if the tensors have them.

    The tensors decide: another tool may have fine-tuned biases that were written as zeros and that
    the "gptsmith" section still calls absent.
    """
    absent = [part.name for part in components(config) if part.absent and part.name in found]
    learned = [name for name in absent if fetch(name).any()]
    qkv = any(name.endswith("attn.c_attn.bias") for name in learned)
    rest = any(not name.endswith("attn.c_attn.bias") for name in learned)
    if learned:
        warnings.warn(
            f"{folder} has biases that its config.json calls absent: they are used", stacklevel=3
        )
    return replace(config, bias=config.bias or rest, qkv_bias=config.has_qkv_bias or qkv)


def check_pair(config: GPTConfig, tokenizer: Tokenizer | None, place: object) -> None:
    """Raise ValueError if a tokenizer has ids that the model does not have."""
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{place}: the tokenizer has {tokenizer.vocab_size:,} tokens, "
            f"but the model's vocabulary only {config.vocab_size:,}: they do not belong together"
        )


def build(
    stored: Stored,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    unpacked: bool = False,
    readers: int = 1,
) -> GPT:
    """Read a stored model into memory, in evaluation mode; packed unless `unpacked`.

    `readers` tensors are read at a time: most of the time goes to the system, which finds memory
    for them and transposes them into it.
    """
    model = without_weights(stored.config).to(dtype)
    packed = stored.bits is not None and not unpacked
    if packed:
        put_all_packed(model, stored, torch.device(device))
    names = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    with ThreadPoolExecutor(min(readers, MOST_READERS)) as pool:
        tensors = pool.map(lambda name: stored.tensor(name).to(dtype).contiguous(), names)
        weights = dict(zip(names, tensors, strict=True))
    model.load_state_dict(weights, assign=True, strict=False)  # packed matrices are there already
    if not packed:
        model.tie_weights()
    return model.to(device).eval()


def put_all_packed(model: GPT, stored: Stored, device: torch.device) -> None:
    """Give a model its packed matrices, moving each to the device before reading the next."""
    assert stored.bits is not None
    for name, bits in packed_matrices(model.config, stored.bits).items():
        words, scales = (stored.fetch(f"{name}.{kind}").to(device) for kind in ("words", "scales"))
        put_packed(model, name, words, scales, bits)


def without_weights(config: GPTConfig) -> GPT:
    """Return a model whose weights are still on the meta device: no memory, no initialization."""
    with torch.device("meta"), _NothingDrawn():
        return new_model(config)


class _NothingDrawn(TorchFunctionMode):
    """A context in which torch.nn.init does nothing.

    On the meta device it would draw no numbers either, but it would import PyTorch's compiler,
    which takes longer than reading GPT-2.
    """

    def __torch_function__(
        self, function: Any, types: Any, inputs: Any = (), options: Any = None
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return inputs[0] if inputs else options["tensor"]
        return function(*inputs, **(options or {}))


def load_training(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the optimizer's tensors (any shapes) and the training state, as given to `save`."""
    if not (folder / STATE).is_file() or not (folder / OPTIMIZER).is_file():
        raise ValueError(f"{folder} has a model but no training state: start from it with --from")
    state = read_json(folder / STATE)
    tensors = safetensors_header(folder / OPTIMIZER)
    get = fetch_from(tensors)
    return {name: get(name) for name in tensors}, state
