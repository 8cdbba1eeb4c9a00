"""Draw what was measured, as PNG files.

Shapes:  N documents    T tokens (the context length)    K labels
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..machine.environment import keep_fonts
from ..machine.files import renamed_once_written
from .classification import Confusion
from .result import Comparison, Evaluation

POINTS = 400  # of a curve; more documents are averaged
LONGEST_SHOWN = 24  # characters of a label
MOST_NUMBERED = 20  # labels; the cells of a larger matrix are too small for numbers
LEGIBLE = 32  # positions of which each has a mark
RARE = 0.1  # of the most targets at a position; with a stride, only the first window has them all


@contextmanager
def drawn(path: Path, width: float, height: float) -> Iterator[Any]:
    """Yield a figure of this size in inches, and write it to a PNG file, whole or not at all."""
    keep_fonts()
    from matplotlib.figure import Figure  # half a second to import; no window, no global state

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    with renamed_once_written(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def plain(axes: Any, **labels: str) -> None:
    """Name the axes, and leave out what is no data."""
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def literal(name: str) -> str:
    """Return a name in which matplotlib finds no mathematics."""
    return name.replace("$", r"\$")


def draw_positions(evaluations: Mapping[str, Evaluation], path: Path) -> None:
    """Draw the loss of each model against the number of tokens before the predicted one."""
    with drawn(path, 8, 4.5) as figure:
        axes = figure.add_subplot()
        for name, found in evaluations.items():
            assert found.by_position is not None
            nats, targets = found.by_position
            there = np.flatnonzero(targets > RARE * targets.max())
            axes.plot(
                there + 1,
                nats[there] / targets[there],
                label=f"{literal(name)}, mean {found.loss:.4f}",
                linewidth=1.2,
                marker="o" if len(there) <= LEGIBLE else None,
                markersize=3.5,
            )
        plain(axes, xlabel="tokens of context", ylabel="loss (nats per token)")
        axes.legend(frameon=False)


def draw_differences(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draw both models of each comparison by document, and their differences, sorted."""
    with drawn(path, 11, 4.2 * len(comparisons)) as figure:
        rows = figure.subplots(len(comparisons), 2, squeeze=False)
        for each, (left, right) in zip(comparisons, rows, strict=True):
            draw_both(left, {each.name: each.found, each.other_name: each.other})
            draw_sorted(right, each)
            right.set_title(f"{literal(each.name)} less {literal(each.other_name)}", fontsize=10)


def draw_both(axes: Any, evaluations: Mapping[str, Evaluation]) -> None:
    """Draw the bits per byte of each model by document, in the order of the text."""
    unit = "document"
    for name, found in evaluations.items():
        assert found.documents is not None
        sizes = found.documents.bytes
        if found.documents.block_bytes:
            unit = f"block of {found.documents.block_bytes:,} bytes"
        step = math.ceil(len(sizes) / POINTS)
        starts = np.arange(0, len(sizes), step)
        bits = np.add.reduceat(found.bits_by_document * sizes, starts)
        bits /= np.add.reduceat(sizes, starts)
        axes.plot(starts + (step + 1) / 2, bits, label=literal(name), linewidth=1.0)
    many = f" (means of {step:,})" if step > 1 else ""
    plain(axes, xlabel=f"{unit}{many}, in the order of the text", ylabel="bits per byte")
    axes.legend(frameon=False)


def draw_sorted(axes: Any, comparison: Comparison) -> None:
    """Draw the sorted differences by document, their mean and its interval."""
    differences = np.sort(comparison.differences)
    mean, low, high = comparison.interval
    share = (np.arange(len(differences)) + 0.5) / len(differences)
    assert comparison.found.documents is not None
    unit = "blocks" if comparison.found.documents.block_bytes else "documents"
    axes.fill_between(share, differences, where=differences < 0, color="C2", alpha=0.35)
    axes.fill_between(share, differences, where=differences > 0, color="C3", alpha=0.35)
    axes.plot(share, differences, color="black", linewidth=1.0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axhspan(low, high, color="C0", alpha=0.25, linewidth=0)
    label = f"mean {mean:+.4f}, 95% interval {low:+.4f} to {high:+.4f}"
    axes.axhline(mean, color="C0", linewidth=1.4, label=label)
    lower = float((differences < 0).mean())
    plain(
        axes,
        xlabel=f"share of the {unit}, sorted ({100 * lower:.0f}% below zero)",
        ylabel="difference (bits per byte)",
    )
    axes.set_xlim(0, 1)
    if not differences.any():
        axes.set_ylim(-1, 1)
    axes.legend(frameon=False)


def draw_confusion(confusion: Confusion, path: Path) -> None:
    """Draw the matrix: a row for each wanted label, shaded by its share of the row."""
    matrix, K = confusion.matrix, len(confusion.labels)
    size = min(16.0, 3.2 + 0.62 * K)
    shares = matrix / np.maximum(1, matrix.sum(1, keepdims=True))
    names = [
        label if len(label) <= LONGEST_SHOWN else label[: LONGEST_SHOWN - 1] + "…"
        for label in confusion.labels
    ]
    upright = K <= 4 and max(map(len, names)) <= 10
    with drawn(path, size + 0.8, size) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, ax=axes, label="share of the row", shrink=0.8)
        axes.set_xticks(range(K), map(literal, names), rotation=0 if upright else 90)
        axes.set_yticks(range(K), map(literal, names))
        axes.set_xlabel("given label")
        axes.set_ylabel("wanted label")
        axes.set_title(f"accuracy {confusion.accuracy:.4f} of {confusion.texts:,} texts")
        for row, column in np.ndindex(matrix.shape) if K <= MOST_NUMBERED else ():
            color = "white" if shares[row, column] > 0.5 else "black"
            number = f"{matrix[row, column]:,}"
            axes.text(column, row, number, ha="center", va="center", color=color)
