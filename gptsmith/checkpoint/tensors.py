"""A model's tensors, fetched one at a time and under any names: from any file, for any file.

Nothing here ever holds all of a model, so that one as large as the memory can be read, renamed and
written. Knows nothing of configurations on disk or of any format of files.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config.cost import Shape
from ..config.model import GPTConfig
from ..config.quantization import packed_matrices
from ..machine.devices import torch_dtype
from ..machine.dtypes import NUMBER_FORMATS, dtype_named, nearest_dtype
from ..machine.files import DamagedError
from ..model.quantized import pack, unpack
from ..tokenizers import Tokenizer
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

Fetch = Callable[[str], Tensor]  # a tensor by its name, ready to be forgotten after use


VOCABULARY = ("wte.weight", "lm_head.weight")  # a row for each token


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A model that lies in some file: what it is, and each of its tensors when asked for."""

    config: GPTConfig
    fetch: Fetch  # our name -> the tensor, our way round, in the numbers of the file; unpacked
    tokenizer: Tokenizer | None
    dtype: str = "float32"  # what most of its numbers are stored in, or come closest to
    tensors: TensorMatch = TensorMatch()
    bits: int | None = None  # if its matrices are packed: `fetch` has their words and scales too

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model by our name: of a tied head, the embedding."""
        tied = name == "lm_head.weight" and self.config.tie_weights
        return self.fetch("wte.weight" if tied else name)


class Entry(NamedTuple):
    """A tensor yet to be written, under somebody's name for it."""

    name: str
    shape: Shape
    dtype: str
    fetch: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """What it takes in a file."""
        return prod(self.shape) * NUMBER_FORMATS[self.dtype].bytes

    def tensor(self) -> Tensor:
        """Itself, in its number format, row by row in memory; ValueError for another shape."""
        tensor = self.fetch()
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name} is {tuple(tensor.shape)}, but should be {self.shape}")
        return tensor.detach().cpu().to(torch_dtype(self.dtype)).contiguous()

    def read(self) -> Any:
        """Its numbers as they lie in a file: little-endian, row by row."""
        return self.tensor().reshape(-1).view(torch.uint8).numpy().data


# -- under other names


def from_theirs(table: Iterable[WeightName], config: GPTConfig, get: Fetch) -> Fetch:
    """What fetches our tensors where `get` fetches theirs."""
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
    dtype: str = "float32",
    tokenizer: Tokenizer | None = None,
    **explaining: Any,
) -> Stored:
    """A model in tensors of these names and shapes, which `match_tensors` checks and explains."""
    match = match_tensors(table, config, shapes, **explaining)
    fetch = from_theirs(table, config, get)
    return Stored(config=config, fetch=fetch, tokenizer=tokenizer, dtype=dtype, tensors=match)


def stored_state(
    table: Sequence[WeightName], config: GPTConfig, state: Mapping[str, Tensor], **explaining: Any
) -> Stored:
    """A state dict under their names (any shapes) as a stored model."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stored = stored_under(table, config, shapes, state.__getitem__, **explaining)
    return replace(stored, dtype=nearest_dtype(stored.fetch("wte.weight").dtype))


def first_tokens(count: int, fetch: Fetch) -> Fetch:
    """What fetches the same model without the tokens from `count` on."""

    def get(name: str) -> Tensor:
        tensor = fetch(name)
        return tensor[:count] if name in VOCABULARY else tensor

    return get


def to_theirs(
    table: Iterable[WeightName], config: GPTConfig, fetch: Fetch, dtype: str
) -> list[Entry]:
    """Their tensors of a model, in the table's order; what the model does without is left out."""
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
    """One of their tensors, cut out of ours and transposed."""
    tensor = fetch(name.ours)
    if len(name.theirs) > 1:
        tensor = tensor.split(config.attention_rows)[number]
    return tensor.t() if name.transposed else tensor


def with_all(config: GPTConfig, fetch: Fetch, wider: GPTConfig) -> Fetch:
    """What fetches the same model as one of `wider`, which has tensors that `config` lacks.

    An absent bias is zeros, and an untied head is the embedding that it was tied to.
    """
    ours, theirs = components_by_name(config), components_by_name(wider)

    def get(name: str) -> Tensor:
        if ours[name].tied:
            return fetch("wte.weight")
        return torch.zeros(theirs[name].shape) if ours[name].absent else fetch(name)

    return get


# -- packed


def packing(stored: Stored, bits: int) -> Stored:
    """The same model with its matrices packed as they are fetched.

    ValueError where they are packed in another number of bits already.
    """
    if stored.bits == bits:
        return stored
    if stored.bits is not None:
        raise ValueError(
            f"the model is quantized already, in {stored.bits} bits: for {bits}, the one that it "
            "was made from is needed"
        )
    matrices = packed_matrices(stored.config, bits)

    # Words and scales are asked for one after the other: the last matrix is kept.
    @lru_cache(maxsize=1)
    def packed(module: str) -> tuple[Tensor, Tensor]:
        return pack(stored.fetch(f"{module}.weight"), matrices[module])

    def get(name: str) -> Tensor:
        module, _, kind = name.rpartition(".")
        return packed(module)[kind == "scales"]

    return with_packed(stored, bits, get)


def with_packed(stored: Stored, bits: int, get: Fetch) -> Stored:
    """A model whose matrices are packed, given what fetches their words and scales."""
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
    """The tensors of a packed model's folder; what is not packed is in the model's own numbers."""
    return [
        Entry(
            name,
            shape,
            stored.dtype if stored.dtype in dtypes else dtypes[0],
            partial(stored.fetch, name.removeprefix(PREFIX)),
        )
        for name, (shape, dtypes) in expected_tensors(stored.config, bits).items()
    ]


# -- in a file of any format that keeps numbers as memory does


def read_bytes(tensor: TensorInfo) -> np.ndarray:
    """A tensor's bytes in its file; DamagedError where the file has become shorter."""
    data = np.fromfile(tensor.file, np.uint8, tensor.bytes, offset=tensor.start)
    if len(data) < tensor.bytes:
        raise DamagedError(f"{tensor.file} is cut short: it became smaller while it was read")
    return data


def read_tensor(tensor: TensorInfo) -> Tensor:
    """A tensor of any shape, in one of the number formats that models are stored in."""
    data = torch.from_numpy(read_bytes(tensor))
    return data.view(torch_dtype(dtype_named(tensor.dtype))).reshape(tensor.shape)
