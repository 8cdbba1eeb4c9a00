"""Fetch, rename and write a model's tensors one at a time.

No function holds all of a model, so that models as large as the memory can be converted. Knows
nothing of configurations on disk or of file formats.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config.classifier import ClassifierConfig
from ..config.cost import Shape
from ..config.model import GPTConfig
from ..config.quantization import packed_matrices
from ..machine.devices import torch_dtype
from ..machine.dtypes import NUMBER_FORMATS, dtype_named, nearest_dtype
from ..machine.files import DamagedError
from ..model.quantized import pack, unpack
from ..tokenizers import Tokenizer, Usage
from .names import (
    PREFIX,
    TensorInfo,
    TensorMatch,
    WeightName,
    components_by_name,
    match_tensors,
    per_layer,
    their_shapes,
)
from .packing import expected_tensors

Fetch = Callable[[str], Tensor]  # returns a tensor by its name; the caller frees it after use


VOCABULARY = ("wte.weight", "lm_head.weight")  # a row for each token


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A model in a file, whose tensors are read one by one when they are asked for."""

    config: GPTConfig
    fetch: Fetch  # our name -> the tensor in our orientation and the file's number format, unpacked
    tokenizer: Tokenizer | None
    dtype: str = "float32"  # the number format of most weights, or the nearest that we know
    tensors: TensorMatch = TensorMatch()
    bits: int | None = None  # of packed matrices; `fetch` then also returns their words and scales
    defaults: Usage = Usage()  # what a folder without a tokenizer says about its use

    @property
    def usage(self) -> Usage:
        """What the model's folder says about its use, which travels with the tokenizer."""
        return self.defaults if self.tokenizer is None else self.tokenizer.usage

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by our name; for a tied head, the embedding."""
        tied = name == "lm_head.weight" and self.config.tie_weights
        return self.fetch("wte.weight" if tied else name)


class Entry(NamedTuple):
    """A tensor to write, under the target's name for it."""

    name: str
    shape: Shape
    dtype: str
    fetch: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Size in a file, in bytes."""
        return prod(self.shape) * NUMBER_FORMATS[self.dtype].bytes

    def tensor(self) -> Tensor:
        """Return the tensor, contiguous, in its number format; ValueError for a wrong shape."""
        tensor = self.fetch()
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name} is {tuple(tensor.shape)}, but should be {self.shape}")
        return tensor.detach().cpu().to(torch_dtype(self.dtype)).contiguous()

    def read(self) -> Any:
        """Return the tensor's bytes as in a file: little-endian and row-major."""
        return self.tensor().reshape(-1).view(torch.uint8).numpy().data


# -- renaming


def from_theirs(table: Iterable[WeightName], config: GPTConfig, get: Fetch) -> Fetch:
    """Return a function that fetches our tensors, given `get`, which fetches theirs."""
    by_name = {name.ours: name for name in per_layer(table, config)}

    def fetch(ours: str) -> Tensor:
        name = by_name[ours]
        tensors = [get(theirs) for theirs in name.theirs]
        if name.transposed:
            tensors = [tensor.t() for tensor in tensors]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    return fetch


def stored_under(
    table: Sequence[WeightName],
    config: GPTConfig,
    shapes: Mapping[str, Shape],
    get: Fetch,
    *,
    tokenizer: Tokenizer | None = None,
    **explaining: Any,
) -> Stored:
    """Return the model in tensors with these names and shapes, checked by `match_tensors`."""
    match = match_tensors(table, config, shapes, **explaining)
    fetch = from_theirs(table, config, get)
    return Stored(config=config, fetch=fetch, tokenizer=tokenizer, tensors=match)


def stored_state(
    table: Sequence[WeightName], config: GPTConfig, state: Mapping[str, Tensor], **explaining: Any
) -> Stored:
    """Return a state dict with their names (any shapes) as a stored model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stored = stored_under(table, config, shapes, state.__getitem__, **explaining)
    return replace(stored, dtype=nearest_dtype(stored.fetch("wte.weight").dtype))


def first_tokens(count: int, fetch: Fetch) -> Fetch:
    """Return a function that fetches the model with only the first `count` tokens' rows."""

    def get(name: str) -> Tensor:
        tensor = fetch(name)
        return tensor[:count] if name in VOCABULARY else tensor

    return get


