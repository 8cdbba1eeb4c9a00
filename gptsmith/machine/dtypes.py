"""The number formats: our names, the names in other systems and files, and their sizes.

Knows nothing of which formats a device supports well. Needs no PyTorch; `devices.py` has its types.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ..config.settings import Dtype


class NumberFormat(NamedTuple):
    """A row of the table."""

    torch: str  # PyTorch's name for the elements, which transformers also writes to config.json
    header: str  # the name in the headers of safetensors and GGUF files
    bytes: int  # of an element
    bits: int  # of a number: less than 8 * bytes if an element packs several numbers
    also: tuple[str, ...] = ()  # other common names


NUMBER_FORMATS = {
    # ours                   PyTorch's  in headers  bytes, bits
    "float32": NumberFormat("float32", "F32", 4, 32, ("fp32",)),
    "fp16": NumberFormat("float16", "F16", 2, 16),
    "bf16": NumberFormat("bfloat16", "BF16", 2, 16),
    # For training only: tensors are bf16, and `training/trainer.py` multiplies them in 8 bits.
    "fp8": NumberFormat("bfloat16", "BF16", 2, 16),
    "int8": NumberFormat("int32", "I32", 4, 8),
    "int4": NumberFormat("int32", "I32", 4, 4),
    "q8_0": NumberFormat("float32", "Q8_0", 34, 8),  # llama.cpp's: 32 numbers and their scale
}
STORED = ("float32", "fp16", "bf16")  # the number formats of unpacked weights in files


def bits_of(dtype: str) -> int | None:
    """Return the bits of packed weights (8 or 4); None for a precision without packing."""
    row = NUMBER_FORMATS.get(dtype)  # "auto" has none
    if row is None or row.bits == 8 * row.bytes:  # an element is one number
        return None
    return row.bits


def dtype_of_bits(bits: int) -> Dtype:
    """Return the name of the precision with packed weights of so many bits."""
    return "int4" if bits == 4 else "int8"


def number_bytes(dtype: Dtype) -> int:
    """Return the bytes of a number in matrix products of this precision, which is not "auto"."""
    return NUMBER_FORMATS[dtype].bytes


def dtype_named(word: object, known: Sequence[str] = STORED) -> str:
    """Return our name of a number format, given any common name; ValueError if not in `known`.

    "f32", "FP32", "float32" and `torch.float32` are all "float32".
    """
    word = str(word).lower().removeprefix("torch.")
    for dtype in known:
        row = NUMBER_FORMATS[dtype]
        if word in (dtype, row.torch, row.header.lower(), *row.also):
            return dtype
    raise ValueError(f"one of {', '.join(known)} is needed")


def nearest_dtype(word: object) -> str:
    """As `dtype_named`, but return float32 for formats that are not in STORED."""
    try:
        return dtype_named(word)
    except ValueError:
        return "float32"
