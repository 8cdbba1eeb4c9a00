"""The command that draws the loss curves of runs: plot."""

from argparse import Namespace
from pathlib import Path

from .flags import Parser


def add_plot(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", default="loss.png", metavar="FILE", help="default: loss.png")


def plot(options: Namespace) -> None:
    """Draw the loss curves of runs into one PNG."""
    from ..training.records import draw_curves, read_metrics

    curves = {}
    for name in options.runs:
        path = Path(name) / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{name} has no metrics.jsonl: it is not the folder of a run")
        label = Path(name).name if Path(name).name not in curves else name
        curves[label] = read_metrics(path)
    draw_curves(curves, Path(options.out))
    print(options.out)
