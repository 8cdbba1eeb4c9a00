"""One token for one row, as fast as a CPU reads the weights: a block compiled ahead of time.

PyTorch's products of a matrix and a single row reach about half of the memory's bandwidth. Written
as a multiplication and a sum, and compiled with what surrounds them, they reach nearly all of it.
One block is compiled, with its weights as inputs, and called for every layer; the result is kept
on the disk and loads in milliseconds, without the compiler. Knows nothing of sampling or text.

Shapes:  C channels    H heads    D channels per head    M channels inside the MLP
         S tokens so far, this one included    V vocabulary
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import runtime
from .cache import KVCache
from .config import GPTConfig
from .model import GPT

# A product and the sum that it goes into are one instruction; rounding differs in the last bit.
OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}

# What of a configuration each part is compiled for; the number of layers is not among it.
DEPENDS = {
    "block": ("n_embd", "n_head", "n_inner", "activation", "norm_eps", "names", "context_length"),
    "head": ("n_embd", "vocab_size", "bias", "norm_eps"),
}


class OneRow(nn.Module):
    """A block for a single token.  (C,), (S, H, D), (S, H, D), weights -> (C,)

    The last of the S keys and values are this token's own, and are written here.
    """

    def __init__(self, config: GPTConfig, names: Sequence[str]) -> None:
        super().__init__()
        self.config, self.names = config, names

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, *weights: Tensor) -> Tensor:
        config, w = self.config, dict(zip(self.names, weights, strict=True))
        row = linear(norm(x, w, "ln_1", config), w, "attn.c_attn")
        q, k, v = row.view(3, config.n_head, config.head_size)  # (H, D) each
        keys[-1], values[-1] = k.to(keys.dtype), v.to(values.dtype)
        scores = (keys.float() * q).sum(-1) / math.sqrt(config.head_size)  # (S, H)
        p = scores.softmax(0).unsqueeze(-1)  # (S, H, 1)
        y = (p * values.float()).sum(0).reshape(-1)  # (C,)
        x = x + linear(y, w, "attn.c_proj")
        approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        hidden = F.gelu(linear(norm(x, w, "ln_2", config), w, "mlp.c_fc"), approximate=approximate)
        return x + linear(hidden, w, "mlp.c_proj")


class Head(nn.Module):
    """The last norm and the output head.  (C,), (V, C), norm's weights -> (V,)"""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, head: Tensor, *weights: Tensor) -> Tensor:
        w = dict(zip(("ln_f.weight", "ln_f.bias"), weights, strict=False))
        return (head.float() * norm(x, w, "ln_f", self.config)).sum(-1)


