"""Successive halving: how far each of many runs is trained, so that all fit a budget of time.

Arithmetic on steps and seconds; knows nothing of folders or processes.

Every run has the learning rate schedule of all its steps from the first one on. It is trained to
fractions of them, the rungs, as 1/4, 1/2 and 1. After each rung but the last, the better half of
the configurations, rounded up, goes on (fewer, where the time that is left would not do), and the
others stay as they are. A run that goes on is resumed, so that it ends with the bits of a run that
was never halted, and no step is computed twice. The price is that configurations are judged before
their learning rate has decayed.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..config.cost import flops_per_token
from ..config.settings import RunSettings


@dataclass(frozen=True)
class Speed:
    """What was measured of one run, from which the time of the others is estimated."""

    overhead: float  # seconds of its process to start, save and end
    whole: float  # seconds of all its steps and evaluations

    def scaled(self, measured: RunSettings, other: RunSettings) -> "Speed":
        """Return the speed of another run, whose steps have more or fewer FLOPs."""
        return Speed(self.overhead, self.whole * flops(other) / flops(measured))


def flops(settings: RunSettings) -> float:
    """Return the FLOPs of a whole run."""
    training = settings.training
    per_token = flops_per_token(settings.model, training=True)
    return training.steps * training.batch_tokens * per_token


def fractions(halvings: int) -> list[float]:
    """Return the fraction of its steps to which a run is trained in each rung."""
    return [2.0 ** (rung - halvings) for rung in range(halvings + 1)]


def last_step(settings: RunSettings, fraction: float) -> int:
    """Return the last step of a rung, at which the run is evaluated: all, or a round number."""
    steps, every = settings.training.steps, settings.report.evaluate_every
    return min(steps, every * math.ceil(fraction * steps / every))


def most_halvings(runs: Sequence[RunSettings], configurations: int) -> int:
    """Return how often the configurations can be halved: to one, and with an evaluation in each.

    Each rung must end later than the one before.
    """
    halvings = math.ceil(math.log2(configurations))
    while halvings and not all(rising(run, halvings) for run in runs):
        halvings -= 1
    return halvings


def rising(settings: RunSettings, halvings: int) -> bool:
    """Whether each rung has more steps than the one before."""
    ends = [last_step(settings, fraction) for fraction in fractions(halvings)]
    return all(before < after for before, after in itertools.pairwise(ends))


def counts(configurations: int, halvings: int) -> list[int]:
    """Return how many configurations are trained in each rung: half as many, rounded up."""
    return [math.ceil(configurations / 2**rung) for rung in range(halvings + 1)]


def seconds_of(
    runs: Sequence[RunSettings], speeds: Sequence[Speed], shares: Sequence[float]
) -> float:
    """Return the time of the rungs, one run after another, if those that go on are average ones.

    `shares` are those of the configurations in each rung; 0 for a rung that is over.
    """
    total, before = 0.0, 0.0
    for fraction, share in zip(fractions(len(shares) - 1), shares, strict=True):
        for settings, speed in zip(runs, speeds, strict=True):
            start = last_step(settings, before) if before else 0
            part = (last_step(settings, fraction) - start) / settings.training.steps
            total += share * (speed.overhead + part * speed.whole)
        before = fraction
    return total


def choose_halvings(
    runs: Sequence[RunSettings],
    speeds: Sequence[Speed],
    configurations: int,
    budget: float,
    processes: int = 1,
) -> tuple[int | None, float]:
    """Return the fewest halvings whose time fits the budget, and that time; None if none does.

    The fewest, as a configuration is judged the better the longer it was trained. The time of a
    plan that does not fit is that of the cheapest one.
    """
    cheapest = math.inf
    for halvings in range(most_halvings(runs, configurations) + 1):
        shares = [count / configurations for count in counts(configurations, halvings)]
        seconds = seconds_of(runs, speeds, shares) / processes
        if seconds <= budget:
            return halvings, seconds
        cheapest = min(cheapest, seconds)
    return None, cheapest


def affordable(
    runs: Sequence[RunSettings],
    speeds: Sequence[Speed],
    configurations: int,
    halvings: int,
    rung: int,
    seconds: float,
) -> int:
    """Return how many configurations begin a rung: as planned, or fewer where time is short.

    `seconds` are what is left for it and the rungs after it; at least one configuration goes on.
    """
    count = counts(configurations, halvings)[rung]
    while count > 1:
        rest = counts(count, halvings - rung)
        shares = [0.0] * rung + [each / configurations for each in rest]
        if seconds_of(runs, speeds, shares) <= seconds:
            break
        count -= 1
    return count


def best_configurations(losses: Mapping[str, float], count: int) -> list[str]:
    """Return the `count` configurations of the lowest loss; never one whose loss is infinite."""
    finite = [name for name, loss in losses.items() if math.isfinite(loss)]
    return sorted(finite, key=losses.__getitem__)[:count]
