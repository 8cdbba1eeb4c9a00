"""A model's tensors, fetched one at a time: from safetensors, to safetensors, under any names.

Nothing here ever holds all of a model, so that one as large as the memory can be read, renamed and
written. Knows nothing of configurations on disk or of other formats' files.
"""

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.cost import Shape
from ..config.model import GPTConfig
from ..config.quantization import packed_matrices
from ..machine.dtypes import DTYPES, HEADER_WORDS, dtype_of
from ..machine.files import DamagedError
from ..model.quantized import pack, unpack
from ..tokenizers import Tokenizer
from .folder import tensor_shapes
from .names import PREFIX, Account, Row, account, parts, rows, their_shapes
from .packing import expected_tensors

Fetch = Callable[[str], Tensor]  # a tensor by its name, ready to be forgotten after use


VOCABULARY = ("wte.weight", "lm_head.weight")  # a row for each token


class Packed(NamedTuple):
    """The packed matrices of a model."""

    bits: int  # of the blocks'
    fetch: Callable[[str], tuple[Tensor, Tensor]]  # words and scales by the name of a module


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A model that lies in some file: what it is, and each of its tensors when asked for."""

    config: GPTConfig
    fetch: Fetch  # our name -> the tensor, our way round, in the numbers of the file
    tokenizer: Tokenizer | None
    dtype: str = "float32"  # one of DTYPES: what its embedding is stored in, or comes closest to
    account: Account = Account()
    packed: Packed | None = None  # its matrices, if they are packed; `fetch` then unpacks them

    @property
    def bits(self) -> int | None:
        """In how many bits its matrices are packed, or None."""
        return None if self.packed is None else self.packed.bits


class Entry(NamedTuple):
    """A tensor yet to be written, under somebody's name for it."""

    name: str
    shape: Shape
    dtype: torch.dtype
    fetch: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """What it takes in a file."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Any:
        """Its numbers as they lie in a file: little-endian, row by row."""
        tensor = self.fetch()
        if tuple(tensor.shape) != self.shape:
            raise ValueError(f"{self.name} is {tuple(tensor.shape)}, but should be {self.shape}")
        numbers = tensor.detach().cpu().to(self.dtype).contiguous()
        return numbers.reshape(-1).view(torch.uint8).numpy().data


# -- under other names


def from_theirs(table: Iterable[Row], config: GPTConfig, get: Fetch) -> Fetch:
    """What fetches our tensors where `get` fetches theirs."""
    by_name = {row.ours: row for row in rows(table, config)}

    def fetch(name: str) -> Tensor:
        row = by_name[name]
        tensors = [get(theirs) for theirs in row.theirs]
        if row.turned:
            tensors = [tensor.t() for tensor in tensors]
        return torch.cat(tensors) if len(tensors) > 1 else tensors[0]

    return fetch


def stored_state(
    table: Sequence[Row], config: GPTConfig, tensors: Mapping[str, Tensor], **explaining: Any
) -> Stored:
    """A state dict under their names (any shapes) as a stored model, explained by `account`."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    explained = account(table, config, shapes, **explaining)
    fetch = from_theirs(table, config, tensors.__getitem__)
    dtype = dtype_of(fetch("wte.weight"))
    return Stored(config=config, fetch=fetch, tokenizer=None, dtype=dtype, account=explained)


def first_tokens(count: int, fetch: Fetch) -> Fetch:
    """What fetches the same model without the tokens from `count` on."""

    def get(name: str) -> Tensor:
        tensor = fetch(name)
        return tensor[:count] if name in VOCABULARY else tensor

    return get


def to_theirs(
    table: Iterable[Row], config: GPTConfig, fetch: Fetch, dtype: torch.dtype
) -> list[Entry]:
    """Their tensors of a model, in the table's order; what the model does without is left out."""
    ours, entries = parts(config), []
    for row in rows(table, config):
        part = ours[row.ours]
        if part.absent or part.tied:
            continue
        for number, (name, shape) in enumerate(their_shapes(row, config, part.shape).items()):
            get = partial(_part, row, number, config, fetch)
            entries.append(Entry(name, shape, dtype, get))
    return entries


