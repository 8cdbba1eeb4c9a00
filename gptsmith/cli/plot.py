"""The verb that draws the loss curves of runs: plot."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ..config.fields import setting
from .flags import Parser, add_flags, chosen


@dataclass(frozen=True, kw_only=True)
class PlotSettings:
    """Where the plot is written."""

    out: Path = setting(Path("loss.png"), "PNG file to write", metavar="FILE")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith plot`."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    add_flags(parser, PlotSettings)


def run(options: Namespace) -> None:
    """Plot the loss curves of runs into one PNG."""
    settings = chosen(options, PlotSettings)
    from ..training.records import METRICS, draw_curves, read_metrics

    curves = {}
    for name in options.runs:
        path = Path(name) / METRICS
        if not path.is_file():
            raise FileNotFoundError(f"{name} has no {METRICS}: it is not the folder of a run")
        label = Path(name).name if Path(name).name not in curves else name
        curves[label] = read_metrics(path)
    draw_curves(curves, settings.out)
    print(settings.out)
