"""LoRA: low-rank adapters beside frozen linear layers, computed as PEFT computes them.

A layer's output x W' + b becomes x W' + b + scale * dropout(x) A' B'. B begins as zeros, so that
the model begins as it was. Knows nothing of files.

Shapes:  N tokens, of any batch    C inputs    M outputs    R rank    B batch    T tokens
         V vocabulary    K tokens whose rows are learned
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.lora import LoRASettings
from .classifier import Classifier
from .dropout import BlockSeeds, drop, mixed
from .gpt import GPT


class LoRALinear(nn.Linear):
    """A frozen linear layer with an adapter.  (..., C) -> (..., M)"""

    lora_A: nn.Parameter  # (R, C)
    lora_B: nn.Parameter  # (M, R)
    scale: float
    dropout: float
    seeds: Tensor | None  # (B,), of this pass's dropout; None: PyTorch's generator draws it

    def forward(self, input: Tensor) -> Tensor:
        x = drop(input, self.dropout, self.seeds) if self.training and self.dropout else input
        low = F.linear(x, self.lora_A)  # (..., R)
        return F.linear(input, self.weight, self.bias) + F.linear(low, self.lora_B) * self.scale

    def delta(self) -> Tensor:
        """Return what the adapter adds to the weights.  -> (M, C)"""
        return lora_delta(self.lora_A, self.lora_B, self.scale)


def lora_delta(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return what an adapter adds to a layer's weights.  (R, C), (M, R) -> (M, C)"""
    return b @ a * scale


def add_lora(model: GPT, lora: LoRASettings, *, seed: int = 0) -> None:
    """Freeze a model and give its linear layers adapters, which begin as PEFT's do.

    The rows of `lora.tokens` in the embedding, and so in a tied head, are learned as well; so is
    the head of a classifier. ValueError where the model has no such layers.
    """
    if model.config.modern:
        raise ValueError("LoRA is for GPT-2's block, but this is NanoChat's: train all its weights")
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    names = [name for name in names if name.startswith("h.") and lora.covers(name)]
    if not names:
        raise ValueError(f"no layer of the model's blocks is named {' or '.join(lora.targets)}")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        rank = lora.rank_of(name)
        a = torch.empty(rank, layer.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        adapt(layer, a, torch.zeros(layer.out_features, rank), lora.scale_of(name), lora.dropout)
    if isinstance(model, Classifier):
        model.lm_head.requires_grad_(True)
    if lora.tokens:
        learn_rows(model, lora.tokens)
    if lora.dropout:
        for block in model.h:
            block.register_forward_pre_hook(hand_out_seeds)
    model.lora = lora


def adapt(layer: nn.Linear, a: Tensor, b: Tensor, scale: float, dropout: float) -> None:
    """Give a linear layer an adapter.  (R, C), (M, R)"""
    layer.__class__ = LoRALinear  # the same module, with its weights, gets another `forward`
    assert isinstance(layer, LoRALinear)
    device = layer.weight.device
    layer.lora_A, layer.lora_B = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))
    layer.scale, layer.dropout, layer.seeds = scale, dropout, None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Yield the layers that have an adapter, with their names in the model."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def lora_parameters(model: GPT) -> list[nn.Parameter]:
    """Return what is learned: the adapters, and rows or a head that are learned beside them."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def merge_lora(model: GPT) -> None:
    """Add a model's adapters to its weights, in place, and remove them."""
    for _, layer in lora_layers(model):
        layer.weight += layer.delta()
        del layer.lora_A, layer.lora_B
        layer.__class__ = nn.Linear  # type: ignore[assignment]
    if isinstance(model.wte, LearnedEmbedding):
        model.wte.merge()
        if isinstance(model.lm_head, LearnedHead):
            model.lm_head.__class__ = nn.Linear  # type: ignore[assignment]
    model.lora = None


def share_weights(model: nn.Module, other: nn.Module) -> None:
    """Let a model use another's tensors where they are equal, so that these are in memory once."""
    of_other = other.state_dict(keep_vars=True)
    for name, tensor in model.state_dict(keep_vars=True).items():
        same = of_other.get(name)
        if same is not None and same.shape == tensor.shape and torch.equal(same, tensor):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, same)


def own_bytes(model: nn.Module, other: nn.Module) -> int:
    """Return the bytes of a model's tensors that are not another model's."""
    shared = {tensor.data_ptr() for tensor in other.state_dict().values()}
    own = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    return sum(size for place, size in own.items() if place not in shared)


# -- dropout


def hand_out_seeds(block: nn.Module, arguments: tuple[Any, ...]) -> None:
    """Before a block's pass, give each of its adapters seeds of its own, made from the block's.

    Linear layers are called with nothing but their input, so the seeds wait in the layer.
    """
    seeds = arguments[3] if len(arguments) > 3 else BlockSeeds()
    for number, (_, layer) in enumerate(lora_layers(block)):
        layer.seeds = None if seeds.weights is None else adapter_seeds(seeds.weights, number)


def adapter_seeds(seeds: Tensor, number: int) -> Tensor:
    """Return the seeds of a block's adapter of that number.  (B,) -> (B,)"""
    return (mixed(mixed(seeds.long()) + number) >> 32).to(torch.int32)


# -- new tokens


class LearnedRows(nn.Module):
    """A frozen matrix, of the embedding or of the head, some of whose rows are learned."""

    rows: nn.Parameter  # (K, C)
    ids: Tensor  # (K,)

    @property
    def weight(self) -> Tensor:
        """The matrix with the learned rows in their places, (V, C).

        A property of the class is found before the module's own parameter of that name, which is
        the frozen matrix, and the one that is saved.
        """
        frozen = self._parameters["weight"]
        assert frozen is not None
        return frozen.index_copy(0, self.ids, self.rows)


class LearnedEmbedding(LearnedRows, nn.Embedding):  # type: ignore[override]
    """An embedding, some of whose rows are learned.  (B, T) -> (B, T, C)"""

    def merge(self) -> None:
        """Write the learned rows into the matrix, and be an ordinary embedding again."""
        frozen = self._parameters["weight"]
        assert frozen is not None
        frozen[self.ids] = self.rows
        self.__class__ = nn.Embedding  # type: ignore[assignment]
        del self.rows, self.ids


class LearnedHead(LearnedRows, nn.Linear):  # type: ignore[override]
    """A tied head, some of whose rows are learned.  (B, T, C) -> (B, T, V)"""


def learn_rows(model: GPT, tokens: Sequence[int]) -> None:
    """Learn the rows of some tokens in a frozen embedding and the head that is tied to it.

    ValueError where the head has rows for tokens of its own, or the vocabulary has no such token.
    """
    tied = model.config.tie_weights
    if not tied and not isinstance(model, Classifier):
        raise ValueError(
            "new tokens can be learned with adapters only where the head is tied to the embedding: "
            "choose a template without new tokens, or train all weights"
        )
    if not 0 <= min(tokens) <= max(tokens) < model.config.vocab_size:
        raise ValueError(f"{max(tokens)} is not a token of the {model.config.vocab_size:,} known")
    ids = torch.tensor(tokens, device=model.device)
    rows = nn.Parameter(model.wte.weight[ids].detach().clone())
    for part, kind in ((model.wte, LearnedEmbedding), (model.lm_head, LearnedHead))[: 1 + tied]:
        part.__class__ = kind
        part.register_buffer("ids", ids, persistent=False)
        part.register_parameter("rows", rows)
