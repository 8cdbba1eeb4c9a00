"""Read an HTML page of the package, with the colours and fonts that all of its pages share.

Knows nothing of what a page shows. Each page is one file that loads no other, so that the shared
style is put into its own.
"""

from pathlib import Path

SHARED_STYLE = Path(__file__).with_name("pages.css")
MARK = "/* pages.css */\n"  # where a page has the shared style


def read_page(path: Path) -> str:
    """Return the text of a page, with the shared style in place of its mark."""
    text = path.read_text(encoding="utf-8")
    assert text.count(MARK) == 1, f"{path} has no {MARK.strip()}, or several"
    return text.replace(MARK, SHARED_STYLE.read_text(encoding="utf-8"))
