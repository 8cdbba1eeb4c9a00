"""The page that shows an inspection: one HTML file, which loads nothing else."""

import json
from pathlib import Path
from typing import Any

from ..machine.pages import read_page

TEMPLATE = Path(__file__).with_name("page.html")
EMPTY = '<script id="data" type="application/json"></script>'


def page(facts: dict[str, Any]) -> str:
    """Return the page with what `report.to_json` says, as HTML."""
    # In JSON, "<" occurs only in strings, where it may be written so. It could end the element.
    data = json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c")
    return read_page(TEMPLATE).replace(EMPTY, EMPTY.replace("></", f">{data}</"))


def is_page(path: Path) -> bool:
    """Return whether a file is such a page."""
    start = TEMPLATE.read_text(encoding="utf-8")[:300]
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(start)) == start
