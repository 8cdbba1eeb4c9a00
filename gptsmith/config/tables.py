"""Format figures for a terminal: aligned columns and units.

Knows nothing of models; returns text and does not print it.
"""

from collections.abc import Iterable, Sequence

WIDTH = 88  # columns of a page


def columns(rows: Sequence[tuple[str, ...]], layout: str, *, gap: int = 2) -> list[str]:
    """Format rows as lines, with columns aligned left (`<`) or right (`>`) as `layout` says."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    cells = [f"{{:{side}{width}}}" for side, width in zip(layout, widths, strict=True)]
    return [(" " * gap).join(cells).format(*row).rstrip() for row in rows]


def flushed(line: str, figure: str) -> str:
    """Return a line whose figure ends at the right edge of the page."""
    return f"{line} {figure:>{max(0, WIDTH - len(line) - 1)}}"


def figures(rows: Iterable[tuple[str, str, str]]) -> list[str]:
    """Return a line for each name, with what it is, and its figure at the right edge."""
    return [flushed(f"  {name:<20}{what}", figure) for name, what, figure in rows]


def shape_text(shape: Sequence[object]) -> str:
    """(2304, 768) -> "(2304, 768)"; a vector is "(768)"."""
    return f"({', '.join(map(str, shape))})"


def human_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    return _scaled(count, 1024, ("bytes", "KiB", "MiB", "GiB", "TiB"))


def human_flops(count: float) -> str:
    """284_800_000 -> "284.8 MFLOP"."""
    return _scaled(count, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def three_digits(value: float) -> str:
    """0.98765 -> "0.988"; all digits of a longer whole part: 1234.5 -> "1,234"."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".removesuffix(".")


def spread(median: float, lowest: float, highest: float) -> str:
    """(2.5, 1, 3) -> "2.50 (1.00 to 3.00)"; one value alone is "2.50"."""
    if lowest == highest:
        return three_digits(median)
    return f"{three_digits(median)} ({three_digits(lowest)} to {three_digits(highest)})"


def _scaled(count: float, step: int, units: tuple[str, ...]) -> str:
    *smaller, unit = units
    for smaller_unit in smaller:
        if count < step:
            unit = smaller_unit
            break
        count /= step
    return f"{count:.0f} {unit}" if count == int(count) else f"{count:.1f} {unit}"
