"""What a setting is: its default, the sentence that explains it, and the checks of its value.

Standard library only, like all of this room.
"""

import dataclasses
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any

REQUIRED: Any = dataclasses.MISSING  # the default of a setting that has none


class SettingError(ValueError):
    """A setting has a value that it cannot have.

    The command line shows the flag in place of `name`, the field's.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    metavar: str | None = None,
    alone: str | None = None,
    compare: bool = True,
) -> Any:
    """A dataclass field that is a flag: `help` is one sentence, with its unit.

    `flag` is its name on the command line, where that is not the field's; `metavar` is what stands
    for the value in the help, where its type does not say enough; `alone` is the word that a flag
    without a word means.
    """
    metadata = {"help": help, "flag": flag, "metavar": metavar, "alone": alone}
    return dataclasses.field(default=default, compare=compare, metadata=metadata)


def suggestion(word: str, known: Iterable[object]) -> str:
    """`, did you mean 'x'?` where a known word is close, else nothing; for the end of an error."""
    close = get_close_matches(word, list(map(str, known)), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def byte_count(text: str) -> int:
    """The number of bytes that a text such as "5GB" means; ValueError with what is needed."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in UNITS or float(match[1]) == 0:
        raise ValueError("a size such as 500MB or 5GB is needed")
    return int(float(match[1]) * UNITS[match[2].upper()])


def time_span(text: str) -> float:
    """The seconds that a text such as "1h30m" means; ValueError with what is needed."""
    number = r"([0-9]+(?:\.[0-9]+)?)"
    match = re.fullmatch(f"(?:{number}h)?(?:{number}m)?(?:{number}s)?", text.strip().lower())
    seconds = 0.0
    if match is not None:
        hours, minutes, rest = (float(part or 0) for part in match.groups())
        seconds = 3600 * hours + 60 * minutes + rest
    if not seconds:
        raise ValueError("a time such as 90s, 20m or 1h30m is needed")
    return seconds


# A type annotated with a function: the function turns text into a value of the type.
Bytes = Annotated[int, byte_count]
Seconds = Annotated[float, time_span]


# -- checks: each passes over what is None


def at_least(settings: Any, least: float, *names: str) -> None:
    """Raise SettingError where one of the named settings is below `least`, or NaN."""
    check(settings, names, lambda value: value >= least, f"at least {least}")


def above(settings: Any, bound: float, *names: str) -> None:
    """Raise SettingError where one of the named settings is not above the bound."""
    check(settings, names, lambda value: value > bound, f"above {bound}")


def within(settings: Any, low: float, high: float, *names: str) -> None:
    """Raise SettingError unless low <= setting < high for each of the named settings."""
    check(settings, names, lambda value: low <= value < high, f"at least {low} and below {high}")


def fraction(settings: Any, *names: str) -> None:
    """Raise SettingError where one of the named settings is not above 0 and at most 1."""
    check(settings, names, lambda value: 0 < value <= 1, "above 0 and at most 1")


def check(settings: Any, names: Iterable[str], allowed: Any, wanted: str) -> None:
    """Raise SettingError where a named setting is present and not allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not allowed(value):
            raise SettingError(name, f"is {value}: {wanted} is needed")
