"""Forward passes of a few tokens on a CPU, as fast as it reads the weights: step.cpp.

With few rows, PyTorch's matrix products use half of the memory bandwidth or less, and its overhead
per operation exceeds the time of GPT-2's small ones. step.cpp computes the whole forward pass
instead, and reads the model's own weights. Knows nothing of sampling or text.

Shapes:  R rows, one token each    W rows whose logits are wanted    C channels    V vocabulary
"""

import ctypes
import warnings
from collections.abc import Sequence
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.fields import SettingError
from ..config.quantization import WORD_BITS
from ..machine.native import open_library
from ..model.cache import KVCache
from ..model.gpt import GPT
from ..model.quantized import PackedEmbedding, PackedLinear
from .crossover import remembered_rows
from .graphs import GraphDecoder

STEP = Path(__file__).with_name("step.cpp")

# PyTorch is faster for more rows than these, where nothing was measured (`crossover.py`); packed
# weights it first has to unpack.
MOST_ROWS, MOST_ROWS_PACKED = 64, 192


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Return fields of one type, as `Structure` wants them."""
    return [(name, kind) for name in names.split()]


# The fields of these structures must match those of step.cpp, which says what they are.


class Matrix(Structure):
    """A linear layer's weights."""

    _fields_ = fields(c_void_p, "numbers scales bias") + fields(c_int64, "rows columns lanes bits")


class Norm(Structure):
    """A norm's weight and bias."""

    _fields_ = fields(c_void_p, "weight bias")


class Layer(Structure):
    """The weights of a block."""

    _fields_ = fields(Norm, "ln_1 ln_2") + fields(Matrix, "c_attn c_proj c_fc mlp_c_proj")


class Model(Structure):
    """All weights, and the model's sizes."""

    _fields_ = [
        *fields(Matrix, "wte wpe"),
        ("layers", POINTER(Layer)),
        ("ln_f", Norm),
        ("head", Matrix),
        *fields(c_int64, "n_layer n_embd n_head n_inner"),
        ("norm_eps", c_float),
        ("tanh", c_int32),
    ]


class Cache(Structure):
    """The KV cache."""

    _fields_ = fields(c_void_p, "keys values") + fields(c_int64, "texts capacity bits")


class Rows(Structure):
    """The tokens of a step, and where the logits are written."""

    _fields_ = [
        *fields(c_int64, "count wanted"),
        *fields(POINTER(c_int64), "token text place logits_of"),
        ("logits", c_void_p),
    ]


