"""A training step's C++ on processors that this machine is not, emulated by QEMU, at toy size.

Each function runs in a program of its own, which gets its arguments and returns its arrays. The
tests are those of the pieces on this machine.
"""

import ctypes
import struct
import subprocess
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from gptsmith.model import dropout, fused
from gptsmith.training import update
from tests.model import test_dropout, test_fused
from tests.processors.test_other_processors import FLAGS, TARGETS
from tests.training import test_update

RUN = Path(__file__).with_name("run_function.cpp")
FUNCTIONS = {
    fused.SOURCE: "add_and_norm norm_backward branch_gradient gelu gelu_backward attention "
    "attention_backward cross_entropy",
    dropout.SOURCE: "drop_numbers",
    update.SOURCE: "clip adamw muon",
}
RESULTS = {"clip": "float"}  # void for the others


class Array(NamedTuple):
    """Numbers in memory, which a function reads and may change."""

    address: int
    bytes: int


class Structures(NamedTuple):
    """An array of structures, whose fields have 8 bytes each: integers and addresses of arrays."""

    words: list[int | Array]


Argument = int | float | Array | Structures | None


class Emulated:
    """The functions of a C++ file, compiled for another processor and emulated."""

    def __init__(self, command: list[str]) -> None:
        self.command = command

    def call(self, name: str, *arguments: Argument, result: str = "") -> Any:
        """Call a function; `result` is the format of what it returns, if it returns something."""
        given = struct.pack("q", len(name)) + name.encode() + b"".join(map(written, arguments))
        done = subprocess.run(self.command, input=given, capture_output=True, check=True)
        start = struct.calcsize(result)
        for array in arrays_in(arguments):
            assert len(done.stdout) >= start + array.bytes
            ctypes.memmove(array.address, done.stdout[start:][: array.bytes], array.bytes)
            start += array.bytes
        assert len(done.stdout) == start
        return struct.unpack(result, done.stdout[: struct.calcsize(result)])


def written(argument: Argument) -> bytes:
    if argument is None:
        return struct.pack("q", -1)
    if isinstance(argument, Array):
        return struct.pack("q", argument.bytes) + ctypes.string_at(*argument)
    if isinstance(argument, Structures):
        words = (struct.pack("q", isinstance(w, Array)) + written(w) for w in argument.words)
        return struct.pack("qq", -2, len(argument.words)) + b"".join(words)
    return struct.pack("d" if isinstance(argument, float) else "q", argument)


def arrays_in(arguments: Sequence[Argument]) -> list[Array]:
    found = []
    for argument in arguments:
        inside = argument.words if isinstance(argument, Structures) else [argument]
        found += [each for each in inside if isinstance(each, Array)]
    return found


# -- the three libraries, as the modules that call them know them


class EmulatedPieces(fused.Pieces):
    """The functions of fused.cpp."""

    def call(self, name: str, *arguments: Tensor | float | None) -> None:
        given = [Array(a.data_ptr(), a.nbytes) if isinstance(a, Tensor) else a for a in arguments]
        self.library.call(name, *given, torch.get_num_threads())


class EmulatedDropout:
    """The function of dropout.cpp."""

    def __init__(self, emulated: Emulated) -> None:
        self.emulated = emulated

    def drop_numbers(self, *arguments: Any) -> None:
        size, x, y, seeds, rows, H, T, S, start, R, E, *rest = (a.value for a in arguments)
        numbers = rows * H * R * E * size
        arrays = Array(x, numbers), Array(y, numbers), Array(seeds, 4 * rows)
        self.emulated.call("drop_numbers", size, *arrays, rows, H, T, S, start, R, E, *rest)


class EmulatedUpdate:
    """The functions of update.cpp."""

    def __init__(self, emulated: Emulated) -> None:
        # As functions whose `restype` and `argtypes` can be set.
        self.clip = partial(self._clip, emulated)
        self.adamw = partial(self._adamw, emulated)
        self.muon = partial(self._muon, emulated)

    def _clip(self, emulated: Emulated, gradients: Any, count: int, most: float, n: int) -> float:
        (norm,) = emulated.call("clip", structures(gradients), count, most, n, result="f")
        return float(norm)

    def _adamw(self, emulated: Emulated, learned: Any, count: int, *rest: float) -> None:
        *choices, threads = rest
        emulated.call("adamw", structures(learned), count, *map(float, choices), threads)

    def _muon(
        self, emulated: Emulated, matrices: Any, count: int, choices: Any, *rest: int
    ) -> None:
        settings = Array(ctypes.addressof(choices), ctypes.sizeof(choices))
        emulated.call("muon", structures(matrices), count, settings, *rest)


