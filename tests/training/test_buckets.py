"""Sums of gradients that begin during the backward pass. Real processes are in test_workers.py."""

import pytest
import torch
from torch import Tensor

from gptsmith.training import buckets
from gptsmith.training.buckets import GradientSums
from gptsmith.training.loop import Trainer
from tests.training.test_loop import make_trainer, masked_batch


class Twin:
    """Another process with the same gradients: each sum is twice the tensor, once waited for."""

    def __init__(self) -> None:
        self.sizes, self.waiting = list[int](), list[Tensor]()

    def begin(self, tensor: Tensor) -> "Twin":
        self.sizes.append(tensor.numel())
        self.waiting.append(tensor)
        return self

    def wait(self) -> None:
        self.waiting.pop(0).mul_(2)


@pytest.fixture
def twin(monkeypatch: pytest.MonkeyPatch) -> Twin:
    twin = Twin()
    monkeypatch.setattr(buckets, "begin_sum", twin.begin)
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 2000)
    return twin


def summing(micro_batch: int) -> Trainer:
    trainer = make_trainer(micro_batch)
    trainer.sums = GradientSums(trainer.parameters)
    return trainer


@pytest.mark.parametrize("micro_batch", [6, 4])
def test_sums_begin_in_the_last_pass_alone_and_before_it_ends(
    micro_batch: int, twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, alone, begun = summing(micro_batch), make_trainer(micro_batch), list[int]()
    backward = Tensor.backward

    def watched(loss: Tensor) -> None:
        begun.append(len(twin.sizes))
        backward(loss)
        begun.append(len(twin.sizes))

    alone.gradient(*masked_batch())
    monkeypatch.setattr(Tensor, "backward", watched)
    trainer.gradient(*masked_batch())
    assert trainer.sums
    number = len(trainer.sums.buckets)
    assert number > 3
    assert begun[-1] == number  # all of them, each once
    assert set(begun[:-1]) == {0}
    assert sum(twin.sizes) == sum(p.numel() for p in trainer.parameters)
    for one, other in zip(alone.parameters, trainer.parameters, strict=True):
        torch.testing.assert_close(other.grad, 2 * one.grad)
        assert other.grad.is_contiguous()


def test_the_last_layers_are_summed_while_the_first_ones_are_computed(twin: Twin) -> None:
    trainer, seen = summing(6), list[int]()
    trainer.model.h[0].ln_1.weight.register_hook(lambda grad: seen.append(len(twin.sizes)))
    trainer.gradient(*masked_batch())
    assert 1 < seen[0] < len(twin.sizes)


def test_a_process_without_memory_takes_part_in_every_sum(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others would wait for it."""
    trainer, whole = summing(2), Tensor.backward

    def fails_halfway(loss: Tensor) -> None:
        whole(loss)
        raise torch.OutOfMemoryError

    trainer.gradient(*masked_batch())
    expected = twin.sizes.copy()
    twin.sizes.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "backward", fails_halfway)
        with pytest.raises(torch.OutOfMemoryError):
            trainer.gradient(*masked_batch())
    assert twin.sizes == expected
    trainer.gradient(*masked_batch())
    assert twin.sizes == 2 * expected


def test_a_parameter_without_a_gradient_keeps_none(twin: Twin) -> None:
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    sums = GradientSums([used, unused])
    sums.last_pass()
    (2 * used).sum().backward()
    sums.finish()
    assert unused.grad is None
    assert used.grad is not None
    assert used.grad.tolist() == [4.0] * 3
