"""llm.c's model file: 256 integers, then every tensor, the layers of each kind together.

Version 3 holds float32, version 5 bfloat16; the vocabulary is padded with zeros to a multiple of
128 rows. Knows nothing of other formats.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.names import Account, parts
from ..checkpoint.tensors import Entry, Stored
from ..config.cost import Shape
from ..config.model import GPTConfig
from ..machine.dtypes import DTYPES
from ..machine.files import DamagedError
from .limits import only_gpt2_block, only_usual_mlp

MAGIC = 20240326
HEADER = 256  # int32 numbers
VERSIONS = {3: "float32", 5: "bf16"}
PADDING = 128  # rows

# Their order, ours in brackets: wte, wpe, then each of these for all layers, then the final norm.
LAYERED = [
    "ln_1.weight",  # ln1w
    "ln_1.bias",  # ln1b
    "attn.c_attn.weight",  # qkvw
    "attn.c_attn.bias",  # qkvb
    "attn.c_proj.weight",  # attprojw
    "attn.c_proj.bias",  # attprojb
    "ln_2.weight",  # ln2w
    "ln_2.bias",  # ln2b
    "mlp.c_fc.weight",  # fcw
    "mlp.c_fc.bias",  # fcb
    "mlp.c_proj.weight",  # fcprojw
    "mlp.c_proj.bias",  # fcprojb
]


def order(config: GPTConfig) -> Iterator[str]:
    """Our names of all tensors, as they follow one another in the file."""
    yield from ("wte.weight", "wpe.weight")
    for part in LAYERED:
        yield from (f"h.{layer}.{part}" for layer in range(config.n_layer))
    yield from ("ln_f.weight", "ln_f.bias")


def recognise(path: Path) -> bool:
    """Whether a file begins with the magic number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read(path: Path) -> Stored:
    """The model in a file; without a tokenizer, which llm.c keeps elsewhere."""
    numbers = np.fromfile(path, "<i4", HEADER)
    if len(numbers) < HEADER or numbers[0] != MAGIC:
        raise DamagedError(f"{path} is no llm.c model: its first 1,024 bytes are not a header")
    version, context, vocab, layers, heads, channels, padded = map(int, numbers[1:8])
    if version not in VERSIONS:
        raise ValueError(
            f"{path} is version {version} of llm.c's models: 3 (float32) or 5 (bfloat16) is needed"
        )
    size = path.stat().st_size
    if not 0 < layers <= size or not vocab <= padded:
        raise DamagedError(f"{path}: a header with {layers} layers and {padded} rows is no model's")
    try:
        config = GPTConfig(
            vocab_size=vocab,
            context_length=context,
            n_layer=layers,
            n_head=heads,
            n_embd=channels,
        )
    except ValueError as error:
        raise DamagedError(f"{path}: {error}") from error
    dtype = DTYPES[VERSIONS[version]]
    places, end = offsets(config, padded, dtype)
    if size != end:
        raise DamagedError(f"{path} has {size:,} bytes, but its header calls for {end:,}")

    def fetch(name: str) -> Tensor:
        offset, shape = places[name]
        raw = np.fromfile(path, np.uint8, prod(shape) * dtype.itemsize, offset=offset)
        return torch.from_numpy(raw).view(dtype).view(shape)

    return Stored(
        config=config,
        fetch=fetch,
        tokenizer=None,
        dtype=VERSIONS[version],
        account=Account(read={name: shape for name, (_, shape) in places.items()}),
    )


def offsets(
    config: GPTConfig, padded: int, dtype: torch.dtype
) -> tuple[dict[str, tuple[int, Shape]], int]:
    """Where each tensor begins and its shape without padding, and where the file ends."""
    ours, places, at = parts(config), dict[str, tuple[int, Shape]](), HEADER * 4
    for name in order(config):
        shape = ours[name].shape
        places[name] = at, shape
        rows = padded if name == "wte.weight" else shape[0]
        at += prod((rows, *shape[1:])) * dtype.itemsize
    return places, at


def nearest(config: GPTConfig) -> GPTConfig:
    """The closest model of llm.c's: OpenAI's GPT-2, with all biases, tanh GELU and a tied head."""
    only_gpt2_block(config, "llm.c")
    only_usual_mlp(config, "llm.c")
    return replace(
        config, activation="gelu_tanh", bias=True, qkv_bias=None, tie_weights=True, norm_eps=1e-5
    )


def write(stored: Stored, out: Path, dtype: str) -> None:
    """Write a file, one tensor at a time."""
    config, ours = stored.config, parts(stored.config)
    version = {word: number for number, word in VERSIONS.items()}[dtype]
    V, padded = config.vocab_size, -(-config.vocab_size // PADDING) * PADDING
    header = np.zeros(HEADER, "<i4")
    header[:8] = (
        *(MAGIC, version, config.context_length, V, config.n_layer, config.n_head),
        *(config.n_embd, padded),
    )
    with out.open("wb") as file:
        file.write(header.tobytes())
        for name in order(config):
            get = partial(stored.fetch, name)
            file.write(Entry(name, ours[name].shape, DTYPES[dtype], get).read())
            if name == "wte.weight":
                file.write(bytes((padded - V) * config.n_embd * DTYPES[dtype].itemsize))