def structures(described: Any) -> Structures:
    """Structures of update.py, whose addresses are of as many floats as they say."""
    words: list[int | Array] = []
    for each in described:
        matrix = isinstance(each, update.Matrix)
        count = each.rows * each.columns if matrix else each.count
        for name, kind in each._fields_:
            value = getattr(each, name)
            floats = 1 if name == "step" else count
            words.append(Array(value or 0, 4 * floats) if kind is ctypes.c_void_p else value)
    return Structures(words)


# -- the tests


class Processor:
    """Compiles C++ files of the package for another processor."""

    def __init__(self, target: str, folder: Path) -> None:
        (self.compiler, self.emulator), self.folder = TARGETS[target], folder

    @cache  # noqa: B019 (there is one for each target)
    def emulated(self, source: Path) -> Emulated:
        """Return the functions of a file, which is compiled at the first call."""
        program = str(self.folder / source.stem)
        names = FUNCTIONS[source].split()
        calls = " ".join(f"CALL({RESULTS.get(name, 'void')}, {name})" for name in names)
        files = ["-include", str(source), str(RUN), "-o", program]
        command = [*self.compiler.split(), *FLAGS, "-static", f"-DFUNCTIONS={calls}", *files]
        subprocess.run(command, check=True)
        return Emulated([*self.emulator.split(), program])


@pytest.fixture(scope="module", params=TARGETS)
def processor(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Processor:
    """Another processor."""
    return Processor(request.param, tmp_path_factory.mktemp("programs"))


@pytest.fixture
def pieces(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """fused.cpp, to be given where its library is."""
    for module in (fused, test_fused):
        monkeypatch.setattr(module, "Pieces", EmulatedPieces)
    return processor.emulated(fused.SOURCE)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize(
    ("size", "form"), [("odd", "gpt2"), ("whole", "nanogpt"), ("long", "book"), ("wide", "gpt2")]
)
def test_gradients_are_those_of_float64(size: str, form: str, dropout: float, pieces: Any) -> None:
    test_fused.test_gradients_are_those_of_float64(size, form, dropout, pieces)


def test_every_gradient_is_small_in_error(pieces: Any) -> None:
    test_fused.test_every_gradient_is_small_in_error(pieces)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_bits_for_any_number_of_threads(bf16: bool, pieces: Any) -> None:
    test_fused.test_the_same_bits_for_any_number_of_threads(bf16, pieces)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 12), (2, 3, 7, 7), (4, 130, 33)])
def test_dropout_gives_the_bits_of_its_definition(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    processor: Processor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    library = EmulatedDropout(processor.emulated(dropout.SOURCE))
    monkeypatch.setattr(dropout, "library", lambda: library)
    test_dropout.test_cpp_gives_the_same_bits(shape, dtype, monkeypatch)


@pytest.fixture
def compiled(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> update.CompiledUpdate:
    """update.cpp, wherever it is opened."""
    emulated = processor.emulated(update.SOURCE)
    monkeypatch.setattr(update, "open_library", lambda source: EmulatedUpdate(emulated))
    return update.CompiledUpdate()


@pytest.mark.parametrize("most", [0.5, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(
    most: float, compiled: update.CompiledUpdate
) -> None:
    test_update.test_gradients_are_clipped_as_torch_clips_them(compiled, most)


def test_adamw_is_the_adamw_of_torch_in_float64(compiled: update.CompiledUpdate) -> None:
    test_update.test_adamw_is_the_adamw_of_torch_in_float64(compiled)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (33, 31), (40, 170), (170, 40)])
def test_muon_is_exact_in_float32_and_near_in_bfloat16(shape: tuple[int, int]) -> None:
    test_update.test_muon_is_exact_in_float32_and_near_in_bfloat16(shape)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bf16", [False, True])
def test_the_number_of_threads_does_not_change_a_bit(bf16: bool) -> None:
    test_update.test_the_number_of_threads_does_not_change_a_bit(bf16)
