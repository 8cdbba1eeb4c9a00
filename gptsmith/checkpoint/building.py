"""Load a folder's model into memory: as it is, packed, or with an adapter beside its base.

Knows nothing of how its files are laid out.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..config.classifier import ClassifierConfig
from ..config.model import GPTConfig
from ..config.quantization import packed_matrices
from ..machine.environment import cores
from ..model.classifier import Classifier, new_model
from ..model.gpt import GPT
from ..model.quantized import put_packed
from ..tokenizers import Tokenizer
from .adapter import check_base, open_adapter, put_adapter
from .finding import find_base
from .opening import check_pair, open_folder
from .tensors import Stored, packing, with_more_tokens

MOST_READERS = 4


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
