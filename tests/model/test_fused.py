"""The pieces in C++ compute what gpt.py says: values, gradients, and the same bits every time."""

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.config.fields import SettingError
from gptsmith.config.model import MODERN
from gptsmith.config.settings import MachineSettings
from gptsmith.machine import environment
from gptsmith.machine.native import open_library
from gptsmith.model.cache import KVCache
from gptsmith.model.dropout import dropout_seeds
from gptsmith.model.fused import SOURCE, Pieces, fuse
from gptsmith.training.trainer import choose_fused
from tests.conftest import scrambled

pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")

# Sizes that are no multiples of a vector, of one block of queries and of several.
SIZES: dict[str, dict[str, Any]] = {
    "odd": {"n_head": 3, "n_embd": 33, "context_length": 23},
    "whole": {"n_head": 3, "n_embd": 96, "context_length": 64},
    "long": {"n_head": 2, "n_embd": 40, "context_length": 150},
    "wide": {"n_head": 1, "n_embd": 80, "context_length": 17, "n_inner": 50},
}
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {"activation": "gelu_tanh", "bias": True, "qkv_bias": True, "tie_weights": True},
    "nanogpt": {"activation": "gelu_erf", "bias": False, "qkv_bias": False, "tie_weights": True},
    "book": {"activation": "gelu_tanh", "bias": True, "qkv_bias": False, "tie_weights": False},
}
V = 37
CPU = torch.device("cpu")


@pytest.fixture
def library(own_cache: None) -> ctypes.CDLL:
    return open_library(SOURCE)


