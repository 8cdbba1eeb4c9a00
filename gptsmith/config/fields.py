"""What a setting is: its default, the sentence that explains it, and the check of its value.

Standard library only, like all of this room.
"""

from dataclasses import field
from difflib import get_close_matches
from typing import Any


def setting(default: Any, help: str) -> Any:
    """A dataclass field whose `help` is one sentence, with its unit: also the text of `--help`."""
    return field(default=default, metadata={"help": help})


def suggestion(word: str, known: Any) -> str:
    """`, did you mean 'x'?` where a known word is close, else nothing; for the end of an error."""
    close = get_close_matches(word, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def at_least(settings: Any, least: float, *names: str) -> None:
    """Raise ValueError where one of the named settings is present and below `least`, or NaN."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} is {value}: at least {least} is needed")


def within(settings: Any, name: str, low: float, high: float) -> None:
    """Raise ValueError unless low <= setting < high."""
    value = getattr(settings, name)
    if not low <= value < high:
        raise ValueError(f"{name} is {value}: {low} <= {name} < {high} is needed")
