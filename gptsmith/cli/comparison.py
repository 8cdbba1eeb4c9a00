"""What measurements of several rounds say: medians, ranges and ratios, as a table.

A ratio is the median of the rounds' ratios, since within a round systems were measured side by
side. Knows nothing of how anything was measured.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.tables import columns
from .turns import Case, Figures, Measurement

LONG_PROMPT = 1024  # where the context has room for it

LEGEND = """\
value: the median over the rounds, and the range
peak memory: most that was resident of the process, with Python, libraries and files"""
RATIO = "ratio: the first system's value divided by this one's, round by round"


@dataclass(frozen=True)
class Measure:
    """A line of the table: one of the figures of one case."""

    title: str
    case: Case
    figure: str


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The median and the range of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        if self.lowest == self.highest:
            return three_digits(self.median)
        lowest, highest = three_digits(self.lowest), three_digits(self.highest)
        return f"{three_digits(self.median)} ({lowest} to {highest})"


def three_digits(value: float) -> str:
    """0.98765 -> "0.988"; all digits of a longer whole part: 1234.5 -> "1,234"."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".removesuffix(".")


@dataclass(frozen=True)
class Line:
    """One system's figure; where it is not the first system's, beside that."""

    dtype: str
    measure: str
    system: str
    value: Spread
    ratio: Spread | None = None  # the first system's value divided by this one's
    differs_from: int | None = None  # the first new token, counted from 1, that is another


# -- what to measure


def measures(
    dtype: str, rows: Sequence[int], prompt_tokens: int, max_tokens: int, long_prompt: int
) -> list[Measure]:
    """What is shown of one number format: decoding so many rows, and one row's long prompt."""
    decodes = [
        Case(dtype=dtype, rows=count, prompt_tokens=prompt_tokens, max_tokens=max_tokens)
        for count in rows
    ]
    prefill = Case(dtype=dtype, rows=1, prompt_tokens=long_prompt, max_tokens=1)
    first, prompt = decodes[0], f"prompt of {prompt_tokens}"
    return [
        *(
            Measure(f"decode, {case.rows_text}, tokens/s", case, "decode_tokens_per_second")
            for case in decodes
        ),
        Measure(f"prefill, {long_prompt} tokens, tokens/s", prefill, "prefill_tokens_per_second"),
        Measure(f"first token, {first.rows_text}, {prompt}, ms", first, "first_token_milliseconds"),
        Measure(f"peak memory, {first.rows_text}, MB", first, "peak_memory_megabytes"),
    ]


# -- what was found


def lines(measures: Sequence[Measure], found: Sequence[Measurement]) -> list[Line]:
    """A line for each measure and each system that was measured, the first system's first."""
    systems = list(dict.fromkeys(each.system for each in found))
    return [
        line(measure, systems[0], system, found)
        for measure in measures
        for system in systems
        if by_round(found, system, measure.case)
    ]


def by_round(found: Sequence[Measurement], system: str, case: Case) -> list[Figures]:
    """A system's figures in one case, in the order of the rounds."""
    return [each.figures for each in found if (each.system, each.case) == (system, case)]


def line(measure: Measure, first: str, system: str, found: Sequence[Measurement]) -> Line:
    """One system's figure over the rounds, and how the first system's compares."""
    ours, theirs = (by_round(found, name, measure.case) for name in (first, system))
    values = [figures[measure.figure] for figures in theirs]
    name = f"{system}, compiled" if theirs[0].get("compiled") else system
    value = Spread.of(values)
    if system == first:
        return Line(measure.case.dtype, measure.title, name, value)
    ratio = paired_ratio([figures[measure.figure] for figures in ours], values)
    pairs = zip(ours, theirs, strict=True)
    places = [first_difference(one["tokens"], other["tokens"]) for one, other in pairs]
    differs_from = min((place for place in places if place is not None), default=None)
    return Line(measure.case.dtype, measure.title, name, value, ratio, differs_from)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Of rounds in which both were measured: one divided by the other, round by round."""
    return Spread.of([one / other for one, other in zip(ours, theirs, strict=True)])


def first_difference(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int | None:
    """The first token, counted from 1, in which any row differs; None where none does."""
    places = [
        place
        for one, other in zip(ours, theirs, strict=True)
        for place, (a, b) in enumerate(zip(one, other, strict=True), start=1)
        if a != b
    ]
    return min(places, default=None)


def render(lines: Sequence[Line]) -> str:
    """The table as text, with what its words mean; ratios are shown where something is compared."""
    rows = [("dtype", "measure", "system", "value", "ratio", "same tokens")]
    for line in lines:
        beside = ("", "")
        if line.ratio is not None:
            same = "yes" if line.differs_from is None else f"differ from token {line.differs_from}"
            beside = (str(line.ratio), same)
        rows.append((line.dtype, line.measure, line.system, str(line.value), *beside))
    compared = any(line.ratio is not None for line in lines)
    shown = 6 if compared else 4
    table = columns([row[:shown] for row in rows], "<" * shown)
    return "\n".join([*table, "", LEGEND, *([RATIO] if compared else [])])
