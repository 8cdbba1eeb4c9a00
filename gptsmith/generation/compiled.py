"""A few tokens at a time, as fast as a CPU reads the weights: step.cpp, compiled and called.

PyTorch's products of a matrix and a few rows reach half of the memory's bandwidth or less, and its
operations cost more than GPT-2's small ones take. One C++ file has the whole step instead. It is
compiled once for a machine, in seconds, and kept on the disk; it reads the model's own weights.
Knows nothing of sampling or text.

Shapes:  B batch    T new tokens    R rows, each a token    W of them wanted    C channels
         V vocabulary
"""

import ctypes
import hashlib
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.fields import SettingError
from ..machine import environment
from ..model.cache import KVCache
from ..model.gpt import GPT
from ..model.quantized import PackedLinear
from .graphs import GraphDecoder

SOURCE = Path(__file__).with_name("step.cpp")
FLAGS = "-O3 -march=native -fopenmp -ffp-contract=fast -fno-math-errno -shared -fPIC -w".split()

# More rows than these are multiplied faster by PyTorch, which has to unpack packed weights first.
MOST_ROWS, MOST_ROWS_PACKED = 64, 192


class Matrix(Structure):
    """A linear layer's weights. This and the structures after it are as in step.cpp."""

    _fields_ = (
        *((name, c_void_p) for name in ("numbers", "scales", "bias")),
        *((name, c_int64) for name in ("rows", "columns", "lanes", "bits")),
    )


class Norm(Structure):
    """A norm's weight and bias."""

    _fields_ = (("weight", c_void_p), ("bias", c_void_p))


class Layer(Structure):
    """The weights of a block."""

    _fields_ = (
        *((name, Norm) for name in ("ln_1", "ln_2")),
        *((name, Matrix) for name in ("c_attn", "c_proj", "c_fc", "mlp_c_proj")),
    )


class Model(Structure):
    """All weights, and the sizes."""

    _fields_ = (
        ("layers", POINTER(Layer)),
        ("ln_f", Norm),
        ("head", Matrix),
        *((name, c_int64) for name in ("n_layer", "n_embd", "n_head", "n_inner")),
        ("norm_eps", c_float),
        ("tanh", c_int32),
    )


class Cache(Structure):
    """Where keys and values are kept."""

    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("texts", "capacity", "bits")),
    )


class Rows(Structure):
    """The tokens of a step, as embeddings, and where what is found goes."""

    _fields_ = (
        *((name, c_int64) for name in ("count", "wanted")),
        ("text", POINTER(c_int64)),
        ("place", c_void_p),
        ("logits_of", POINTER(c_int64)),
        ("x", c_void_p),
        ("logits", c_void_p),
    )


class CompiledDecoder:
    """A model's step by a few tokens, compiled. The model's weights must stay where they are."""

    def __init__(self, model: GPT, library: ctypes.CDLL) -> None:
        self.model, self.library = model, library
        self.kept: list[Any] = []  # what the structures point to
        config = model.config
        layers = [self.layer(block) for block in model.h]
        self.described = Model(
            layers=(Layer * config.n_layer)(*layers),
            ln_f=self.norm(model.ln_f),
            head=self.matrix(model.lm_head),
            n_layer=config.n_layer,
            n_embd=config.n_embd,
            n_head=config.n_head,
            n_inner=config.mlp_size,
            norm_eps=config.norm_eps,
            tanh=config.activation == "gelu_tanh",
        )

    def layer(self, block: Any) -> Layer:
        """A block's weights."""
        return Layer(
            ln_1=self.norm(block.ln_1),
            ln_2=self.norm(block.ln_2),
            c_attn=self.matrix(block.attn.c_attn),
            c_proj=self.matrix(block.attn.c_proj),
            c_fc=self.matrix(block.mlp.c_fc),
            mlp_c_proj=self.matrix(block.mlp.c_proj),
        )

    def matrix(self, linear: Any) -> Matrix:
        """A linear layer's numbers, as they lie in memory, and its bias."""
        described = Matrix(
            bias=self.floats(linear.bias), rows=linear.out_features, columns=linear.in_features
        )
        if isinstance(linear, PackedLinear):
            described.numbers = self.address(linear.words)
            described.scales = self.address(linear.scales)
            described.lanes, described.bits = linear.scales.shape[1], linear.bits
            linear.unpack = partial(unpack, self.library, described)  # where rows are many
        else:
            described.numbers = self.address(linear.weight)
            described.bits = linear.weight.element_size() * 8
        return described

    def norm(self, norm: Any) -> Norm:
        """A norm's weight and bias."""
        return Norm(weight=self.floats(norm.weight), bias=self.floats(norm.bias))

    def floats(self, tensor: Tensor | None) -> int | None:
        """Where a small tensor's numbers lie, in float32; nowhere if there is none."""
        return None if tensor is None else self.address(tensor.detach().float())

    def address(self, tensor: Tensor) -> int:
        """Where a tensor's numbers lie, from now on."""
        self.kept.append(tensor.detach().contiguous())
        return int(self.kept[-1].data_ptr())

    def takes(self, tokens: int) -> bool:
        """Whether it reads so many tokens faster than PyTorch does."""
        packed = isinstance(self.model.lm_head, PackedLinear)
        return tokens <= (MOST_ROWS_PACKED if packed else MOST_ROWS)

    @torch.inference_mode()
    def logits(
        self,
        tokens: Sequence[int],
        texts: Sequence[int],
        places: Sequence[int],
        wanted: Sequence[int],
        cache: KVCache,
    ) -> Tensor:
        """Read R tokens, each at its place of a text of the cache: the logits after the wanted
        ones of them, in float32.  -> (W, V)

        All of a text's tokens before a place are in the cache, or among those read. How long its
        texts then are, the cache is not told.
        """
        model, held = self.model, cache.keys.shape[1]
        if max(texts) >= held:
            raise ValueError(f"{max(texts) + 1} rows do not fit a cache of {held}")
        if max(places) >= cache.capacity:
            raise ValueError(f"{max(places) + 1} tokens do not fit a cache of {cache.capacity}")
        at = torch.tensor(places)  # (R,)
        x = (model.wte(torch.tensor(tokens)) + model.wpe(at)).float().contiguous()  # (R, C)
        found = torch.empty(len(wanted), model.config.vocab_size)
        rows = Rows(
            count=len(tokens),
            wanted=len(wanted),
            text=numbers(texts),
            place=at.data_ptr(),
            logits_of=numbers(wanted),
            x=x.data_ptr(),
            logits=found.data_ptr(),
        )
        described = Cache(
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            texts=held,
            capacity=cache.capacity,
            bits=cache.keys.element_size() * 8,
        )
        pointers = (ctypes.byref(part) for part in (self.described, described, rows))
        self.library.step(*pointers, c_int(torch.get_num_threads()))
        return found


