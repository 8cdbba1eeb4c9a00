"""GGUF, llama.cpp's format: write GPT-2's tensors and tokenizer to one file, and read it.

Knows nothing of other architectures, or of quantizations coarser than Q8_0. Statements about
llama.cpp come from its source and behaviour; the tests check them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.names import TensorInfo, weight_names
from ..checkpoint.tensors import (
    VOCABULARY,
    Entry,
    Fetch,
    Stored,
    first_tokens,
    read_bytes,
    read_tensor,
    stored_under,
    to_theirs,
)
from ..config.model import GPTConfig
from ..machine.dtypes import NUMBER_FORMATS, STORED, nearest_dtype
from ..machine.files import DamagedError, chunks
from ..machine.shell import typed
from .formats import FORMATS
from .gguf_header import MAGIC, library, read_header
from .gguf_tokenizer import check_tokenizer, read_tokenizer, shortest, write_tokenizer

ARCHITECTURE = "gpt2"
DTYPES = FORMATS["gguf"].dtypes

NAMES = weight_names(
    {  # ours: theirs
        "wte": "token_embd",
        "wpe": "position_embd",
        "h.{}.ln_1": "blk.{}.attn_norm",
        "h.{}.attn.c_attn": "blk.{}.attn_qkv",
        "h.{}.attn.c_proj": "blk.{}.attn_output",
        "h.{}.ln_2": "blk.{}.ffn_norm",
        "h.{}.mlp.c_fc": "blk.{}.ffn_up",
        "h.{}.mlp.c_proj": "blk.{}.ffn_down",
        "ln_f": "output_norm",
        "lm_head": "output",
    }
)

# llama.cpp's names of number formats, and ours.
TYPES = {NUMBER_FORMATS[dtype].header: dtype for dtype in DTYPES}
Q8_BLOCK = 32  # numbers of one row that share a scale

# Our key for the model's vocabulary if a token was added to it; llama.cpp ignores it.
OWN_VOCABULARY = "gptsmith.vocab_size"


def recognise(path: Path) -> bool:
    """Return whether a file is a GGUF, by its first four bytes."""
    try:
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def nearest(config: GPTConfig) -> GPTConfig:
    """Return the closest model that llama.cpp's GPT-2 can express.

    It has every bias and the tanh GELU; the file does not contain the dropout.
    """
    if config.modern:
        raise ValueError("llama.cpp has no model with the modern block: GGUF needs GPT-2's block")
    if config.head_size == 1 or config.context_length == 1:
        raise ValueError("llama.cpp fails with one channel per head, or a context of one token")
    return replace(
        config,
        activation="gelu_tanh",
        bias=True,
        qkv_bias=None,
        dropout=0.0,
        norm_eps=shortest(config.norm_eps),
    )


# -- writing


def write(stored: Stored, out: Path, dtype: str) -> None:
    """Write a stored model, whose configuration is `nearest`'s, with its tokenizer."""
    if dtype not in DTYPES:
        raise ValueError(f"GGUF cannot be written in {dtype!r}: one of {', '.join(DTYPES)}")
    if stored.tokenizer is None:
        raise ValueError(
            "the model has no tokenizer, and without one llama.cpp ends with a failed assertion: "
            "add its tokenizer.json to the folder first"
        )
    check_tokenizer(stored.tokenizer)
    config, fetch, gguf = stored.config, stored.fetch, library()
    writer = gguf.GGUFWriter(out, ARCHITECTURE)
    if stored.tokenizer.end_of_text is None:
        # llama.cpp's BPE always has an end of text, by default token 11. So we add a token that the
        # model does not have, and tell llama.cpp never to sample it (supported since July 2026).
        writer.add_uint32(OWN_VOCABULARY, config.vocab_size)
        writer.add_array("tokenizer.ggml.suppress_tokens", [config.vocab_size])
        config, fetch = replace(config, vocab_size=config.vocab_size + 1), with_a_row(fetch)
    add_config(writer, config, dtype)
    write_tokenizer(writer, stored.tokenizer, config.vocab_size)
    entries = to_theirs(NAMES, config, fetch, "float32")
    dtypes = [tensor_dtype(entry, dtype) for entry in entries]
    for entry, its_dtype in zip(entries, dtypes, strict=True):
        numbers = gguf.GGMLQuantizationType[NUMBER_FORMATS[its_dtype].header]
        block, size = gguf.GGML_QUANT_SIZES[numbers]
        size = prod(entry.shape) // block * size
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, numbers)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, its_dtype in zip(entries, dtypes, strict=True):
            writer.write_tensor_data(encoded(entry, its_dtype))
    finally:
        writer.close()


def add_config(writer: Any, config: GPTConfig, dtype: str) -> None:
    """Add the model's configuration; most of its weights are in `dtype`."""
    mostly = "ALL" if dtype == "float32" else "MOSTLY"
    writer.add_name("GPT-2")
    writer.add_file_type(library().LlamaFileType[f"{mostly}_{NUMBER_FORMATS[dtype].header}"])
    writer.add_quantization_version(library().GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.norm_eps)


