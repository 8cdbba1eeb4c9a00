"""Say how sure a measured mean is, and whether a difference between two models is real.

Knows nothing of models or texts; it is given numbers. No PyTorch.

Shapes:  N documents (or blocks of text, items of a task, runs)
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
DRAWS = 10_000  # bootstrap samples
GROUPS = 10_000  # more documents than that are drawn in random groups, which bounds the time
CHUNK = 1 << 20  # documents drawn at once, which bounds the memory


class Interval(NamedTuple):
    """A mean and the bounds of its 95% confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(
    values: np.ndarray, weights: np.ndarray | None = None, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Return the mean of values, (N,), with its bootstrap interval over documents.

    With weights, (N,) and positive, as the documents' bytes, it is the weighted mean: the bits per
    byte of the whole text. The documents are drawn anew, each with its weight. Plain percentiles
    make intervals of few documents too narrow; their level is set by Student's t (Hesterberg 2015,
    "What Teachers Should Know About the Bootstrap", the expanded percentile interval).
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    if values.ndim != 1 or values.shape != weights.shape or not (weights > 0).all():
        raise ValueError("values and weights must be two lists of one length, the weights positive")
    count = checked_count(values)
    rng = np.random.default_rng(seed)
    sums = np.stack([values * weights, weights], axis=1)  # (N, 2)
    mean = float(sums[:, 0].sum() / sums[:, 1].sum())
    if count > GROUPS:
        starts = np.linspace(0, count, GROUPS, endpoint=False).astype(np.int64)
        sums = np.add.reduceat(rng.permutation(sums), starts)
    totals = resampled_sums(sums, draws, rng)
    tail = NormalDist().cdf(-t_quantile(count - 1) * math.sqrt(count / (count - 1)))
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def paired_interval(
    differences: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Return the mean difference between two models on the same documents, with its interval.

    `differences`, (N,), are one model's figure less the other's, document by document; what makes
    a document hard for both cancels out. See `mean_interval`.
    """
    return mean_interval(differences, weights, draws=draws, seed=seed)


def t_interval(values: np.ndarray) -> Interval:
    """Return the mean of a few values, (N,), such as runs of several seeds, by Student's t."""
    count = checked_count(values)
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
    half = t_quantile(count - 1) * error
    return Interval(mean, mean - half, mean + half)


def mcnemar(only_a: int, only_b: int) -> float:
    """Return McNemar's exact p-value, two-sided, that two models are equally often right.

    `only_a` and `only_b` count the items that one model has right and the other wrong.
    """
    total, fewer = only_a + only_b, min(only_a, only_b)
    if 2 * fewer == total:
        return 1.0
    log_ways = (
        math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1)
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * math.fsum(math.exp(ways - total * math.log(2)) for ways in log_ways))


# -- what follows from an interval


def verdict(interval: Interval, *, lower_is_better: bool = True) -> str:
    """Return "better", "worse" or "undecided", by the interval of model less other."""
    if interval.low <= 0 <= interval.high or math.isnan(interval.mean):
        return "undecided"
    return "better" if (interval.mean < 0) == lower_is_better else "worse"


def documents_to_settle(interval: Interval, count: int) -> int | None:
    """Return about how many more documents would decide, if the mean difference stays as it is.

    An interval shrinks with the square root of the number of documents, now `count`. 0 where it is
    decided, None where the difference is 0. Rounded up to two digits.
    """
    if verdict(interval) != "undecided":
        return 0
    width = interval.high - interval.mean if interval.mean < 0 else interval.mean - interval.low
    more = count * ((width / interval.mean) ** 2 - 1) if interval.mean else math.inf
    if not math.isfinite(more):
        return None
    digit = 10 ** max(0, len(str(int(more))) - 2)
    return math.ceil(max(1.0, more) / digit) * digit


def conclusion(
    model: str,
    other: str,
    interval: Interval,
    count: int,
    *,
    unit: str = "bits per byte",
    noun: str = "documents",
    lower_is_better: bool = True,
) -> str:
    """Return one sentence on two models: better, worse, or undecided and what would settle it."""
    found = verdict(interval, lower_is_better=lower_is_better)
    mean, low, high = interval
    if found != "undecided":
        smaller, larger = sorted((abs(low), abs(high)))
        return (
            f"{model} is {found} than {other} by {abs(mean):.4f} {unit} "
            f"(95% interval {smaller:.4f} to {larger:.4f})."
        )
    more = documents_to_settle(interval, count)
    settle = f"About {more:,} more {noun} would settle it" if more else "There is no difference"
    return (
        f"Undecided: {model} differs from {other} by {mean:+.4f} {unit} "
        f"(95% interval {low:+.4f} to {high:+.4f}). {settle}."
    )


# -- arithmetic


def checked_count(values: np.ndarray) -> int:
    """Return the number of values; ValueError for fewer than two, which have no interval."""
    if len(values) < 2:
        raise ValueError(f"an interval needs 2 or more documents, items or runs: got {len(values)}")
    return len(values)


def resampled_sums(sums: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Draw N of N rows with replacement, `draws` times, and add them up.  (N, 2) -> (draws, 2)"""
    count = len(sums)
    rows = sums.astype(np.float64).view(np.complex128)[:, 0]  # one gather for both columns
    totals = np.empty(draws, np.complex128)
    step = max(1, CHUNK // count)
    for first in range(0, draws, step):
        size = min(step, draws - first)
        chosen = rng.integers(0, count, (size, count), np.uint16)
        totals[first : first + size] = rows.take(chosen).sum(axis=1)
    return totals.view(np.float64).reshape(draws, 2)


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return the two-sided quantile of Student's t with so many degrees of freedom.

    With t = sqrt(freedom) tan(a), the density of the angle a is proportional to
    cos(a)^(freedom - 1), which is added up on a grid; it is narrow where freedom is large.
    """
    angles = np.linspace(0, min(math.pi / 2, 12 / math.sqrt(freedom)), 10_001)
    density = np.cos(angles) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    angle = np.interp(confidence * share[-1], share, angles)
    return math.sqrt(freedom) * math.tan(float(angle))
