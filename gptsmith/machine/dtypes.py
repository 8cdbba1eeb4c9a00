"""What PyTorch, safetensors and transformers call the number formats that settings name.

Knows nothing of which of them a device is good at.
"""

import torch
from torch import Tensor

from ..config.settings import Dtype

# Of stored numbers: our word and PyTorch's, PyTorch's and the one in a safetensors header, and
# our word and the one that transformers writes to config.json.
DTYPES = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HEADER_WORDS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",  # words of packed numbers
}
DTYPE_WORDS = {"float32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# Of matrix products; with fp8, of all but those that `training/float8.py` replaces.
COMPUTE_DTYPES = DTYPES | {"fp8": torch.bfloat16}
BITS = {"int8": 8, "int4": 4}  # of packed weights


def dtype_of(tensor: Tensor) -> str:
    """Our word for a tensor's numbers, of any shape; "float32" for any that we do not write."""
    return next((word for word, dtype in DTYPES.items() if dtype == tensor.dtype), "float32")


def dtype_of_bits(bits: int) -> Dtype:
    """The word for packed weights of so many bits."""
    return "int4" if bits == 4 else "int8"


def number_bytes(dtype: Dtype) -> int:
    """Bytes of a number in the matrix products of this (chosen) precision."""
    return COMPUTE_DTYPES[dtype].itemsize