def tensor_dtype(entry: Entry, dtype: str) -> str:
    """Return the number format of a tensor in a file of `dtype`, as in llama.cpp's own converter.

    Vectors and positions stay in float32; rows that are not whole blocks of Q8_0 become float16.
    """
    if len(entry.shape) == 1 or entry.name == "position_embd.weight":
        return "float32"
    if dtype == "q8_0" and entry.shape[-1] % Q8_BLOCK:
        return "fp16"
    return dtype


def encoded(entry: Entry, dtype: str) -> np.ndarray:
    """Return a tensor's bytes for the file."""
    if dtype in STORED:
        return np.frombuffer(entry._replace(dtype=dtype).read(), np.uint8)
    gguf = library()
    numbers = np.frombuffer(entry.read(), np.float32).reshape(entry.shape)
    return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[NUMBER_FORMATS[dtype].header])


def with_a_row(fetch: Fetch) -> Fetch:
    """Return a function that fetches the model with one more token, whose embedding is zero."""

    def get(name: str) -> Tensor:
        tensor = fetch(name)
        if name not in VOCABULARY:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(1, tensor.shape[1])])

    return get


# -- reading


def read(path: Path) -> Stored:
    """Open the GPT-2 in a GGUF file; ValueError for other models and coarser quantizations.

    A head that equals the embedding is tied: llama.cpp's converter writes it twice.
    """
    values, tensors = read_header(path)
    # First, because only the first part has the model's values; in a joined file the count is 0.
    if (parts := values.get("split.count", 1)) not in (0, 1):
        first = re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-00001\1", str(path))
        raise ValueError(
            f"{path} is one of {parts} parts: join them with llama.cpp's "
            f"`llama-gguf-split --merge {typed(first)} OUT`"
        )
    if (got := values.get("general.architecture")) != ARCHITECTURE:
        raise ValueError(f"{path} has a model of architecture {got!r}: only 'gpt2' is supported")
    config = config_of(path, values, tensors)
    stored = stored_under(
        NAMES,
        config,
        {name: tensor.shape for name, tensor in tensors.items()},
        lambda name: read_numbers(tensors[name]),
        source=path,
        says="its header",
    )
    for name, tensor in tensors.items():
        if tensor.dtype not in TYPES:
            known = ", ".join(TYPES)
            raise ValueError(f"{path}: {name} is in {tensor.dtype}: only {known} are supported")
    own = values.get(OWN_VOCABULARY, config.vocab_size)
    if not isinstance(own, int) or not 1 <= own <= config.vocab_size:
        raise ValueError(f"{path} has {OWN_VOCABULARY} {own!r}, but {config.vocab_size:,} tokens")
    largest = max(tensors.values(), key=lambda tensor: prod(tensor.shape))
    return replace(
        stored,
        dtype=nearest_dtype(largest.dtype),
        config=replace(config, vocab_size=own),
        fetch=first_tokens(own, stored.fetch),
        tokenizer=read_tokenizer(path, values, own),
    )


def config_of(
    path: Path, values: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> GPTConfig:
    """Return the configuration in a header."""

    def number(name: str, otherwise: Any = None) -> Any:
        value = values.get(f"{ARCHITECTURE}.{name}", otherwise)
        if value is None:
            raise ValueError(
                f"{path} is not a complete GPT-2: its header lacks {ARCHITECTURE}.{name}"
            )
        return value

    heads, width = number("attention.head_count"), number("embedding_length")
    if (keys := number("attention.head_count_kv", heads)) != heads:
        raise ValueError(
            f"{path} has {keys} heads of keys, but {heads} of queries: in GPT-2 they are equal"
        )
    inner, head = number("feed_forward_length"), tensors.get("output.weight")
    tokens = values.get("tokenizer.ggml.tokens")
    if tokens is not None and not isinstance(tokens, list):
        raise DamagedError(f"{path} is not an intact GGUF file: its tokens are not a list")
    epsilon = number("attention.layer_norm_epsilon")
    try:
        config = GPTConfig(
            vocab_size=number("vocab_size") if tokens is None else len(tokens),
            context_length=number("context_length"),
            n_layer=number("block_count"),
            n_head=heads,
            n_embd=width,
            n_inner=inner,
            tie_weights=head is None or same_bytes(head, tensors.get("token_embd.weight")),
            norm_eps=shortest(epsilon) if isinstance(epsilon, float) else epsilon,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return replace(config, n_inner=None) if inner == 4 * width else config


def read_numbers(tensor: TensorInfo) -> Tensor:
    """Read a tensor of any shape in the file's number format, or in float32 if it is quantized."""
    if TYPES[tensor.dtype] in STORED:
        return read_tensor(tensor)
    gguf = library()
    blocks = read_bytes(tensor).reshape(*tensor.shape[:-1], -1)
    numbers = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[tensor.dtype])
    return torch.from_numpy(numbers)


def same_bytes(one: TensorInfo, other: TensorInfo | None) -> bool:
    """Return whether two tensors are equal, comparing one chunk at a time."""
    if other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = zip(*(chunks(each.file, each.start, each.bytes) for each in (one, other)), strict=True)
    return all(left == right for left, right in pairs)