def unpack(
    library: ctypes.CDLL,
    described: Matrix,
    words: Tensor,
    scales: Tensor,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """As packed.py's, some twenty times as fast.  (M, N, W), (M, W) -> (M, C)"""
    weight = torch.empty(described.rows, described.columns, dtype=dtype)
    size, threads = c_int64(weight.element_size() * 8), c_int(torch.get_num_threads())
    library.unpack(ctypes.byref(described), c_void_p(weight.data_ptr()), size, threads)
    return weight


def numbers(values: Sequence[int]) -> ctypes.Array[c_int64]:
    """Whole numbers as step.cpp takes them."""
    return (c_int64 * len(values))(*values)


Decoder = CompiledDecoder | GraphDecoder


# -- compiling, once


def open_decoder(model: GPT, compile: str = "auto") -> Decoder | None:
    """A model's fastest step; None where `compile` is "no", or "auto" and there is none.

    On a GPU a captured one. On a CPU a compiled one: with "yes", ValueError where that cannot be
    had, for it has GPT-2's block alone and needs g++ or clang++.
    """
    if compile == "no":
        return None
    if model.device.type == "cuda":
        return GraphDecoder(model)
    try:
        check_model(model)
        return CompiledDecoder(model, open_library())
    except ValueError:
        if compile == "yes":
            raise
        return None


def check_model(model: GPT) -> None:
    """Raise ValueError for what step.cpp does not compute."""
    if model.config.modern or model.device.type != "cpu":
        raise SettingError(
            "compile", "is yes, but the compiled step is for GPT-2's block on a CPU: leave it out"
        )


def open_library() -> ctypes.CDLL:
    """step.cpp as a library for this processor, compiled if it is not on the disk yet."""
    here = repr((SOURCE.read_bytes(), FLAGS, environment.processor()))
    name = f"step-{hashlib.sha256(here.encode()).hexdigest()[:20]}.so"
    path = environment.cache_folder() / "decode" / name
    if path.is_file() and not is_whole(path):
        warnings.warn(f"{path} is damaged: compiled again", stacklevel=2)
        path.unlink()
    if not path.is_file():
        compile_library(path)
    return ctypes.CDLL(str(path))


def is_whole(path: Path) -> bool:
    """Whether a library ends with the digest of what comes before; opening half of one is fatal."""
    content = path.read_bytes()
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def compile_library(path: Path) -> None:
    """Write the library, named once it is whole; ValueError where there is no compiler for it."""
    compiler = environment.compiler()
    if compiler is None:
        raise ValueError("the step could not be compiled: there is no g++ or clang++; install one")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
            library = Path(folder) / path.name
            command = [compiler, *FLAGS, "-o", str(library), str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                reason = (done.stderr.strip() or f"exit {done.returncode}").splitlines()[0]
                raise ValueError(
                    f"{compiler} could not compile the step: {reason}; leave compile out"
                )
            with library.open("ab") as file:  # at its end, where the loader does not look
                file.write(hashlib.sha256(library.read_bytes()).digest())
            library.replace(path)
    except OSError as error:
        raise ValueError(f"the step could not be compiled: {error}; leave compile out") from error
