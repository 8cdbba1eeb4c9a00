"""Intervals, verdicts and McNemar's test, against scipy and by simulation."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy import stats

from gptsmith.evaluation.intervals import (
    Interval,
    conclusion,
    documents_to_settle,
    mcnemar,
    mean_interval,
    paired_interval,
    t_interval,
    t_quantile,
    verdict,
)


def test_the_interval_is_that_of_scipys_bootstrap() -> None:
    """On skewed data, a ratio of sums; at the level that Student's t asks for."""
    rng = np.random.default_rng(3)
    differences, sizes = rng.exponential(1.0, 60) - 0.9, rng.integers(50, 4000, 60)
    level = 1 - 2 * stats.norm.cdf(-stats.t.ppf(0.975, 59) * math.sqrt(60 / 59))
    expected = stats.bootstrap(
        (differences * sizes, sizes),
        lambda bits, size, axis: bits.sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    found = paired_interval(differences, sizes, draws=20_000, seed=1)
    assert found.mean == pytest.approx(np.average(differences, weights=sizes), abs=1e-14)
    width = expected.high - expected.low
    assert abs(found.low - expected.low) < 0.02 * width
    assert abs(found.high - expected.high) < 0.02 * width


@pytest.mark.slow
def test_coverage() -> None:
    """Of 1,000 pairs of models on 200 documents, about 95% of the intervals hold the truth."""
    rng = np.random.default_rng(5)
    held = 0
    for seed in range(1000):
        hard = rng.gamma(2.0, 1.0, 200)  # what both models find hard
        a = hard + rng.normal(0.0, 0.2, 200)
        b = hard + rng.normal(0.05, 0.3, 200)
        found = paired_interval(a - b, draws=1000, seed=seed)
        held += found.low <= -0.05 <= found.high
    assert 930 <= held <= 970


def test_what_both_models_find_hard_cancels_out() -> None:
    rng = np.random.default_rng(6)
    hard = rng.gamma(2.0, 1.0, 200)
    a, b = hard + rng.normal(0, 0.02, 200), hard + rng.normal(0.02, 0.02, 200)
    paired, alone = paired_interval(a - b), mean_interval(a)
    assert verdict(paired) == "better"
    assert alone.low < b.mean() < alone.high


def test_the_same_seed_gives_the_same_interval_and_weights_scale() -> None:
    rng = np.random.default_rng(2)
    values, sizes = rng.normal(size=50), rng.integers(1, 9, 50)
    first = mean_interval(values, sizes, seed=7)
    assert first == mean_interval(values, sizes, seed=7)
    assert first == pytest.approx(mean_interval(values, 10 * sizes, seed=7))
    assert first != mean_interval(values, sizes, seed=8)


def test_many_documents_are_drawn_in_groups_in_bounded_memory() -> None:
    values = np.random.default_rng(8).normal(1.0, 2.0, 100_000)
    tracemalloc.start()
    found = mean_interval(values, draws=400)
    assert tracemalloc.get_traced_memory()[1] < 64e6
    tracemalloc.stop()
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * error, rel=0.15)


@pytest.mark.parametrize("count", [2, 3, 10, 30, 200, 20_000])
def test_students_t(count: int) -> None:
    values = np.random.default_rng(count).normal(size=count)
    expected = stats.t.interval(0.95, count - 1, values.mean(), stats.sem(values))
    assert t_interval(values)[1:] == pytest.approx(expected, abs=1e-5)
    assert t_quantile(count - 1) == pytest.approx(stats.t.ppf(0.975, count - 1), rel=1e-5)


@pytest.mark.parametrize(
    "counts", [(0, 0), (0, 1), (1, 0), (5, 5), (4, 5), (3, 9), (150, 100), (2000, 2300)]
)
def test_mcnemar_is_the_binomial_test(counts: tuple[int, int]) -> None:
    expected = stats.binomtest(counts[0], sum(counts)).pvalue if sum(counts) else 1.0
    assert mcnemar(*counts) == pytest.approx(expected, rel=1e-9)


def test_verdicts() -> None:
    assert verdict(Interval(-0.2, -0.3, -0.1)) == "better"
    assert verdict(Interval(0.2, 0.1, 0.3)) == "worse"
    assert verdict(Interval(0.2, 0.1, 0.3), lower_is_better=False) == "better"
    assert verdict(Interval(-0.2, -0.3, 0.0)) == "undecided"
    assert verdict(Interval(math.nan, math.nan, math.nan)) == "undecided"


def test_about_so_many_more_documents_would_settle_it() -> None:
    """Measured again on that many documents of the same kind, the interval just excludes zero."""
    assert documents_to_settle(Interval(-0.2, -0.3, -0.1), 50) == 0
    assert documents_to_settle(Interval(0.0, -0.1, 0.1), 50) is None
    assert documents_to_settle(Interval(0.1, -0.1, 0.3), 50) == 150  # half the width: 4 times
    assert documents_to_settle(Interval(0.001, -0.1, 0.1), 123) == 1_300_000
    values = np.random.default_rng(9).normal(size=100)
    values += 0.1 - values.mean()
    more = documents_to_settle(mean_interval(values), 100)
    assert more is not None
    many = np.resize(values, 100 + more)
    assert mean_interval(many).low == pytest.approx(0.0, abs=0.01)


def test_a_sentence() -> None:
    assert conclusion("a", "b", Interval(-0.2, -0.3, -0.1), 50) == (
        "a is better than b by 0.2000 bits per byte (95% interval 0.1000 to 0.3000)."
    )
    right = conclusion(
        "a",
        "b",
        Interval(-0.1, -0.3, 0.1),
        50,
        unit="accuracy",
        noun="items",
        lower_is_better=False,
    )
    assert right == (
        "Undecided: a differs from b by -0.1000 accuracy (95% interval -0.3000 to +0.1000). "
        "About 150 more items would settle it."
    )
    assert "There is no difference." in conclusion("a", "a", Interval(0.0, 0.0, 0.0), 50)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_fewer_than_two_have_no_interval(values: list[float]) -> None:
    for function in (mean_interval, paired_interval, t_interval):
        with pytest.raises(ValueError, match=f"needs 2 or more .* got {len(values)}"):
            function(np.array(values))


def test_weights_must_be_positive_and_as_many() -> None:
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match="weights positive"):
            mean_interval(np.array([1.0, 2.0]), np.array(weights))