class CompiledDecoder:
    """A model's compiled forward pass of a few tokens. The weights must not move in memory."""

    def __init__(self, model: GPT, library: ctypes.CDLL) -> None:
        self.model, self.library = model, library
        self.kept: list[Any] = []  # tensors that the structures point to, kept alive
        config = model.config
        layers = [self.layer(block) for block in model.h]
        self.described = Model(
            wte=self.matrix(model.wte),
            wpe=self.matrix(model.wpe),
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
        """Describe a block's weights."""
        return Layer(
            ln_1=self.norm(block.ln_1),
            ln_2=self.norm(block.ln_2),
            c_attn=self.matrix(block.attn.c_attn),
            c_proj=self.matrix(block.attn.c_proj),
            c_fc=self.matrix(block.mlp.c_fc),
            mlp_c_proj=self.matrix(block.mlp.c_proj),
        )

    def matrix(self, module: Any) -> Matrix:
        """Describe a linear layer's weights and bias, or an embedding's weights."""
        described = Matrix(bias=self.floats(getattr(module, "bias", None)))
        if isinstance(module, PackedLinear | PackedEmbedding):
            described.rows, N, lanes = module.words.shape
            described.lanes, described.bits = lanes, module.bits
            described.columns = N * lanes * WORD_BITS // module.bits
            described.numbers = self.address(module.words)
            described.scales = self.address(module.scales)
        else:
            described.rows, described.columns = module.weight.shape
            described.bits = module.weight.element_size() * 8
            described.numbers = self.address(module.weight)
        if isinstance(module, PackedLinear):
            module.unpack = partial(unpack, self.library, described)  # for many rows
        return described

    def norm(self, norm: Any) -> Norm:
        """Describe a norm's weight and bias."""
        return Norm(weight=self.floats(norm.weight), bias=self.floats(norm.bias))

    def floats(self, tensor: Tensor | None) -> int | None:
        """Return the address of a float32 copy of a small tensor; None for None."""
        return None if tensor is None else self.address(tensor.detach().float())

    def address(self, tensor: Tensor) -> int:
        """Keep a tensor alive, and return the address of its numbers."""
        self.kept.append(tensor.detach().contiguous())
        return int(self.kept[-1].data_ptr())

    def takes(self, tokens: int) -> bool:
        """Whether it reads that many tokens faster than PyTorch."""
        return tokens <= self.most_rows

    @cached_property
    def most_rows(self) -> int:
        """The most tokens that it reads faster than PyTorch, as measured on this machine, or else
        as where we measured it."""
        packed = isinstance(self.model.lm_head, PackedLinear)
        return remembered_rows(self.model) or (MOST_ROWS_PACKED if packed else MOST_ROWS)

    @torch.inference_mode()
    def logits(
        self,
        tokens: Sequence[int],
        texts: Sequence[int],
        places: Sequence[int],
        wanted: Sequence[int],
        cache: KVCache,
    ) -> Tensor:
        """Read R tokens, and return the logits after the wanted ones, in float32.  -> (W, V)

        Token i is at position `places[i]` of the text in the cache's row `texts[i]`. All earlier
        tokens of that text must be in the cache, or among those read. Writes keys and values, but
        does not change the cache's lengths.
        """
        model, held = self.model, cache.keys.shape[1]
        if max(texts) >= held:
            raise ValueError(f"{max(texts) + 1} rows do not fit a cache of {held}")
        if max(places) >= cache.capacity:
            raise ValueError(f"{max(places) + 1} tokens do not fit a cache of {cache.capacity}")
        if not 0 <= min(tokens) <= max(tokens) < model.config.vocab_size:
            raise IndexError(f"a token is outside the vocabulary of {model.config.vocab_size}")
        logits = torch.empty(len(wanted), model.config.vocab_size)
        # PyTorch's operations on a few numbers take longer than all this.
        token, text, place, logits_of = (
            (c_int64 * len(numbers))(*numbers) for numbers in (tokens, texts, places, wanted)
        )
        rows = Rows(len(tokens), len(wanted), token, text, place, logits_of, logits.data_ptr())
        described = Cache(
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            texts=held,
            capacity=cache.capacity,
            bits=cache.keys.element_size() * 8,
        )
        pointers = (ctypes.byref(structure) for structure in (self.described, described, rows))
        self.library.step(*pointers, c_int(torch.get_num_threads()))
        return logits


def unpack(
    library: ctypes.CDLL,
    described: Matrix,
    words: Tensor,
    scales: Tensor,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Unpack weights as quantized.py does, but 20 times as fast.  (M, N, W), (M, W) -> (M, C)

    The letters are those of quantized.py.
    """
    weight = torch.empty(described.rows, described.columns, dtype=dtype)
    size, threads = c_int64(weight.element_size() * 8), c_int(torch.get_num_threads())
    library.unpack(ctypes.byref(described), c_void_p(weight.data_ptr()), size, threads)
    return weight


Decoder = CompiledDecoder | GraphDecoder


def open_decoder(model: GPT, compile: str = "auto") -> Decoder | None:
    """Return a model's fast decoder: a CUDA graph on a GPU, the compiled step on a CPU.

    The compiled step supports only GPT-2's block, and needs g++ or clang++. Where it is not
    possible, `compile` "yes" raises ValueError and "auto" returns None, as does "no"; a warning
    names a compiler that is missing.
    """
    if compile == "no":
        return None
    if model.device.type == "cuda":
        return GraphDecoder(model)
    try:
        check_model(model)
        return CompiledDecoder(model, open_library(STEP))
    except (ValueError, OSError) as error:
        if compile == "yes":
            if isinstance(error, OSError | SettingError):
                raise
            problem = f"is yes, but {error}; leave it out to do without"
            raise SettingError("compile", problem) from error
        if not isinstance(error, SettingError):  # it is for other models
            what = (
                "cannot be loaded" if isinstance(error, OSError) else "is missing, which is slower"
            )
            warnings.warn(f"the compiled step {what}: {error}", stacklevel=2)
        return None


def check_model(model: GPT) -> None:
    """Raise ValueError for a model that step.cpp does not support."""
    if model.config.modern or model.device.type != "cpu":
        raise SettingError(
            "compile", "is yes, but the compiled step is for GPT-2's block on a CPU: leave it out"
        )
    if model.lora is not None:
        raise SettingError("compile", "is yes, but the compiled step knows no adapters: merge them")
