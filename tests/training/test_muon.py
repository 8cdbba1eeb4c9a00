"""Muon: orthogonal steps, as torch.optim has it, and for matrices that lie in one parameter."""

import pytest
import torch
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.config.settings import TrainingSettings
from gptsmith.training.muon import Muon, orthogonal
from gptsmith.training.optimizers import AdamW, make_optimizers
from tests.conftest import TINY


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 20, 8), (1, 12, 12)])
def test_singular_values_become_about_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices).float()
    inside = u.mT @ found @ vh.mT  # diagonal, where the singular vectors are the same
    values = inside.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6
    assert values.max() < 1.25
    assert (inside - torch.diag_embed(values)).abs().max() < 0.1
    assert (s.max() / s.min()) > 2  # they were not so before


def test_a_zero_matrix_stays_zero() -> None:
    assert not orthogonal(torch.zeros(2, 3, 5)).any()


def learned(optimizer: object, weights: list[Tensor], steps: int = 4) -> list[Tensor]:
    """The weights after steps with the same made-up gradients."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()  # type: ignore[attr-defined]
    return weights


def test_it_is_the_muon_of_torch() -> None:
    shapes = [(10, 4), (4, 10), (10, 4), (6, 6)]
    torch.manual_seed(2)
    mine = [torch.randn(shape) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in mine]
    learned(Muon(mine, 0.02, momentum=0.9, weight_decay=0.1), mine)
    other = torch.optim.Muon(
        theirs, lr=0.02, momentum=0.9, weight_decay=0.1, adjust_lr_fn="original"
    )
    learned(other, theirs)  # type: ignore[arg-type]
    for one, another in zip(mine, theirs, strict=True):
        # They differ by the order in which bfloat16 rounds.
        torch.testing.assert_close(one, another.data, rtol=0, atol=1e-3)


def test_stacked_matrices_learn_as_if_apart() -> None:
    torch.manual_seed(3)
    whole = torch.randn(12, 4)
    parts = [part.clone() for part in whole.split(4)]
    learned(Muon([whole], 0.1, stacks={whole: 3}), [whole])
    optimizer = Muon(parts, 0.1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for part, gradient in zip(
            parts, torch.randn(12, 4, generator=generator).split(4), strict=True
        ):
            part.grad = gradient
        optimizer.step()
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-6)


def test_a_step_has_the_size_it_says() -> None:
    for shape, size in (((4, 16), 0.1), ((16, 4), 0.2), ((9, 9), 0.1)):
        weight = torch.zeros(shape)
        learned(Muon([weight], 0.1), [weight], steps=1)
        values = torch.linalg.svdvals(weight)
        assert values.max() < 1.25 * size
        assert values.min() > 0.6 * size


def test_blocks_matrices_learn_by_muon_and_all_else_by_adamw() -> None:
    model = GPT(GPTConfig(**TINY, tie_weights=False))
    settings = TrainingSettings(optimizer="muon", learning_rate=1e-3, muon_learning_rate=3e-2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    learners = {
        names[p]: (type(optimizer), group["times"])
        for optimizer in make_optimizers(model, settings)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert sorted(learners) == sorted(names.values())
    for name, (learner, times) in learners.items():
        matrix = name.startswith("h.") and "ln_" not in name and name.endswith("weight")
        assert learner is (Muon if matrix else AdamW), name
        assert times == pytest.approx(30.0 if matrix else 1.0)


def test_adamw_is_the_adamw_of_torch() -> None:
    torch.manual_seed(4)
    mine = [torch.randn(5, 3), torch.randn(7)]
    theirs = [torch.nn.Parameter(weight.clone()) for weight in mine]
    settings = TrainingSettings(learning_rate=0.01, weight_decay=0.3, beta1=0.8)
    learned(AdamW(mine, settings), mine)
    groups = [
        {"params": theirs[:1], "weight_decay": 0.3},
        {"params": theirs[1:], "weight_decay": 0.0},
    ]
    learned(torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95), eps=1e-8), theirs)  # type: ignore[arg-type]
    for one, another in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, another.data)
