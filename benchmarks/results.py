"""What the benchmarks share: results that outlive an interruption, and figures over rounds.

Knows nothing of what is measured.
"""

import argparse
import json
import os
import signal
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = str(Path(__file__).resolve().parents[1])
sys.path.insert(0, ROOT)  # a machine with a GPU may have the checkout and not the package

from gptsmith.config.tables import spread  # noqa: E402

Row = dict[str, Any]


class Results:
    """A file to which each result is added as a line of JSON as soon as it is there."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[Row]()
        self.run = datetime.now(UTC).isoformat(timespec="seconds")  # tells runs in a file apart
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: Row) -> None:
        """Keep a result, in the file and in `rows`."""
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run": self.run, **row}) + "\n")


def parser(text: str | None) -> argparse.ArgumentParser:
    """A parser for a program with this docstring, with the flag --out."""
    known = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    known.add_argument(
        "--out",
        type=Path,
        default=Path(f"{Path(sys.argv[0]).stem}.jsonl"),
        help="file to which each result is added as it comes (default: %(default)s)",
    )
    return known


def carry_out(main: Callable[[], None]) -> None:
    """Run a program: a mistake is one line and status 2, and what a signal ends is 128 + it."""

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    others = filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *others])  # for the processes it starts
    signal.signal(signal.SIGTERM, leave)  # as an exception, so that what was started is ended too
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted: what was measured so far is kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def over(values: Iterable[float]) -> str:
    """The median and the range: "2.50 (1.00 to 3.00)"; "-" where there is nothing."""
    known = list(values)
    return spread(statistics.median(known), min(known), max(known)) if known else "-"


def ratios(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours divided by theirs, of each round that has both: a round measures them side by side."""
    return [ours[round] / theirs[round] for round in ours if round in theirs]
