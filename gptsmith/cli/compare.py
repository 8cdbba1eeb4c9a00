"""The verb that compares runs: compare."""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ..config.fields import setting
from .flags import Parser, add_flags, chosen


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """How the table is sorted, and where it is written."""

    sort: str = setting(
        "best_loss",
        "figure or setting to sort by, the best first: best_loss, last_loss, bits_per_byte, "
        "accuracy, tokens, seconds, tokens_per_second, name, or a setting that differs",
        metavar="NAME",
    )
    csv: Path | None = setting(None, "also write a CSV file, a line for each run", metavar="FILE")
    html: Path | None = setting(
        None, "also write a page with the tables and the loss curves", metavar="FILE"
    )
    json: bool = setting(False, "write JSON in place of the tables")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith compare`."""
    help = "folder of a run, or a folder of runs, as a sweep makes"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=help)
    add_flags(parser, CompareSettings)


def run(options: Namespace) -> None:
    """Compare runs in a table: the settings that differ, losses, tokens and time, and means with
    intervals where runs differ in their seeds only."""
    settings = chosen(options, CompareSettings)
    from ..machine.files import write_text
    from ..training.compare import compare_runs
    from ..training.comparison_page import to_csv, to_html, to_json, to_text

    for path in filter(None, (settings.csv, settings.html)):
        if not path.parent.is_dir():
            raise FileNotFoundError(f"no folder {path.parent} for {path.name}: create it first")
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name a file in it")
    found = compare_runs(options.runs, sort=settings.sort)
    if settings.csv is not None:
        write_text(settings.csv, to_csv(found))
    if settings.html is not None:
        write_text(settings.html, to_html(found))
    print(json.dumps(to_json(found), indent=2) if settings.json else to_text(found))
