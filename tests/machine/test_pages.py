"""The HTML pages share one table of colours and fonts, and are each one file."""

import re
from pathlib import Path

import pytest

import gptsmith
from gptsmith.machine.pages import MARK, SHARED_STYLE, read_page

PACKAGE = Path(gptsmith.__file__).parent
PAGES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.html"))]
SHARED = SHARED_STYLE.read_text(encoding="utf-8")


def defined(text: str) -> list[str]:
    """The variables of CSS that a rule for the whole page has values for."""
    rules = re.findall(r"^:root \{\n(.*?)^\}", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^ +(--[\w-]+):", "".join(rules), flags=re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_the_shared_style_once(name: str) -> None:
    page = read_page(PACKAGE / name)
    assert SHARED in page[page.index("<style>") : page.index("</style>")]
    assert MARK not in page
    names = defined(page)
    assert {*defined(SHARED)} <= {*names}
    assert len(names) == len({*names})
    assert page.count("light-dark(#eaedeb") == 1


@pytest.mark.parametrize("name", PAGES)
def test_every_colour_and_font_that_a_page_uses_is_defined(name: str) -> None:
    page = read_page(PACKAGE / name)
    used = {*re.findall(r"var\((--[\w-]+)\)", page)}  # those with a default may be left out
    assert used
    own = {*re.findall(r"(--[\w-]+)(?=: |\")", page)}  # set elsewhere in the page, as by its script
    assert used <= {*defined(page)} | own


def test_a_file_without_the_mark_is_no_page(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<style></style>")
    with pytest.raises(AssertionError, match=r"a\.html has no /\* pages\.css \*/, or several"):
        read_page(tmp_path / "a.html")
