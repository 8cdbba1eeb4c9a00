"""One optimizer step: however the batch is divided, the same gradient."""

import numpy as np
import pytest
import torch

from gptsmith import GPT, GPTConfig
from gptsmith.config.settings import TrainingSettings
from gptsmith.data.batches import Batches
from gptsmith.model.attention import WAYS
from gptsmith.training.loop import DivergedError, Trainer, steps
from gptsmith.training.optimizers import load_state_tensors, make_optimizers, state_tensors
from tests.conftest import TINY


class Stream:
    """500 tokens with a pattern that can be learned."""

    def __init__(self) -> None:
        self.tokens = np.arange(500) ** 2 % TINY["vocab_size"]

    def __len__(self) -> int:
        return 500

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


def make_trainer(micro_batch: int = 6, dropout: float = 0.0, **choices: object) -> Trainer:
    settings = TrainingSettings(
        **({"steps": 8, "batch_tokens": 66, "warmup_steps": 2} | choices)  # type: ignore[arg-type]
    )
    torch.manual_seed(5)
    model = GPT(GPTConfig(**TINY, dropout=dropout)).train()
    return Trainer(
        model=model,
        optimizers=make_optimizers(model, settings),
        batches=Batches(Stream(), TINY["context_length"], 6, seed=1),
        settings=settings,
        device=torch.device("cpu"),
        dtype="float32",
        micro_batch=micro_batch,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )


def masked_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with very different numbers of counted targets, one with none at all."""
    tokens = torch.from_numpy(make_trainer().batches.at(0)[0])
    targets = torch.from_numpy(make_trainer().batches.at(0)[1]).clone()
    targets[0, :] = -1
    targets[1, 2:] = -1
    targets[4, ::2] = -1
    return tokens, targets


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 5])
def test_the_gradient_does_not_depend_on_the_micro_batch(micro_batch: int) -> None:
    tokens, targets = masked_batch()
    whole, parts = make_trainer(6), make_trainer(micro_batch)
    expected_loss = whole.model(tokens, targets).loss
    loss = parts.gradient(tokens, targets)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-6)
    expected_loss.backward()
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)


def test_a_step_is_adamw_as_torch_has_it() -> None:
    """Two steps against a plain loop: schedule, decay groups and clipping written out."""
    trainer = make_trainer(grad_clip=0.05, learning_rate=0.01, weight_decay=0.3)
    torch.manual_seed(5)
    model = GPT(GPTConfig(**TINY)).train()
    decayed = [p for n, p in model.named_parameters() if "ln_" not in n and "bias" not in n]
    plain = [p for n, p in model.named_parameters() if "ln_" in n or "bias" in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step, rate in enumerate([0.005, 0.01]):
        tokens, targets = (torch.from_numpy(part) for part in trainer.batches.at(step))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        model(tokens, targets).loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, 0.05 / norm.item())
        optimizer.step()
        report = trainer.step(step)
        assert report.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert report.learning_rate == rate
    for one, other in zip(model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_it_learns() -> None:
    trainer = make_trainer(steps=60, learning_rate=0.03)
    losses = [report.loss for report in steps(trainer, 0)]
    assert losses[0] == pytest.approx(np.log(37), abs=0.1)
    assert np.mean(losses[-5:]) < losses[0] - 0.5


def test_dropout_of_a_step_depends_on_seed_and_step_alone() -> None:
    one, other = make_trainer(dropout=0.5), make_trainer(dropout=0.5)
    torch.manual_seed(99)
    torch.rand(17)  # whatever else was drawn in between
    assert one.step(0).loss == other.step(0).loss
    torch.rand(3)
    assert one.step(1).loss == other.step(1).loss


@pytest.mark.parametrize("attention", ["kernel", "blocks"])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_dropout_does_not_depend_on_the_micro_batch(micro_batch: int, attention: str) -> None:
    whole, parts = make_trainer(6, 0.3), make_trainer(micro_batch, 0.3)
    whole.model.attend_by(WAYS[attention])
    parts.model.attend_by(WAYS[attention])
    for done in range(4):
        one, other = whole.step(done), parts.step(done)
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_another_step_seed_or_row_drops_other_elements() -> None:
    trainer, other = make_trainer(dropout=0.3), make_trainer(dropout=0.3, seed=2)
    batch = trainer.batch(0)
    losses = {trainer.gradient(*batch).item(), other.gradient(*batch).item()}
    trainer.done = 1
    losses.add(trainer.gradient(*batch).item())
    trainer.batches.mine = trainer.batches.mine + 6
    losses.add(trainer.gradient(*batch).item())
    assert len(losses) == 4


def test_where_processes_draw_dropout_each_draws_its_own() -> None:
    """As on CUDA, with PyTorch's generator."""
    one, other = make_trainer(dropout=0.5), make_trainer(dropout=0.5)
    one.dropout_by_row = other.dropout_by_row = False
    torch.rand(17)  # whatever else was drawn in between
    assert one.step(0).loss == other.step(0).loss
    other.batches.rank = 1
    assert one.step(1).loss != other.step(1).loss


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_state_survives_the_trip_to_tensors(optimizer: str) -> None:
    through, resumed = make_trainer(optimizer=optimizer), make_trainer(optimizer=optimizer)
    for step in range(4):
        through.step(step)
    tensors = {k: v.clone() for k, v in state_tensors(through.model, through.optimizers).items()}
    resumed.model.load_state_dict(through.model.state_dict())
    load_state_tensors(resumed.model, resumed.optimizers, tensors)
    for step in range(4, 8):
        assert through.step(step).loss == resumed.step(step).loss
    for one, other in zip(through.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_without_a_finite_gradient_is_skipped() -> None:
    trainer = make_trainer()
    trainer.step(0)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    real = trainer.model.ln_f.weight.data.clone()
    trainer.model.ln_f.weight.data[0] = float("nan")
    report = trainer.step(1)
    trainer.model.ln_f.weight.data.copy_(real)
    assert report.skipped
    assert not np.isfinite(report.loss)
    for was, parameter in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(was, parameter)
    assert not trainer.step(2).skipped


def test_several_in_a_row_end_the_run() -> None:
    trainer = make_trainer(steps=50)
    trainer.model.ln_f.weight.data[0] = float("nan")
    reports = []

    def keep_going() -> None:
        for report in steps(trainer, 0):
            reports.append(report)

    with pytest.raises(DivergedError, match=r"step 5: .* not finite for 5 steps in a row"):
        keep_going()
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]


def test_out_of_memory_halves_the_micro_batch_unevenly() -> None:
    """As CUDA raises it; the gradient is that of the whole batch all the same."""
    trainer, whole = make_trainer(5), make_trainer(6)
    loss_of = trainer.loss

    def tight(tokens: torch.Tensor, targets: torch.Tensor) -> object:
        if tokens.shape[0] > 2:
            raise torch.OutOfMemoryError("no room")
        return loss_of(tokens, targets)

    trainer.loss = tight
    report = trainer.step(0)
    assert report.micro_batch == 2  # 5, then 3, then 2
    assert report.loss == pytest.approx(whole.step(0).loss, rel=1e-6)
    for one, other in zip(whole.model.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_one_row_too_many_is_an_error() -> None:
    trainer = make_trainer(1)

    def never(tokens: torch.Tensor, targets: torch.Tensor) -> object:
        raise torch.OutOfMemoryError("no room")

    trainer.loss = never
    with pytest.raises(ValueError, match="one row of the batch does not fit"):
        trainer.step(0)
