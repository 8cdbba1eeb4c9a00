"""The compiled step on processors that this machine is not, emulated by QEMU, at toy size.

`make other-processors` runs it; it needs Debian's qemu-user-static and g++-aarch64-linux-gnu.
"""

import ctypes
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith.generation.compiled import STEP, CompiledDecoder, Matrix, Norm
from gptsmith.machine import native
from tests.generation.test_compiled import exactly, opened, read, some_text

SOURCE = Path(__file__).with_name("run_step.cpp")
FLAGS = [f for f in native.FLAGS if f not in ("-march=native", "-shared", "-fPIC")]
TARGETS = {
    "SSE": ("g++ -march=x86-64-v2", "qemu-x86_64-static -cpu Nehalem"),
    "AVX2": ("g++ -march=haswell", "qemu-x86_64-static -cpu Haswell"),
    "ARM": ("aarch64-linux-gnu-g++ -march=armv8-a", "qemu-aarch64-static -cpu cortex-a72"),
}
PRECISIONS: dict[str, tuple[str, torch.dtype, int | None, float]] = {
    "float32": ("wide", torch.float32, None, 1e-5),
    "float32-odd": ("odd", torch.float32, None, 1e-5),
    "bf16": ("wide", torch.bfloat16, None, 0.05),
    "int8": ("wide", torch.float32, 8, 5e-4),
    "int4": ("wide", torch.float32, 4, 5e-4),
    "int8-short": ("gpt2", torch.float32, 8, 5e-4),
}


class Emulated:
    """The compiled step's library, whose `step` runs a program for another processor."""

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def step(self, *pointers: Any) -> None:
        """Write to `rows.logits` what the program computes from the same numbers."""
        model, cache, rows = (pointer._obj for pointer in pointers[:3])
        R, W, C = rows.count, rows.wanted, model.n_embd
        given = struct.pack(
            "5qf", model.n_layer, C, model.n_head, model.n_inner, model.tanh, model.norm_eps
        )
        given += matrix(model.wte) + matrix(model.wpe)
        for layer in model.layers[: model.n_layer]:
            given += norm(layer.ln_1, C) + norm(layer.ln_2, C)
            for each in (layer.c_attn, layer.c_proj, layer.c_fc, layer.mlp_c_proj):
                given += matrix(each)
        given += norm(model.ln_f, C) + matrix(model.head)
        given += struct.pack("5q", cache.texts, cache.capacity, cache.bits, R, W)
        for numbers, count in (
            (rows.token, R),
            (rows.text, R),
            (rows.place, R),
            (rows.logits_of, W),
        ):
            given += struct.pack(f"{count}q", *numbers[:count])
        done = subprocess.run(self.command, input=given, capture_output=True, check=True)
        assert len(done.stdout) == 4 * W * model.head.rows
        ctypes.memmove(rows.logits, done.stdout, len(done.stdout))


def array(address: int | None, size: int) -> bytes:
    return (
        struct.pack("q", 0)
        if not address
        else struct.pack("q", size) + ctypes.string_at(address, size)
    )


def norm(described: Norm, size: int) -> bytes:
    return array(described.weight, 4 * size) + array(described.bias, 4 * size)


def matrix(described: Matrix) -> bytes:
    M, K, lanes, bits = described.rows, described.columns, described.lanes, described.bits
    given = struct.pack("4q", M, K, lanes, bits) + array(described.numbers, M * K * bits // 8)
    return given + array(described.scales, 2 * M * lanes) + array(described.bias, 4 * M)


@pytest.fixture(scope="module", params=TARGETS)
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    """The step, compiled for another processor and emulated."""
    compiler, emulator = (words.split() for words in TARGETS[request.param])
    program = tmp_path_factory.mktemp("program") / "run_step"
    command = [*compiler, *FLAGS, "-static", f"-I{STEP.parent}", str(SOURCE), "-o", str(program)]
    subprocess.run(command, check=True)
    return Emulated([*emulator, str(program)])


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_step_is_the_models_in_float64(emulated: Any, precision: str) -> None:
    """And a row's logits do not depend, to the bit, on the other rows."""
    form, dtype, bits, most = PRECISIONS[precision]
    model, _ = opened(form, dtype, bits)
    decoder = CompiledDecoder(model, emulated)
    text = some_text(3, 11)
    with torch.inference_mode():
        expected = exactly(model).double()(text).logits
    found: Tensor = read(decoder, text, [11])
    assert (found - expected).abs().max() < most * expected.std()
    assert torch.equal(read(decoder, text[:1, :5], [5]), found[:1, :5])
    assert torch.equal(read(decoder, text[:1, :1], [1]), found[:1, :1])
