"""llm.c's model file: 256 integers, then the tensors, with all layers of each kind together.

Version 3 holds float32, version 5 bfloat16; the vocabulary is padded with zeros to a multiple of
128 rows. Knows nothing of other formats.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..checkpoint.names import OURS, TensorInfo, TensorMatch, components_by_name, per_layer
from ..checkpoint.tensors import Stored, read_tensor, to_theirs
from ..config.model import GPTConfig
from ..machine.dtypes import NUMBER_FORMATS
from ..machine.files import DamagedError

MAGIC = 20240326
HEADER = 256  # int32 numbers
VERSIONS = {3: "float32", 5: "bf16"}
PADDING = 128  # rows


def recognise(path: Path) -> bool:
    """Return whether a file begins with the magic number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC.to_bytes(4, "little")


def read(path: Path) -> Stored:
    """Open the model in a file, without a tokenizer, which llm.c keeps elsewhere."""
    numbers = np.fromfile(path, "<i4", HEADER)
    if len(numbers) < HEADER or numbers[0] != MAGIC:
        raise DamagedError(f"{path} is not an llm.c model: its first 1,024 bytes are not a header")
    version, context, vocab, layers, heads, channels, padded = map(int, numbers[1:8])
    if version not in VERSIONS:
        raise ValueError(
            f"{path} is version {version} of llm.c's models: 3 (float32) or 5 (bfloat16) is needed"
        )
    size = path.stat().st_size
    if not 0 < layers <= size or not vocab <= padded:
        raise DamagedError(f"{path}: its header is invalid: {layers} layers and {padded} rows")
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
    tensors = tensors_in(path, config, padded, VERSIONS[version])
    last = list(tensors.values())[-1]
    if size != (end := last.start + last.bytes):
        raise DamagedError(f"{path} has {size:,} bytes, but its header calls for {end:,}")
    return Stored(
        config=config,
        fetch=lambda name: read_tensor(tensors[name]),
        tokenizer=None,
        dtype=VERSIONS[version],
        tensors=TensorMatch(read={name: tensor.shape for name, tensor in tensors.items()}),
    )


def tensors_in(path: Path, config: GPTConfig, padded: int, dtype: str) -> dict[str, TensorInfo]:
    """Return our tensors, without padding, in the file's order: all layers of one kind at a time.

    That is the order of our own table. In llm.c's names: wte wpe ln1w ln1b qkvw qkvb attprojw
    attprojb ln2w ln2b fcw fcb fcprojw fcprojb lnfw lnfb.
    """
    ours, tensors, at = components_by_name(config), dict[str, TensorInfo](), HEADER * 4
    numbers = NUMBER_FORMATS[dtype]
    for name in per_layer(OURS, config):
        if not (part := ours[name.ours]).count:
            continue
        size = part.count * numbers.bytes
        tensors[part.name] = TensorInfo(path, part.shape, numbers.header, at, size)
        at += size
        if part.name == "wte.weight":
            at += (padded - config.vocab_size) * config.n_embd * numbers.bytes
    return tensors


def nearest(config: GPTConfig) -> GPTConfig:
    """Return the closest llm.c model: all biases, tanh GELU and a tied head, as in OpenAI's."""
    return replace(
        config,
        activation="gelu_tanh",
        bias=True,
        qkv_bias=None,
        tie_weights=True,
        n_inner=None,
        norm_eps=1e-5,
    )


def write(stored: Stored, out: Path, dtype: str) -> None:
    """Write a file, one tensor at a time."""
    config = stored.config
    version = {word: number for number, word in VERSIONS.items()}[dtype]
    V, padded = config.vocab_size, -(-config.vocab_size // PADDING) * PADDING
    header = np.zeros(HEADER, "<i4")
    header[:8] = (
        *(MAGIC, version, config.context_length, V, config.n_layer, config.n_head),
        *(config.n_embd, padded),
    )
    with out.open("wb") as file:
        file.write(header.tobytes())
        for entry in to_theirs(OURS, config, stored.fetch, dtype):
            file.write(entry.read())
            if entry.name == "wte.weight":
                file.write(bytes((padded - V) * config.n_embd * NUMBER_FORMATS[dtype].bytes))