def _part(row: Row, number: int, config: GPTConfig, fetch: Fetch) -> Tensor:
    """One of their tensors, cut out of ours and turned."""
    tensor = fetch(row.ours)
    if len(row.theirs) > 1:
        tensor = tensor.split(config.attention_rows)[number]
    return tensor.t() if row.turned else tensor


def with_all(config: GPTConfig, fetch: Fetch, wider: GPTConfig) -> Fetch:
    """What fetches the same model as one of `wider`, which has tensors that `config` lacks.

    An absent bias is zeros, and an untied head is the embedding that it was tied to.
    """
    ours, theirs = parts(config), parts(wider)

    def get(name: str) -> Tensor:
        if name == "lm_head.weight" and config.tie_weights:
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
    def fetch_packed(name: str) -> tuple[Tensor, Tensor]:
        return pack(stored.fetch(f"{name}.weight"), matrices[name])

    return with_packed(stored, Packed(bits, fetch_packed))


def stored_packed(config: GPTConfig, bits: int, get: Fetch) -> Stored:
    """A packed model, given what fetches the tensors of its folder by our names."""
    packed = Packed(bits, lambda name: (get(f"{name}.words"), get(f"{name}.scales")))
    return with_packed(Stored(config=config, fetch=get, tokenizer=None), packed)


def with_packed(stored: Stored, packed: Packed) -> Stored:
    """A model whose matrices are the packed ones; its other tensors are fetched as before."""
    matrices = packed_matrices(stored.config, packed.bits)

    def fetch(name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module in matrices:
            return unpack(*packed.fetch(module), matrices[module])
        return stored.fetch(name)

    return replace(stored, fetch=fetch, packed=packed)


# Of a packed matrix: which part it is, and its numbers.
PACKED_PARTS = {"words": (0, torch.int32), "scales": (1, torch.bfloat16)}


def packed_entries(stored: Stored, packed: Packed) -> list[Entry]:
    """The tensors of a packed model's folder; what is not packed is in the model's own numbers."""
    entries = list[Entry]()
    for name, shape in expected_tensors(stored.config, packed.bits).items():
        ours = name.removeprefix(PREFIX)
        module, _, kind = ours.rpartition(".")
        get, dtype = partial(stored.fetch, ours), DTYPES[stored.dtype]
        if kind in PACKED_PARTS:
            number, dtype = PACKED_PARTS[kind]
            get = partial(_packed_part, packed, module, number)
        entries.append(Entry(name, shape, dtype, get))
    return entries


def _packed_part(packed: Packed, module: str, number: int) -> Tensor:
    return packed.fetch(module)[number]


# -- safetensors


def safetensors_reader(files: Iterable[Path]) -> tuple[dict[str, Shape], Fetch]:
    """The shapes of all tensors in some files, and what fetches each.

    A file is opened anew for each, since what has been looked at stays in memory until it closes.
    """
    shapes, place = dict[str, Shape](), dict[str, Path]()
    for path in files:
        found = tensor_shapes(path)
        shapes |= found
        place |= dict.fromkeys(found, path)

    def get(name: str) -> Tensor:
        try:
            with safe_open(place[name], framework="pt") as file:
                return file.get_tensor(name)
        except SafetensorError as error:
            raise DamagedError(f"{place[name]} is not a whole safetensors file: {error}") from error

    return shapes, get


def write_safetensors(path: Path, entries: Sequence[Entry]) -> None:
    """Write tensors to a file, one at a time; `safetensors` itself wants all of them at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.bytes
        words = {"dtype": HEADER_WORDS[entry.dtype], "shape": entry.shape}
        header[entry.name] = {**words, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            file.write(entry.read())