def small_model(size: str, form: str, dropout: float = 0.0) -> GPT:
    sizes = {"n_layer": 2, "vocab_size": V, "dropout": dropout, **SIZES[size]}
    config = GPTConfig(**sizes, **FORMS[form])
    model = scrambled(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.5  # so that float32 has about the same accuracy everywhere
    return model


def batch(model: GPT, rows: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens, and targets of which some are not learned."""
    generator = torch.Generator().manual_seed(3)
    shape = rows, model.config.context_length
    tokens = torch.randint(V, shape, generator=generator)
    return tokens, torch.randint(-1, V, shape, generator=generator)


def gradients(model: GPT, tokens: Tensor, targets: Tensor, *, bf16: bool = False) -> Tensor:
    """The loss and all gradients as one float64 vector; rows 7 and 9 of a batch, for dropout."""
    model.zero_grad()
    rows = torch.tensor([7, 9])
    seeds = dropout_seeds(5, 3, rows, 2) if model.config.dropout else None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(tokens, targets, seeds)
    loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return torch.cat([each.double().flatten() for each in found])


def exact_gradients(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """The same of the plain path, in float64."""
    exact = GPT(model.config).double()
    exact.load_state_dict(model.state_dict())
    return gradients(exact, tokens, targets)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.slow
def test_gradients_are_those_of_float64(
    size: str, form: str, dropout: float, library: ctypes.CDLL
) -> None:
    model = small_model(size, form, dropout)
    exact = exact_gradients(model, *batch(model))
    plain = [error(gradients(model, *batch(model), bf16=bf16), exact) for bf16 in (False, True)]
    fuse(model, library)
    ours = [error(gradients(model, *batch(model), bf16=bf16), exact) for bf16 in (False, True)]
    assert ours[0] < max(2e-6, 2 * plain[0])
    assert ours[1] < 1.5 * plain[1]


@pytest.mark.slow
def test_every_gradient_is_small_in_error(library: ctypes.CDLL) -> None:
    """One by one, so that no small tensor hides behind a large one."""
    model = small_model("odd", "gpt2")
    exact = GPT(model.config).double()
    exact.load_state_dict(model.state_dict())
    fuse(model, library)
    for each in (exact, model):
        gradients(each, *batch(model))
    for (name, one), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-3, atol=2e-5, msg=name)


def test_gradients_are_the_slopes_of_the_loss(library: ctypes.CDLL) -> None:
    """By finite differences along random directions, without the plain path."""
    model = small_model("odd", "gpt2")
    fuse(model, library)
    tokens, targets = batch(model)
    gradients(model, tokens, targets)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        assert parameter.grad is not None
        way = parameter.grad + torch.randn(parameter.shape, generator=generator) * (
            parameter.grad.norm() / parameter.numel() ** 0.5
        )
        way *= 1e-2 / way.norm()
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * way
                losses.append(float(model.loss(tokens, targets)))
                parameter -= sign * way
        slope = float((parameter.grad * way).sum())
        assert (losses[0] - losses[1]) / 2 == pytest.approx(slope, rel=0.05, abs=2e-6)


def test_without_gradients_the_loss_is_the_same(library: ctypes.CDLL) -> None:
    model = small_model("whole", "nanogpt")
    fuse(model, library)
    tokens, targets = batch(model)
    expected = model.loss(tokens, targets)
    with torch.no_grad():
        assert torch.equal(model.loss(tokens, targets), expected)
        assert model(tokens, targets).loss == pytest.approx(float(expected), rel=1e-5)


def test_targets_that_are_all_ignored_give_nothing(library: ctypes.CDLL) -> None:
    model = small_model("odd", "gpt2")
    fuse(model, library)
    tokens, targets = batch(model)
    assert not gradients(model, tokens, torch.full_like(targets, -1)).any()


def test_a_loss_that_is_not_finite_is_seen(library: ctypes.CDLL) -> None:
    model = small_model("odd", "gpt2")
    fuse(model, library)
    with torch.no_grad():
        model.h[0].mlp.c_fc.weight[0, 0] = torch.nan  # type: ignore[union-attr, index]
    assert not torch.isfinite(model.loss(*batch(model)))


def test_dropout_of_pytorchs_generator_takes_the_plain_path(library: ctypes.CDLL) -> None:
    model, found = small_model("odd", "gpt2", dropout=0.5), []
    for pieces in (None, library):
        fuse(model, pieces)
        torch.manual_seed(8)
        found.append(model(*batch(model)).logits)
    assert torch.equal(*found)


def test_with_a_cache_or_in_float64_the_plain_path_computes(library: ctypes.CDLL) -> None:
    model = small_model("odd", "gpt2").eval()
    tokens, targets = batch(model)
    with torch.no_grad():
        plain = model(tokens, cache=KVCache(model.config, 2)).logits
        fuse(model, library)
        assert torch.equal(model(tokens, cache=KVCache(model.config, 2)).logits, plain)
    exact = exact_gradients(model, tokens, targets)
    assert torch.equal(gradients(model.double(), tokens, targets), exact)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_same_bits_for_any_number_of_threads(bf16: bool, library: ctypes.CDLL) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    pieces, (B, T, H, D) = Pieces(library), (3, 70, 2, 24)
    torch.manual_seed(1)
    stream, weight = torch.randn(B * T, H * D), torch.randn(H * D)
    qkv, dy = (torch.randn(B * T, n * H * D).to(dtype) for n in (3, 1))
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        y, d_qkv, logs = torch.empty_like(dy), torch.empty_like(qkv), torch.empty(B, H, T)
        sizes, none = (B, T, H, D, 16 if bf16 else 32), (None, 0, 1.0)
        pieces.call("attention", qkv, None, *none, y, logs, *sizes)
        pieces.call("attention_backward", qkv, None, *none, y, dy, logs, d_qkv, *sizes)
        norm, stats, d_norm, d_weight = (
            torch.empty_like(y), torch.empty(B * T, 2), torch.empty_like(stream), weight.clone()
        )  # fmt: skip
        rest = (B * T, H * D)
        pieces.call(
            "add_and_norm", stream, None, None, *none, None, weight, None, norm, stats, T, *rest,
            1e-5, sizes[-1],
        )  # fmt: skip
        pieces.call(
            "norm_backward", dy, stream, stats, weight, stream, d_norm, d_weight, None, *rest,
            sizes[-1],
        )  # fmt: skip
        found.append([y, logs, d_qkv, norm, d_norm, d_weight])
    torch.set_num_threads(1)
    for each in found[1:]:
        assert all(map(torch.equal, each, found[0]))


# -- how they are chosen

SETTINGS = MachineSettings(device="cpu", dtype="float32")
CONFIG = GPTConfig(n_layer=1, n_head=2, n_embd=8, context_length=8, vocab_size=V)


@pytest.mark.slow
def test_auto_takes_the_pieces_where_they_can_be() -> None:
    assert choose_fused(SETTINGS, CONFIG, CPU).fused == "yes"
    assert choose_fused(replace(SETTINGS, fused="no"), CONFIG, CPU).fused == "no"
    modern = replace(CONFIG, **MODERN)
    compiled = replace(SETTINGS, compile="yes")
    assert choose_fused(SETTINGS, modern, CPU).fused == "no"
    assert choose_fused(compiled, CONFIG, CPU).fused == "no"
    for machine, config in ((SETTINGS, modern), (compiled, CONFIG)):
        with pytest.raises(SettingError, match="GPT-2's block on a CPU"):
            choose_fused(replace(machine, fused="yes"), config, CPU)


def test_without_a_compiler_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("empty")))
    monkeypatch.setattr(environment, "compiler", lambda: None)
    with pytest.warns(UserWarning, match=r"slower: fused\.cpp cannot be compiled"):
        assert choose_fused(SETTINGS, CONFIG, CPU).fused == "no"
    with pytest.raises(SettingError, match="go on with --fused no"):
        choose_fused(replace(SETTINGS, fused="yes"), CONFIG, CPU)
