"""A comparison of runs as text, CSV, JSON or one HTML page.

Returns text; what is compared, and how, is in `compare.py`.
"""

import base64
import csv
import io
import math
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from textwrap import shorten
from typing import Any

from ..config.tables import columns
from ..evaluation.intervals import Interval
from ..machine.pages import read_page
from .compare import AVERAGED, FIGURES, ComparedRun, Comparison, Group, figure_of, short_ends
from .curves import draw_curves
from .records import METRICS, read_metrics

Table = list[tuple[str, ...]]  # the headings, and the rows
TEMPLATE = Path(__file__).with_name("comparison.html")
LONGEST_STATE = 80  # characters of an error in a terminal; the files have it whole
MOST_DRAWN = 10  # runs, the best ones, whose curves a page shows


# -- the two tables


def runs_table(comparison: Comparison) -> Table:
    """Return a row for each run: its settings that differ, its figures, and its state."""
    rows = comparison.rows
    shown = [name for name in FIGURES if any(figure(row, name) != "-" for row in rows)]
    if all(row.run.best_loss is not None for row in rows if row.run.step):
        shown = [name for name in shown if name != "training_loss"]
    settings = setting_columns([row.settings for row in rows])
    headings = ("run", *settings, *(FIGURES[name][0] for name in shown), "state")
    cells = zip(*settings.values(), strict=True) if settings else [()] * len(rows)
    return [headings] + [
        (row.name, *own, *(figure(row, name) for name in shown), row.run.outcome)
        for row, own in zip(rows, cells, strict=True)
    ]


def seeds_table(comparison: Comparison) -> Table:
    """Return a row for each configuration: the means over its seeds, with 95% intervals."""
    groups = comparison.groups
    shown = [name for name in AVERAGED if any(name in group.means for group in groups)]
    settings = setting_columns([group.settings for group in groups])
    headings = (*settings, "seeds", *(FIGURES[name][0] for name in shown))
    cells = zip(*settings.values(), strict=True) if settings else [()] * len(groups)
    return [headings] + [
        (*own, seeds(group), *(mean(group.means.get(name), name) for name in shown))
        for group, own in zip(groups, cells, strict=True)
    ]


