"""Open a model's folder: its configuration, its tokenizer, and its tensors, ready to be fetched.

An adapter and its base are opened as one model. Reads no weights yet.
"""

import warnings
from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..config.cost import components
from ..config.model import GPTConfig
from ..machine.dtypes import nearest_dtype
from ..tokenizers import Tokenizer, load_tokenizer, read_usage
from .adapter import check_base, open_adapter, with_adapter
from .adapter_json import is_adapter
from .finding import find_base
from .names import PREFIX, TensorMatch, full_name, hugging_face
from .safetensors import fetch_from
from .tensors import Fetch, Stored, from_theirs, with_packed
from .whole import read_whole


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
    found = read_whole(folder)
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
