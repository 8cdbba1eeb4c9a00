"""The end of a step in C++: the numbers of PyTorch's clipping and AdamW, and of Muon in float64."""

import copy

import pytest
import torch
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.config.settings import TrainingSettings
from gptsmith.training.loop import Trainer
from gptsmith.training.muon import ITERATIONS, QUINTIC, Muon
from gptsmith.training.optimizers import (
    AdamW,
    load_state_tensors,
    make_optimizers,
    state_tensors,
)
from gptsmith.training.update import CompiledUpdate
from tests.conftest import TINY
from tests.training.test_loop import make_trainer
from tests.training.test_muon import learned

SHAPES = [(5, 3), (7,), (1,), (260, 70), (70_001,)]  # the last are several pieces for the threads


@pytest.fixture(scope="module")
def update() -> CompiledUpdate:
    return CompiledUpdate()


def with_gradients(shapes: list[tuple[int, ...]], size: float = 1.0) -> list[Tensor]:
    torch.manual_seed(1)
    found = [torch.randn(shape) for shape in shapes]
    for weight in found:
        weight.grad = size * torch.randn(weight.shape)
    return found


@pytest.mark.parametrize("most", [0.5, 1e6, float("inf")])
def test_gradients_are_clipped_as_torch_clips_them(update: CompiledUpdate, most: float) -> None:
    weights = with_gradients([*SHAPES, (2, 0)])
    ungraded = torch.randn(3)
    exact = [weight.grad.double() for weight in weights]
    norm = torch.cat([gradient.flatten() for gradient in exact]).norm()
    found = update.clip([*weights, ungraded], most)
    assert found.shape == ()
    assert found.item() == pytest.approx(norm.item(), rel=1e-6)
    for weight, gradient in zip(weights, exact, strict=True):
        wanted = (gradient * min(1.0, most / (norm.item() + 1e-6))).float()
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-6, atol=0)
    assert ungraded.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_is_told(update: CompiledUpdate, bad: float) -> None:
    weights = with_gradients([(3, 4)])
    weights[0].grad[1, 2] = bad
    assert not update.clip(weights, 1.0).isfinite()


def test_adamw_is_the_adamw_of_torch_in_float64(update: CompiledUpdate) -> None:
    torch.manual_seed(4)
    mine = [torch.randn(shape) for shape in SHAPES]
    theirs = [torch.nn.Parameter(weight.double()) for weight in mine]
    settings = TrainingSettings(learning_rate=0.01, weight_decay=0.3, beta1=0.8, beta2=0.999)
    groups = [
        {"params": [p for p in theirs if p.ndim >= 2], "weight_decay": 0.3},
        {"params": [p for p in theirs if p.ndim < 2], "weight_decay": 0.0},
    ]
    learned(AdamW(mine, settings, update), mine)
    other = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.999), eps=1e-8)
    generator = torch.Generator().manual_seed(1)  # as `learned`
    for _ in range(4):
        for weight in theirs:
            weight.grad = torch.randn(weight.shape, generator=generator).double()
        other.step()
    for one, another in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), another.data, rtol=1e-6, atol=1e-6)


def exact_step(weight: Tensor, gradient: Tensor, rate: float) -> Tensor:
    """Muon's first step without momentum, written out in float64."""
    x = gradient.double() / (gradient.double().norm() + 1e-7)
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    R, C = weight.shape
    return weight.double() - rate * max(1, R / C) ** 0.5 * x


@pytest.mark.parametrize("shape", [(1, 1), (3, 50), (33, 31), (96, 96), (40, 170), (170, 40)])
def test_muon_is_exact_in_float32_and_near_in_bfloat16(shape: tuple[int, int]) -> None:
    for bf16, near in ((False, 1e-3), (True, 0.05)):
        (weight,) = with_gradients([shape], size=1e-4)
        before, wanted = weight.clone(), exact_step(weight, weight.grad, 0.3)
        Muon([weight], 0.3, momentum=0.0, compiled=CompiledUpdate(bf16=bf16)).step()
        assert (weight - wanted).norm() < near * (wanted - before).norm()


@pytest.mark.parametrize("bf16", [False, True])
def test_singular_values_become_about_one(bf16: bool) -> None:
    for shape in ((8, 20), (20, 8), (12, 12), (96, 80)):
        torch.manual_seed(0)
        u, _, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        weight = torch.zeros(shape)
        weight.grad = u * torch.linspace(0.05, 1, min(shape)) @ vh
        Muon([weight], 1.0, momentum=0.0, compiled=CompiledUpdate(bf16=bf16)).step()
        values = torch.linalg.svdvals(weight / max(1, shape[0] / shape[1]) ** 0.5)
        assert values.max() < 1.25
        assert values.min() > 0.6


