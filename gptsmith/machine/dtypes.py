"""The number formats: what we call each, what everybody else does, and how large its numbers are.

Knows nothing of which of them a device is good at. It needs no PyTorch; `devices.py` has its types.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..config.settings import Dtype


class NumberFormat(NamedTuple):
    """A row of the table."""

    torch: str  # PyTorch's name of the elements of a tensor; transformers writes it to config.json
    header: str  # their word in the header of a safetensors file, and of a GGUF file
    bytes: int  # of an element
    bits: int  # of a number: less than 8 * bytes where an element is a word of several
    also: tuple[str, ...] = ()  # more words that people have for it

    @property
    def packed(self) -> bool:
        """Whether an element holds several numbers: `model/quantized.py`."""
        return self.bits < 8 * self.bytes


NUMBER_FORMATS = {
    # ours                   PyTorch's  in headers  bytes, bits
    "float32": NumberFormat("float32", "F32", 4, 32, ("fp32",)),
    "fp16": NumberFormat("float16", "F16", 2, 16),
    "bf16": NumberFormat("bfloat16", "BF16", 2, 16),
    # Of training: tensors in bf16, which `training/float8.py` multiplies in 8 bits in the blocks.
    "fp8": NumberFormat("bfloat16", "BF16", 2, 16),
    "int8": NumberFormat("int32", "I32", 4, 8),
    "int4": NumberFormat("int32", "I32", 4, 4),
    "q8_0": NumberFormat("float32", "Q8_0", 34, 8),  # llama.cpp's: 32 numbers and their scale
}
STORED = ("float32", "fp16", "bf16")  # what a model's own numbers may be, in any file


def bits_of(dtype: str) -> int | None:
    """The bits of packed weights (8 or 4); None for a precision in which nothing is packed."""
    row = NUMBER_FORMATS.get(dtype)  # "auto" has none
    return row.bits if row is not None and row.packed else None


def dtype_of_bits(bits: int) -> Dtype:
    """The word for packed weights of so many bits."""
    return "int4" if bits == 4 else "int8"


def number_bytes(dtype: Dtype) -> int:
    """Bytes of a number in the matrix products of this (chosen) precision."""
    return NUMBER_FORMATS[dtype].bytes


def dtype_named(word: object, known: Sequence[str] = STORED) -> str:
    """The number format, one of those `known`, that anybody's word for it means; ValueError else.

    "f32", "FP32", "float32" and `torch.float32` are all "float32".
    """
    word = str(word).lower().removeprefix("torch.")
    for dtype in known:
        row = NUMBER_FORMATS[dtype]
        if word in (dtype, row.torch, row.header.lower(), *row.also):
            return dtype
    raise ValueError(f"one of {', '.join(known)} is needed")


def nearest_dtype(word: object) -> str:
    """As `dtype_named`, but float32 for any in which no model is stored."""
    try:
        return dtype_named(word)
    except ValueError:
        return "float32"
