"""C++ files are compiled again when what they are made from changes."""

from pathlib import Path

import pytest

from gptsmith.machine.native import open_library


@pytest.mark.usefixtures("own_cache")
def test_a_changed_header_is_compiled(tmp_path: Path) -> None:
    """Also one that another header includes."""
    source = tmp_path / "source.cpp"
    source.write_text('#include "outer.h"\nextern "C" int answer() { return ANSWER; }\n')
    (tmp_path / "outer.h").write_text('#include "inner.h"\n')
    for answer in (6, 7):
        (tmp_path / "inner.h").write_text(f"#define ANSWER {answer}\n")
        assert open_library(source).answer() == answer