@pytest.mark.parametrize("bf16", [False, True])
def test_muon_is_the_plain_muon_within_its_rounding(bf16: bool) -> None:
    """Momentum, decay, and matrices stacked in one parameter, over several steps."""
    shapes = [(36, 12), (12, 36), (36, 12), (12, 12)]
    torch.manual_seed(2)
    mine = [torch.randn(shape) for shape in shapes]
    others = [weight.clone() for weight in mine]
    kinds: list[tuple[list[Tensor], CompiledUpdate | None]]
    kinds = [(mine, CompiledUpdate(bf16=bf16)), (others, None)]
    for weights, compiled in kinds:
        stacks = {weights[0]: 3}
        choices = {"momentum": 0.9, "weight_decay": 0.1, "stacks": stacks, "compiled": compiled}
        learned(Muon(weights, 0.02, **choices), weights)  # type: ignore[arg-type]
    for one, another in zip(mine, others, strict=True):
        torch.testing.assert_close(one, another, rtol=0, atol=2e-3)


def test_a_zero_gradient_moves_no_matrix() -> None:
    for bf16 in (False, True):
        weight = torch.ones(8, 12)
        weight.grad = torch.zeros(8, 12)
        Muon([weight], 0.1, compiled=CompiledUpdate(bf16=bf16)).step()
        assert torch.equal(weight, torch.ones(8, 12))


@pytest.mark.parametrize("bf16", [False, True])
def test_the_number_of_threads_does_not_change_a_bit(bf16: bool) -> None:
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        compiled = CompiledUpdate(bf16=bf16)
        matrices, others = with_gradients([(40, 90), (96, 96)]), with_gradients(SHAPES)
        norm = compiled.clip([*matrices, *others], 0.1)
        Muon(matrices, 0.1, compiled=compiled).step()
        AdamW(others, TrainingSettings(), compiled).step()
        found.append(torch.cat([norm.view(1), *(w.flatten() for w in matrices + others)]))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def compiled_trainer(optimizer: str) -> Trainer:
    trainer = make_trainer(optimizer=optimizer, grad_clip=0.3, learning_rate=0.01)
    trainer.update_by(CompiledUpdate())
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("first", ["plain", "compiled"])
def test_a_run_goes_on_by_the_other_path(first: str, optimizer: str) -> None:
    def make(kind: str) -> Trainer:
        if kind == "compiled":
            return compiled_trainer(optimizer)
        return make_trainer(optimizer=optimizer, grad_clip=0.3, learning_rate=0.01)

    through, resumed = make(first), make("compiled" if first == "plain" else "plain")
    for step in range(4):
        through.step(step)
    saved = state_tensors(through.model, through.optimizers)
    resumed.model.load_state_dict(through.model.state_dict())
    load_state_tensors(resumed.model, resumed.optimizers, saved)
    # Plain Muon rounds to bfloat16.
    near = 1e-5 if optimizer == "adamw" else 1e-3
    for step in range(4, 8):
        assert through.step(step).loss == pytest.approx(resumed.step(step).loss, rel=near)
    again = state_tensors(resumed.model, resumed.optimizers)
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape for name, value in again.items()
    }


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_has_the_same_bits(optimizer: str) -> None:
    through, resumed = compiled_trainer(optimizer), compiled_trainer(optimizer)
    for step in range(4):
        through.step(step)
    resumed.model.load_state_dict(copy.deepcopy(through.model.state_dict()))
    load_state_tensors(
        resumed.model, resumed.optimizers, state_tensors(through.model, through.optimizers)
    )
    for step in range(4, 8):
        assert through.step(step).loss == resumed.step(step).loss
    for one, other in zip(through.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_without_some_gradients_is_updated() -> None:
    model = GPT(GPTConfig(**TINY))
    settings = TrainingSettings(optimizer="muon", learning_rate=0.01)
    before = {name: p.clone() for name, p in model.named_parameters()}
    graded = dict(model.named_parameters())
    for name in ("wpe.weight", "h.0.mlp.c_fc.weight"):
        graded[name].grad = torch.ones_like(graded[name])
    for optimizer in make_optimizers(model, settings):
        optimizer.compiled = CompiledUpdate()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"wpe.weight", "h.0.mlp.c_fc.weight"}