def with_more_tokens(stored: Stored, vocab_size: int) -> Stored:
    """Return the model with rows for at least so many tokens; new ones are the mean of the others.

    The mean is nearest to all of them, so that a new token is neither likely nor unlikely.
    """
    V, config = stored.config.vocab_size, stored.config
    if vocab_size <= V:
        return stored

    def fetch(name: str) -> Tensor:
        tensor = stored.fetch(name)
        if name not in VOCABULARY or len(tensor) != V:  # a classifier's head has labels
            return tensor
        mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
        return torch.cat((tensor, mean.expand(vocab_size - V, -1)))

    return replace(stored, config=replace(config, vocab_size=vocab_size), fetch=fetch, bits=None)


def to_theirs(
    table: Iterable[WeightName], config: GPTConfig, fetch: Fetch, dtype: str
) -> list[Entry]:
    """Return their tensors of a model, in the table's order, without absent and tied ones."""
    ours, entries = components_by_name(config), []
    for name in per_layer(table, config):
        part = ours[name.ours]
        if part.absent or part.tied:
            continue
        for number, (theirs, shape) in enumerate(their_shapes(name, config, part.shape).items()):
            get = partial(_cut_out, name, number, config, fetch)
            entries.append(Entry(theirs, shape, dtype, get))
    return entries


def _cut_out(name: WeightName, number: int, config: GPTConfig, fetch: Fetch) -> Tensor:
    """Return one of their tensors, split off from ours and transposed as the table says."""
    tensor = fetch(name.ours)
    if len(name.theirs) > 1:
        tensor = tensor.split(config.attention_rows)[number]
    return tensor.t() if name.transposed else tensor


def with_all(config: GPTConfig, fetch: Fetch, wider: GPTConfig) -> Fetch:
    """Return a function that fetches the model as one of `wider`, which has additional tensors.

    An absent bias becomes zeros, and a tied head becomes a copy of the embedding.
    """
    ours, theirs = components_by_name(config), components_by_name(wider)

    def get(name: str) -> Tensor:
        if ours[name].tied:
            return fetch("wte.weight")
        return torch.zeros(theirs[name].shape) if ours[name].absent else fetch(name)

    return get


# -- packing


def packing(stored: Stored, bits: int) -> Stored:
    """Return the model with its matrices packed when they are fetched.

    ValueError if they are already packed in another number of bits.
    """
    if stored.bits == bits:
        return stored
    if stored.bits is not None:
        raise ValueError(
            f"the model is already quantized to {stored.bits} bits: for {bits} bits, use the "
            "original model"
        )
    if isinstance(stored.config, ClassifierConfig):
        raise ValueError(f"a classifier cannot be quantized to {bits} bits: use bf16 or float32")
    matrices = packed_matrices(stored.config, bits)

    # A matrix's words and scales are fetched one after the other, so the last one is cached.
    @lru_cache(maxsize=1)
    def packed(module: str) -> tuple[Tensor, Tensor]:
        return pack(stored.fetch(f"{module}.weight"), matrices[module])

    def get(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        return packed(module)[kind == "scales"]

    return with_packed(stored, bits, get)


def with_packed(stored: Stored, bits: int, get: Fetch) -> Stored:
    """Return the model with packed matrices, whose words and scales `get` fetches."""
    matrices = packed_matrices(stored.config, bits)

    def fetch(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        if kind in ("words", "scales"):
            return get(name)
        if kind == "weight" and module in matrices:
            return unpack(get(f"{module}.words"), get(f"{module}.scales"), matrices[module])
        return stored.fetch(name)

    return replace(stored, fetch=fetch, bits=bits)


def packed_entries(stored: Stored, bits: int) -> list[Entry]:
    """Return the tensors of a packed model's folder; unpacked ones keep the model's dtype."""
    return [
        Entry(
            name,
            shape,
            stored.dtype if stored.dtype in dtypes else dtypes[0],
            partial(stored.fetch, name.removeprefix(PREFIX)),
        )
        for name, (shape, dtypes) in expected_tensors(stored.config, bits).items()
    ]


# -- reading files that store numbers as memory does


def read_bytes(tensor: TensorInfo) -> np.ndarray:
    """Read a tensor's bytes from its file; DamagedError if the file has become shorter."""
    data = np.fromfile(tensor.file, np.uint8, tensor.bytes, offset=tensor.start)
    if len(data) < tensor.bytes:
        raise DamagedError(f"{tensor.file} is cut short: it became smaller while it was read")
    return data


def read_tensor(tensor: TensorInfo) -> Tensor:
    """Read a tensor of any shape, in one of the number formats that models are stored in."""
    data = torch.from_numpy(read_bytes(tensor))
    return data.view(torch_dtype(dtype_named(tensor.dtype))).reshape(tensor.shape)
