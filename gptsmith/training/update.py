"""The end of a training step on a CPU, in C++: update.cpp clips the gradients and updates weights.

For small models, PyTorch spends this time on the overhead of many calls. The state is that of the
plain optimizers, so that a run may change between both. Knows nothing of schedules.
"""

from collections.abc import Iterable, Sequence
from ctypes import POINTER, Structure, c_double, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..machine.native import open_library

SOURCE = Path(__file__).with_name("update.cpp")

# The fields of these structures must match those of update.cpp, which says what they are.


class Gradient(Structure):
    """A gradient to clip."""

    _fields_ = [("numbers", c_void_p), ("count", c_int64)]


class Learned(Structure):
    """A parameter of AdamW."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "gradient", "mean", "mean_square", "step")),
        ("count", c_int64),
    ]


class Matrix(Structure):
    """A matrix of Muon."""

    _fields_ = [
        *((name, c_void_p) for name in ("weight", "gradient", "momentum")),
        *((name, c_int64) for name in ("rows", "columns")),
    ]


class Choices(Structure):
    """Muon's settings."""

    _fields_ = [
        *((name, c_float) for name in ("rate", "momentum", "decay")),
        ("quintic", c_float * 3),
        ("iterations", c_int64),
    ]


class CompiledUpdate:
    """The functions of update.cpp, for float32 tensors of any shape on the CPU.

    `bf16` allows Muon's products in bfloat16. ValueError or OSError where there is no compiler.
    """

    def __init__(self, *, bf16: bool = False) -> None:
        self.bf16, self.library = bf16, open_library(SOURCE)
        self.library.clip.restype = c_float
        self.library.clip.argtypes = [POINTER(Gradient), c_int64, c_float, c_int64]
        self.library.adamw.restype = None
        self.library.adamw.argtypes = [POINTER(Learned), c_int64, *[c_double] * 5, c_int64]
        self.library.muon.restype = None
        self.library.muon.argtypes = [
            POINTER(Matrix),
            c_int64,
            POINTER(Choices),
            c_int32,
            c_int64,
        ]

    def clip(self, parameters: Iterable[Tensor], most: float) -> Tensor:
        """Clip gradients as torch.nn.utils.clip_grad_norm_ does.  -> (), their norm before"""
        gradients = [p.grad for p in parameters if p.grad is not None]
        described = array(Gradient, [(address(g), g.numel()) for g in gradients])
        return torch.tensor(self.library.clip(described, len(gradients), most, threads()))

    def adamw(
        self,
        parameters: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        """Update parameters by AdamW."""
        described = array(
            Learned,
            [
                (
                    address(p),
                    address(p.grad),
                    address(state["exp_avg"]),
                    address(state["exp_avg_sq"]),
                    address(state["step"]),
                    p.numel(),
                )
                for p, state in zip(parameters, states, strict=True)
            ],
        )
        self.library.adamw(described, len(described), lr, *betas, eps, weight_decay, threads())

    def muon(
        self,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        shape: tuple[int, int],
        choices: Choices,
    ) -> None:
        """Update parameters whose matrices have one shape (R, C) by Muon."""
        R, C = shape
        stacks = [
            (address(p), address(p.grad), address(buffer), p.numel() // (R * C))
            for p, buffer in zip(parameters, buffers, strict=True)
        ]
        matrices = [
            (*(start + 4 * R * C * number for start in starts), R, C)
            for *starts, count in stacks
            for number in range(count)
        ]
        self.library.muon(array(Matrix, matrices), len(matrices), choices, self.bf16, threads())


def array(kind: type[Structure], items: Sequence[tuple[int, ...]]) -> Any:
    """Return an array of structures from the values of their fields."""
    return (kind * len(items))(*items)  # type: ignore[misc]


def address(tensor: Tensor | None) -> int:
    """Return the address of a tensor's numbers, of any shape."""
    assert tensor is not None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def threads() -> int:
    """Return the number of threads to use: PyTorch's."""
    return torch.get_num_threads()
