"""Take a run back to a checkpoint from before a spike, and leave out the batches that led to it.

`rollbacks.json` in the run's folder lists what was taken back. It is written last: a process that
is killed before that resumes from a checkpoint before the spike, meets it again, and comes to the
same decision. Steps keep their numbers; those after the batches that are left out take the next
ones, so that the order of the data stays the same. Knows nothing of how a spike is found.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..checkpoint.finding import checkpoints, step_of
from ..machine.files import write_text

ROLLBACKS = "rollbacks.json"
# Batches that are left out: that of the spike, and those before it, which may have made the weights
# what they are. PaLM (Chowdhery and others, 2022) left out hundreds, of batches that were larger.
LEFT_OUT = 16
MOST_ROLLBACKS = 3  # to the same step, after which the run stops


@dataclass(frozen=True)
class Rollback:
    """One return to an earlier step."""

    spike: int  # the step of the spike, which was not finished
    to: int  # the step of the checkpoint; 0 is the start of the run
    batches: Sequence[int]  # the numbers, from 0, of those that are left out from now on
    rate: float  # what the learning rates after `to` are multiplied by


@dataclass(frozen=True)
class Good:
    """A checkpoint that a spike may take the run back to."""

    step: int
    best: int | None  # the step of the best checkpoint at that time, which goes with it


def read_rollbacks(folder: Path) -> list[Rollback]:
    """Return what a run has taken back, in order."""
    path = folder / ROLLBACKS
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [Rollback(**each) for each in found]


def batch_number(step: int, rollbacks: Sequence[Rollback]) -> int:
    """Return the number of the batch of a step, both from 0."""
    for left_out in sorted(number for each in rollbacks for number in each.batches):
        step += left_out <= step
    return step


def rate_factor(step: int, rollbacks: Sequence[Rollback]) -> float:
    """Return what rollbacks multiply the learning rates of a step, from 0, by."""
    factor = 1.0
    for each in rollbacks:
        factor *= each.rate if each.to <= step else 1.0
    return factor


def with_good(known: Sequence[Good], newest: Good) -> list[Good]:
    """Return the checkpoints to keep for a rollback, with one that was just saved.

    At most two: one that is at least LEFT_OUT steps old, and one that will be.
    """
    good = [*known]
    if not good or newest.step >= good[-1].step + LEFT_OUT:
        good.append(newest)
    while len(good) > 1 and good[1].step <= newest.step - LEFT_OUT:
        good.pop(0)
    return good


def plan_rollback(
    spike: int, good: Sequence[Good], before: Sequence[Rollback], rate: float
) -> Rollback | None:
    """Return where a spike in a step, from 1, takes the run back to.

    It is the newest good checkpoint before the batches that are left out, or else the start. None
    after MOST_ROLLBACKS to there.
    """
    first = max(0, spike - LEFT_OUT)
    to = max((each.step for each in good if each.step <= first), default=0)
    if sum(each.to == to for each in before) >= MOST_ROLLBACKS:
        return None
    batches = [batch_number(step, before) for step in range(first, spike)]
    return Rollback(spike, to, batches, rate)


def carry_out(folder: Path, rollback: Rollback, before: Sequence[Rollback]) -> None:
    """Remove the checkpoints after the one to go back to, and record the rollback."""
    for path in checkpoints(folder):  # newest first, so that the rest is what a run could leave
        if step_of(path) > rollback.to:
            shutil.rmtree(path)
    if not rollback.to:
        for pointer in ("best", "last"):
            (folder / pointer).unlink(missing_ok=True)
    lines = ",\n".join(json.dumps(asdict(each)) for each in [*before, rollback])
    write_text(folder / ROLLBACKS, f"[\n{lines}\n]\n")
