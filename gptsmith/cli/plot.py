"""The verb that draws the curves of runs: plot."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.fields import at_least, setting
from .flags import Parser, add_flags, chosen


@dataclass(frozen=True, kw_only=True)
class PlotSettings:
    """What is drawn, and where the plot is written."""

    out: Path = setting(Path("loss.png"), "PNG file to write", metavar="FILE")
    x: Literal["steps", "tokens", "seconds", "flops"] = setting("steps", "horizontal axis")
    metric: str | None = setting(
        None, "field of metrics.jsonl to draw, as grad_norm (default: both losses)", metavar="NAME"
    )
    smooth: int | None = setting(
        None, "moving average over about N steps; 1: none (default: chosen for a single run)"
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "smooth")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith plot`."""
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or a folder of runs"
    )
    add_flags(parser, PlotSettings)


def run(options: Namespace) -> None:
    """Plot the loss curves of runs, or another of their metrics, into one PNG."""
    settings = chosen(options, PlotSettings)
    from ..config.recipe import read_toml
    from ..training.curves import draw_curves, with_costs
    from ..training.records import CONFIG_TOML, METRICS, read_metrics

    curves = {}
    for folder in [folder for name in options.runs for folder in runs_at(Path(name), METRICS)]:
        label = folder.name if folder.name not in curves else str(folder)
        curves[label] = read_metrics(folder / METRICS)
        if (folder / CONFIG_TOML).is_file():
            curves[label] = with_costs(curves[label], read_toml(folder / CONFIG_TOML))
    x, metric, smooth = settings.x, settings.metric, settings.smooth
    draw_curves(curves, settings.out, x=x, metric=metric, smooth=smooth)
    print(settings.out)


def runs_at(folder: Path, metrics: str) -> list[Path]:
    """Return the folder if it is a run, or the runs in it; `metrics` is the file that they have."""
    if (folder / metrics).is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob(f"*/{metrics}"))
    if not inside:
        raise FileNotFoundError(f"{folder} has no {metrics}: it is not the folder of a run")
    return inside