def setting_columns(settings: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the values of each setting as text; of paths, the ends that tell them apart."""
    found = {}
    for name in settings[0]:
        values = [setting_text(each[name]) for each in settings]
        paths = [value for value in values if "/" in value]
        ends = dict(zip(paths, short_ends(paths), strict=True)) if paths else {}
        found[name] = [ends.get(value, value) for value in values]
    return found


def setting_text(value: Any) -> str:
    """Return a setting's value as it is typed."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def figure(row: ComparedRun, name: str) -> str:
    """Return a figure of a run as it is shown: "-" if there is none."""
    value = figure_of(row, name)
    if value is None:
        return "-"
    return "not finite" if math.isnan(value) else format(value, FIGURES[name][1])


def seeds(group: Group) -> str:
    """Return how many seeds a mean is over, and of how many runs, if not all finished."""
    runs = len(group.rows)
    return str(runs) if group.seeds == runs else f"{group.seeds} of {runs}"


def mean(interval: Interval | None, name: str) -> str:
    """Return a mean and half the width of its interval: "1.7123 ± 0.0321"."""
    if interval is None:
        return "-"
    digits = FIGURES[name][1]
    half = "" if math.isnan(interval.high) else f" ± {interval.high - interval.mean:{digits}}"
    return f"{interval.mean:{digits}}{half}"


# -- as text, CSV, JSON and HTML


def to_text(comparison: Comparison) -> str:
    """Return the tables for a terminal."""
    table = [(*row[:-1], shorten(row[-1], LONGEST_STATE)) for row in runs_table(comparison)]
    parts = [text_table(table, left=(0, -1))]
    if comparison.has_seeds:
        title = "Means over seeds, with 95% intervals (Student's t):\n"
        parts.append(title + text_table(seeds_table(comparison)))
    return "\n\n".join([*parts, *comparison.notes])


def text_table(table: Table, left: tuple[int, ...] = ()) -> str:
    """Return a table as aligned lines, numbers to the right."""
    layout = [">"] * len(table[0])
    for column in left:
        layout[column] = "<"
    return "\n".join(columns(table, "".join(layout)))


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return the comparison as JSON has it, where null stands for what a run does not have."""
    number = {id(row): n for n, group in enumerate(comparison.groups) for row in group.rows}
    return {
        "differing": comparison.differing,
        "runs": [run_json(row, number[id(row)]) for row in comparison.rows],
        "groups": [
            {
                "group": n,
                "settings": group.settings,
                "runs": [str(row.run.folder) for row in group.rows],
                "seeds": group.seeds,
                **{name: interval_json(each) for name, each in group.means.items()},
            }
            for n, group in enumerate(comparison.groups)
        ],
        "notes": comparison.notes,
    }


def run_json(row: ComparedRun, group: int) -> dict[str, Any]:
    """Return one run for JSON."""
    run = row.run
    figures = {name: without_nan(getattr(run, name)) for name in FIGURES}
    state = {"state": run.state, "error": run.error, "step": run.step}
    steps = {"steps": run.settings.training.steps, "seed": run.settings.training.seed}
    place = {"run": str(run.folder), "group": group}
    return {**place, **state, **steps, "settings": row.settings, **figures}


def interval_json(interval: Interval) -> dict[str, Any]:
    """Return a mean for JSON, with its interval where there is one."""
    bounds = None if math.isnan(interval.low) else [interval.low, interval.high]
    return {"mean": interval.mean, "interval": bounds}


def without_nan(value: Any) -> Any:
    """Return None for NaN, which JSON does not have, and any other value as it is."""
    return None if isinstance(value, float) and math.isnan(value) else value


def to_csv(comparison: Comparison) -> str:
    """Return a line for each run, with the mean and interval of its group's best losses."""
    found = to_json(comparison)
    lines = []
    for run in found["runs"]:
        group = found["groups"][run["group"]]
        best = group.get("best_loss", {"mean": None, "interval": None})
        low, high = best["interval"] or (None, None)
        means = {"seeds": group["seeds"], "mean_loss": best["mean"]}
        bounds = {"interval_low": low, "interval_high": high}
        settings = run.pop("settings")
        lines.append({**run, **settings, **means, **bounds})
    file = io.StringIO()
    writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def to_html(comparison: Comparison) -> str:
    """Return one page with the tables and the curves of the losses."""
    parts = ["<h1>Comparison of runs</h1>", html_table(runs_table(comparison), "runs")]
    if comparison.has_seeds:
        parts += ["<h2>Means over seeds</h2>", "<p>With 95% intervals (Student's t).</p>"]
        parts.append(html_table(seeds_table(comparison), "seeds"))
    parts += [f"<p>{escape(note)}</p>" for note in comparison.notes]
    if picture := curves(comparison.rows[:MOST_DRAWN]):
        source = base64.b64encode(picture).decode()
        several = f" of the first {MOST_DRAWN} runs" if len(comparison.rows) > MOST_DRAWN else ""
        parts += [
            f"<h2>Losses{several}</h2>",
            f'<div class="wide"><img alt="losses" src="data:image/png;base64,{source}"></div>',
        ]
    return Template(read_page(TEMPLATE)).substitute(body="\n".join(parts))


def html_table(table: Table, kind: str) -> str:
    """Return a table as HTML; `kind` is its class."""
    head, *rows = table
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return f'<div class="wide"><table class="{kind}">\n' + "\n".join(lines) + "\n</table></div>"


def curves(rows: Sequence[ComparedRun]) -> bytes | None:
    """Return the loss curves of runs as a PNG; None where no run has a loss."""
    found = {
        row.name: read_metrics(row.run.folder / METRICS)
        for row in rows
        if row.run.training_loss is not None or row.run.best_loss is not None
    }
    if not found:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "curves.png"
        draw_curves(found, path)
        return path.read_bytes()
