"""The one chooser: which of several ways to do the same is the fastest on this machine.

It times the candidates in turns, and can remember the figures on disk. Knows nothing of what the
candidates are.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from . import environment
from .files import write_text
from .processes import from_first_process

ROUNDS = 5  # timings of a candidate, after one that warms up
CLOSE = 0.03  # gains below this share are noise, or not worth leaving the preferred candidate
SLOW = 1.25  # times the fastest's typical time: a candidate that is always slower is dropped
FOLDER = "speed"  # of the cache, with a file for each question
VERSION = 1  # of these files; to be raised where code becomes faster or slower than they say


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, and the typical seconds of each, in the order of preference."""

    name: str
    seconds: Mapping[str, float] = field(default_factory=dict)
    remembered: bool = False  # as measured earlier


def choose(
    names: Sequence[str],
    measure: Callable[[str], float],
    *,
    budget: float,
    rounds: int = ROUNDS,
    close: float = CLOSE,
) -> Choice:
    """Time the candidates in turns; return the fastest.

    `names` are in the order of preference: where an earlier one is within the share `close` of the
    fastest, it is chosen. `measure` does the work of a candidate once and returns its seconds; inf
    says that it cannot be done. Every candidate is timed once, to warm up; then all are timed for
    so many `rounds` or until the `budget`, in seconds, is spent, and slow ones are dropped after
    each. The budget counts each candidate's best time so far: processes with the same figures then
    make the same choice, and an interruption by other programs does not end the measuring.
    """
    if len(names) == 1:
        return Choice(names[0])
    times: dict[str, list[float]] = {name: [measure(name)] for name in names}
    running, spent = list(names), 0.0
    for _ in range(rounds):
        for name in sorted(running, key=lambda name: min(times[name])):  # the slow have less to win
            if len(running) > 1 and spent < budget:
                times[name].append(measure(name))
                spent += min(times[name])
        limit = SLOW * min(map(typical, times.values()))
        running = [name for name in running if min(times[name]) <= limit]
    seconds = {name: typical(each) for name, each in times.items()}
    return Choice(preferred(seconds, close), seconds)


def typical(times: Sequence[float]) -> float:
    """Return the median time without that of the warm-up; of fewer than three, the best of all.

    Other programs only make it slower, and a median of so few would not leave that out.
    """
    return median(times[1:]) if len(times) > 3 else min(times)


def preferred(seconds: Mapping[str, float], close: float = CLOSE) -> str:
    """Return the first candidate that is within the share `close` of the fastest."""
    limit = min(seconds.values())
    return next(name for name, each in seconds.items() if each * (1 - close) <= limit)


def timed(work: Callable[[], object]) -> float:
    """Do the work, and return the seconds that it took."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# -- figures on disk


def recall(question: str, about: Any) -> dict[str, float]:
    """Return the figures that were remembered for a question about something; {} without any.

    `about` is what they depend on besides the machine. A damaged file is as good as none.
    """
    with suppress(OSError, ValueError):
        path = environment.cache_folder(FOLDER) / file_name(question, about)
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and all(map(is_figure, found.values())):
            return found
    return {}


def is_figure(value: Any) -> bool:
    """Whether a JSON value is a positive number, which may be infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def remember(question: str, about: Any, figures: Mapping[str, float]) -> None:
    """Remember figures, which are positive, by name on disk."""
    path = environment.cache_folder(FOLDER) / file_name(question, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(dict(figures)))


def file_name(question: str, about: Any) -> str:
    """Return the name of the file with a question's figures on this machine."""
    machine = [environment.processor(), str(torch.__version__), torch.get_num_threads()]
    if torch.cuda.is_available():
        machine.append(torch.cuda.get_device_name())
    digest = hashlib.sha256(repr((VERSION, machine, about)).encode()).hexdigest()
    return f"{question}-{digest[:20]}.json"


def once(question: str, about: Any, names: Sequence[str], measured: Callable[[], Choice]) -> Choice:
    """Return the choice among these candidates by the figures on disk, else by `measured`.

    What that finds is remembered, or a warning says why not. The processes of a run take what the
    first of them remembers.
    """
    about = (about, tuple(names))
    known = from_first_process(recall(question, about))
    if known.keys() == {*names}:
        seconds = {name: known[name] for name in names}
        return Choice(preferred(seconds), seconds, remembered=True)
    choice = measured()
    if choice.seconds and environment.rank() == 0:
        try:
            remember(question, about, choice.seconds)
        except OSError as error:
            warnings.warn(f"the choice of {choice.name} could not be cached: {error}", stacklevel=2)
    return choice