def linear(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """A matrix and a row as a multiplication and a sum, in float32.  (C,) -> (M,)"""
    y = (w[f"{name}.weight"].float() * x).sum(-1)
    return y + w[f"{name}.bias"].float() if f"{name}.bias" in w else y


def norm(x: Tensor, w: dict[str, Tensor], name: str, config: GPTConfig) -> Tensor:
    """LayerNorm of a row.  (C,) -> (C,)"""
    bias = w[f"{name}.bias"].float() if f"{name}.bias" in w else None
    return F.layer_norm(x, x.shape, w[f"{name}.weight"].float(), bias, config.norm_eps)


def names_in(module: nn.Module) -> list[str]:
    """The weights and biases that a part of a model has, in the order in which it takes them."""
    return [name for name, _ in module.named_parameters()]


def weights_of(module: nn.Module) -> list[Tensor]:
    """Those weights, (M, C) or (M,) each."""
    return [parameter.detach() for parameter in module.parameters()]


class Decoder:
    """A model's step by one token for one row, compiled."""

    def __init__(self, model: GPT, block: Path, head: Path) -> None:
        # What torch._inductor loads such files with, without the second that importing it takes.
        from torch._C._aoti import AOTIModelPackageLoader

        self.model = model
        self.block, self.head = (
            AOTIModelPackageLoader(str(path), "model", False, 1, -1) for path in (block, head)
        )
        self.layers = [weights_of(layer) for layer in model.h]
        self.last = [*weights_of(model.lm_head), *weights_of(model.ln_f)]

    def takes(self, tokens: Tensor, cache: KVCache) -> bool:
        """Whether this step is the next one: a row on its own, all but its last token read.

        At least one has been: attention over a single position is compiled away.  (B, T)
        """
        return len(tokens) == 1 and 1 <= cache.length == tokens.shape[1] - 1

    @torch.inference_mode()
    def next_logits(self, token: Tensor, cache: KVCache) -> Tensor:
        """The logits after one token, which the cache takes in.  (1,) -> (1, V)"""
        place = cache.length
        x = (self.model.wte.weight[token[0]] + self.model.wpe.weight[place]).float()
        for layer, weights in enumerate(self.layers):
            keys, values = cache.up_to(layer, place + 1)
            (x,) = self.block.boxed_run([x, keys[0], values[0], *weights])
        cache.advance(1)
        (logits,) = self.head.boxed_run([x, *self.last])
        return logits.unsqueeze(0)


# -- compiling, once


def open_decoder(model: GPT, *, compile: bool) -> Decoder | None:
    """The compiled step of a model; None where it is not on the disk and not to be compiled.

    ValueError where it cannot be: it is for GPT-2's block, on a CPU, with a C++ compiler.
    """
    device, plain = model.device.type, isinstance(model.lm_head, nn.Linear)
    if model.config.modern or device != "cpu" or not plain or model.config.context_length < 3:
        if compile:
            raise ValueError(
                "compile is yes, but the compiled step is for GPT-2's block on a CPU: leave it out"
            )
        return None
    folder = runtime.cache_folder() / "decode"
    block, head = (folder / f"{part}-{key(model, part)}.pt2" for part in DEPENDS)
    if block.is_file() and head.is_file():
        try:
            return Decoder(model, block, head)
        except RuntimeError as error:  # what PyTorch raises for a damaged file
            reason = str(error).partition("\n")[0]
            warnings.warn(f"{folder} holds a damaged file ({reason}): removed", stacklevel=2)
            block.unlink()
            head.unlink()
    if not compile:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    if not block.is_file():
        compile_block(model, block)
    if not head.is_file():
        compile_head(model, head)
    return Decoder(model, block, head)


def key(model: GPT, part: str) -> str:
    """What a compiled part depends on, in hexadecimal: sizes, numbers, PyTorch, processor, this."""
    config = asdict(model.config) | {
        "n_inner": model.config.mlp_size,
        "names": names_in(model.h[0]),
    }
    sizes = [config[name] for name in DEPENDS[part]]
    here = (torch.__version__, torch.get_num_threads(), runtime.processor())
    depends = (sizes, model.dtype, *here, Path(__file__).read_bytes())
    return hashlib.sha256(repr(depends).encode()).hexdigest()[:20]


def compile_block(model: GPT, path: Path) -> None:
    """Write a compiled block; any number of tokens so far, from 2 to the context limit."""
    config, dtype = model.config, model.dtype
    cache = KVCache(config, 1, capacity=3, dtype=dtype)
    keys, values = (part[0] for part in cache.up_to(0, cache.capacity))
    tokens = torch.export.Dim("tokens", min=2, max=config.context_length)
    weights = weights_of(model.h[0])
    inputs = (torch.zeros(config.n_embd), keys, values, *weights)
    dynamic = (None, {0: tokens}, {0: tokens}, (None,) * len(weights))
    compile_ahead(OneRow(config, names_in(model.h[0])), inputs, dynamic, path)


def compile_head(model: GPT, path: Path) -> None:
    """Write a compiled output head."""
    last = (*weights_of(model.lm_head), *weights_of(model.ln_f))
    inputs = (torch.zeros(model.config.n_embd), *last)
    compile_ahead(Head(model.config), inputs, None, path)


def compile_ahead(module: nn.Module, inputs: tuple[Tensor, ...], dynamic: Any, path: Path) -> None:
    """Compile a module for such inputs, a row (C,) first, into a file; named once it is whole."""
    import torch._inductor

    temporary = path.with_name(f".{path.stem}.pt2")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of PyTorch's to itself
            exported = torch.export.export(module, inputs, dynamic_shapes=dynamic)
            torch._inductor.aoti_compile_and_package(
                exported, package_path=str(temporary), inductor_configs=OPTIONS
            )
    except RuntimeError as error:  # as it is where no compiler is found
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the step could not be compiled: {reason}; leave compile out") from error
    temporary.replace(path)
