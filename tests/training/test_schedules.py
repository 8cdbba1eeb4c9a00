"""The learning rate at the places where its shape is decided."""

from itertools import pairwise

import pytest

from gptsmith.config.settings import TrainingSettings
from gptsmith.training.schedules import learning_rate

SHAPE = {"steps": 1000, "warmup_steps": 100, "learning_rate": 2e-3}


def rates(**choices: object) -> list[float]:
    settings = TrainingSettings(**(SHAPE | choices))  # type: ignore[arg-type]
    return [learning_rate(step, settings) for step in range(1000)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_is_a_line_from_above_zero(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[0] == pytest.approx(2e-5)
    assert found[49] == pytest.approx(1e-3)
    assert found[99] == found[100] == pytest.approx(2e-3)
    assert max(found) <= 2e-3 + 1e-12


def test_cosine_falls_to_a_tenth() -> None:
    found = rates(schedule="cosine")
    assert found[550] == pytest.approx((2e-3 + 2e-4) / 2)
    assert found[-1] == pytest.approx(2e-4, rel=1e-3)
    assert all(a > b for a, b in pairwise(found[100:]))


def test_wsd_stays_and_then_falls_in_a_line_to_zero() -> None:
    found = rates(schedule="wsd", decay_fraction=0.25)
    assert set(found[100:750]) == {2e-3}
    assert found[875] == pytest.approx(1e-3)
    assert found[999] == pytest.approx(2e-3 / 250)


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")[100:]) == {2e-3}


def test_the_lowest_rate_can_be_set() -> None:
    assert rates(min_learning_rate=0.0)[-1] == pytest.approx(0.0, abs=1e-8)
    assert rates(schedule="wsd", min_learning_rate=1e-3)[-1] == pytest.approx(1e-3, rel=1e-2)
    assert rates(warmup_steps=0)[0] == 2e-3
