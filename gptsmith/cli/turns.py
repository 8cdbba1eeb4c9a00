"""Which system generates how fast: each in processes of its own, one right after the other.

A machine's speed drifts within minutes, so what is to be compared is measured side by side, and
more than once. Knows nothing of how a system generates, or of what the figures say.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..machine import environment
from ..machine.files import read_json

Figures = dict[str, Any]  # of `bench_generate`, or those of them that another system has too


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a system is asked for in one process."""

    dtype: str
    rows: int
    prompt_tokens: int
    max_tokens: int

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens} + {self.max_tokens} tokens"
        return f"{self.dtype}, {self.rows_text}, {tokens}"

    @property
    def rows_text(self) -> str:
        """ "1 row", "8 rows" """
        return f"{self.rows} row{'s' if self.rows > 1 else ''}"


@dataclass(frozen=True)
class System:
    """Something that generates; `dtypes` are those that it has, None where it may have any."""

    name: str
    measure: Callable[[Case], Figures]
    dtypes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Measurement:
    """What one system did in one case of one round."""

    round: int
    system: str
    case: Case
    figures: Figures


def in_turn(
    systems: Sequence[System],
    cases: Sequence[Case],
    rounds: int,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[Measurement]:
    """Every case of every round, by each system that has its number format."""
    for round in range(1, rounds + 1):
        for case in cases:
            for system in systems:
                if system.dtypes is None or case.dtype in system.dtypes:
                    tell(f"round {round} of {rounds}: {system.name}, {case}")
                    yield Measurement(round, system.name, case, system.measure(case))


# -- processes
#
# A fresh one for each measurement: the peak that it tells is the largest resident memory of that
# process, Python and libraries and what it read from files included.


def ourselves(name: str, model: str, machine: Mapping[str, Any]) -> System:
    """`gptsmith bench generate` of a MODEL or preset, with these settings of the machine."""

    def measure(case: Case) -> Figures:
        given = [*machine.items(), *vars(case).items()]
        words = [word for name, value in given for word in (flag(name), str(value))]
        return json.loads(python("-m", "gptsmith", "bench", "generate", model, "--json", *words))

    return System(name, measure)


def flag(name: str) -> str:
    """ "--max-tokens" for `max_tokens`"""
    return "--" + name.replace("_", "-")


def somebody_else(name: str, dtypes: tuple[str, ...], *program: str, **question: Any) -> System:
    """A system that a program in Python knows: its last word is a question in JSON, which names
    the file that gets the answer."""

    def measure(case: Case) -> Figures:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder, "answer.json")
            asked = json.dumps({**question, **vars(case), "answer": str(answer)})
            python(*program, asked, variables=environment.variables_for_others(), who=f"{name}: ")
            return read_json(answer)

    return System(name, measure, dtypes)


def python(*words: str, variables: Mapping[str, str] | None = None, who: str = "") -> str:
    """What a Python of its own writes; ValueError with its last complaint where it fails."""
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=variables, check=False
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"a process ended with {done.returncode}"]
        raise ValueError(who + said[-1].removeprefix("gptsmith: "))
    return done.stdout
