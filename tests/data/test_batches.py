"""The order of the data: a permutation, computed anywhere, the same for any number of processes."""

from itertools import pairwise

import numpy as np
import pytest

from gptsmith.data.batches import Batches, permuted


class Counting:
    """A stream whose token at position i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start <= stop <= self.length
        return np.arange(start, stop)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_permuted_is_a_permutation_that_depends_on_the_key(size: int) -> None:
    one, other = (
        [permuted(i, size, keys) for i in range(size)] for keys in ((1, 2, 3, 4), (5, 6, 7, 8))
    )
    assert sorted(one) == sorted(other) == list(range(size))
    if size > 60:
        assert one != other
        assert one != sorted(one)
        steps = {b - a for a, b in pairwise(one)}
        assert len(steps) > size / 3  # no stride to be seen


def test_an_epoch_learns_every_token_once() -> None:
    T, length = 7, 7 * 30 + 4
    batches = Batches(Counting(length), T, rows=5, seed=1)
    assert batches.windows == 30
    learned = np.concatenate([batches.at(step)[1].flatten() for step in range(6)])
    assert len(set(learned.tolist())) == 30 * T == len(learned)


def test_targets_follow_tokens_around_the_circle() -> None:
    length = 50
    batches = Batches(Counting(length), 7, rows=3, seed=2)
    for step in range(40):
        tokens, targets = batches.at(step)
        assert tokens.shape == targets.shape == (3, 7)
        assert np.array_equal(targets, (tokens + 1) % length)
        assert np.array_equal(tokens[:, 1:], targets[:, :-1])


def test_epochs_differ_and_meet_every_offset() -> None:
    batches = Batches(Counting(70), 7, rows=10, seed=3)
    epochs = [batches.at(step)[0][:, 0] for step in range(200)]
    assert {int(start) % 7 for epoch in epochs for start in epoch} == set(range(7))
    assert len({tuple(epoch) for epoch in epochs}) > 190


def test_a_step_needs_only_seed_and_number() -> None:
    one, other = (Batches(Counting(1000), 7, rows=4, seed=4) for _ in range(2))
    for step in range(10):
        one.at(step)
    assert np.array_equal(one.at(123)[0], other.at(123)[0])
    assert not np.array_equal(
        other.at(123)[0], Batches(Counting(1000), 7, rows=4, seed=5).at(123)[0]
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_processes_share_one_global_batch(world_size: int) -> None:
    whole = Batches(Counting(1000), 7, rows=5, seed=6)
    parts = [
        Batches(Counting(1000), 7, rows=5, seed=6, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step in (0, 29, 300):
        together = np.concatenate([part.at(step)[0] for part in parts])
        assert np.array_equal(together, whole.at(step)[0])


def test_a_batch_larger_than_the_text_goes_round() -> None:
    tokens, _ = Batches(Counting(22), 7, rows=10, seed=7).at(0)
    assert tokens.shape == (10, 7)


def test_text_shorter_than_a_context_is_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens, fewer than one context of 8 and its target"):
        Batches(Counting(8), 8, rows=1, seed=0)
    Batches(Counting(9), 8, rows=1, seed=0)
