"""Curves of runs as a PNG: the losses, or another field of metrics.jsonl, by steps or what they
cost.

Knows nothing of folders; a run is its records, and a name.
"""

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ..config.cost import flops_per_token
from ..config.fields import suggestion
from ..config.settings import RunSettings
from ..machine.environment import keep_fonts
from ..machine.files import replace

Record = Mapping[str, Any]

# What a curve can be drawn by: a field of a record, after `with_costs`, and its label.
AXES = {
    "steps": ("step", "step"),
    "tokens": ("tokens", "tokens"),
    "seconds": ("seconds", "seconds of training, without evaluation"),
    "flops": ("flops", "FLOPs of training"),
}
LOSSES = ("loss", "validation_loss")


def with_costs(records: Sequence[Record], settings: RunSettings) -> list[dict[str, Any]]:
    """Return a run's records, each with the tokens and the FLOPs of training up to its step.

    Records of older versions do not have their tokens, which are then those of whole batches.
    """
    batch, flops = settings.training.batch_tokens, flops_per_token(settings.model, training=True)
    tokens = [record.get("tokens", record["step"] * batch) for record in records]
    return [
        {**record, "tokens": count, "flops": count * flops}
        for record, count in zip(records, tokens, strict=True)
    ]


def smoothed(values: Sequence[float], memory: float) -> list[float]:
    """Return the exponential moving average over about `memory` values, corrected for bias."""
    average, weight, out = 0.0, 0.0, []
    keep = 1 - 1 / max(1.0, memory)
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        out.append(average / weight)
    return out


def draw_curves(
    runs: Mapping[str, Sequence[Record]],
    path: Path,
    *,
    x: str = "steps",
    metric: str | None = None,
    smooth: int | None = None,
) -> None:
    """Draw a curve for each run, by name, into a PNG file: its losses, or the field `metric`.

    Of the losses, training is thin, and validation marked; a single run's accuracies on tasks have
    an axis of their own on the right. `x` is one of AXES; `smooth` averages
    over about so many steps (default: a fiftieth of a single run's). ValueError where no record has
    what is to be drawn, FileNotFoundError where the folder does not exist.
    """
    keep_fonts()
    from matplotlib.figure import Figure  # half a second to import; no window, no global state

    if not path.parent.is_dir():
        raise FileNotFoundError(f"no folder {path.parent} for {path.name}: create it first")
    check_drawable([record for records in runs.values() for record in records], x, metric)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, records) in zip(count(), runs.items(), strict=False):
        label, color = name if len(runs) > 1 else "", f"C{number}"
        if metric is None:
            draw_losses(axes, label, records, color, AXES[x][0], smooth)
        else:
            draw_metric(axes, label, records, color, AXES[x][0], metric, smooth)
    axes.set_xlabel(AXES[x][1])
    axes.set_ylabel("loss (nats per token)" if metric is None else metric.replace("_", " "))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if metric is None and len(runs) == 1:
        draw_accuracies(axes, next(iter(runs.values())), AXES[x][0])
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    focus(axes, LOSSES if metric is None else {metric} & {*LOSSES}, runs)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(temporary, format="png", dpi=120)
        replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_drawable(records: Sequence[Record], x: str, metric: str | None) -> None:
    """Raise ValueError if no record has the field to draw and the one to draw it by."""
    field, by = metric or "loss", AXES[x][0]
    if metric is not None and not any(is_number(record.get(metric)) for record in records):
        numbers = (name for record in records for name, value in record.items() if is_number(value))
        known = [name for name in dict.fromkeys(numbers) if name != "step"]
        hint = suggestion(metric, known)
        raise ValueError(
            f"there is no metric '{metric}'{hint} (these runs have {', '.join(known)})"
        )
    if all(record.get(field) is None for record in records):
        raise ValueError("there is nothing to plot yet: no step has a loss")
    if not any(by in record for record in records if record.get(field) is not None):
        raise ValueError(f"these runs do not record {x}: choose another x")


def is_number(value: Any) -> bool:
    """Whether a value of a record can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def points(records: Sequence[Record], by: str, field: str) -> tuple[list[float], list[float]]:
    """Return the two coordinates of the records that have both fields."""
    found = [r for r in records if r.get(field) is not None and r.get(by) is not None]
    return [r[by] for r in found], [r[field] for r in found]


def draw_losses(
    axes: Any, name: str, records: Sequence[Record], color: str, by: str, smooth: int | None
) -> None:
    """Draw one run's losses; `name` is empty where it is the only run."""
    label = f"{name}: " if name else ""
    place, losses = points(records, by, "loss")
    axes.plot(place, losses, color=color, alpha=0.2, linewidth=0.8)
    if smooth or not name:
        average = smoothed(losses, smooth or len(losses) / 50)
        about = f"{label}training (smoothed)" if smooth != 1 else f"{label}training"
        axes.plot(place, average, color=color, linewidth=1.2, label=about)
    held_out = [r for r in records if r.get("validation_loss") is not None]
    if not held_out:
        return
    best = min(held_out, key=lambda r: r["validation_loss"])
    axes.plot(
        *points(records, by, "validation_loss"),
        color=color if name else "C1",
        linestyle="--" if name and smooth else "-",
        marker="o",
        markersize=3.5,
        linewidth=1.6,
        label=f"{label}validation, best {best['validation_loss']:.4f} at step {best['step']:,}",
    )


def draw_accuracies(axes: Any, records: Sequence[Record], by: str) -> None:
    """Draw a run's accuracies on the files of `--evaluate-tasks`, if it has any."""
    names = dict.fromkeys(name for r in records for name in r if name.endswith("_accuracy"))
    if not names:
        return
    right = axes.twinx()
    right.set_ylim(0, 1)
    right.set_ylabel("accuracy (dotted)")
    right.spines["top"].set_visible(False)
    for number, name in enumerate(names, 2):
        style: dict[str, Any] = {"linestyle": ":", "marker": "s", "markersize": 3.5}
        right.plot(*points(records, by, name), color=f"C{number}", **style)
        label = name.removesuffix("_accuracy") + " accuracy"
        axes.plot([], [], color=f"C{number}", **style, label=label)  # in the one legend


def draw_metric(
    axes: Any,
    name: str,
    records: Sequence[Record],
    color: str,
    by: str,
    metric: str,
    smooth: int | None,
) -> None:
    """Draw one field of a run: marked where only some steps have it, as those of evaluations."""
    place, values = points(records, by, metric)
    style: dict[str, Any] = {"linewidth": 1.4, "label": name or None}
    if 2 * len(values) < len(records):
        style |= {"marker": "o", "markersize": 3.5}
    if smooth is not None and smooth > 1:
        axes.plot(place, values, color=color, alpha=0.2, linewidth=0.8)
        values = smoothed(values, smooth)
    axes.plot(place, values, color=color, **style)


def focus(axes: Any, fields: Any, runs: Mapping[str, Sequence[Record]]) -> None:
    """Cut off the highest losses, those of the first steps, which would flatten the rest."""
    losses = sorted(
        record[key]
        for records in runs.values()
        for record in records
        for key in fields
        if record.get(key) is not None
    )
    if not losses:
        return
    low, high = losses[0], losses[int(0.98 * (len(losses) - 1))]
    margin = 0.05 * max(high - low, 0.1)
    axes.set_ylim(low - margin, high + margin)
