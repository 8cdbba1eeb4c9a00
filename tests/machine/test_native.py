"""C++ files are compiled again when what they are made from changes."""

import shutil
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


@pytest.mark.system("posix", "runs a script by its first line")
@pytest.mark.usefixtures("own_cache")
def test_a_compiler_without_openmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Apple's clang."""
    compiler = tmp_path / "clang++"
    refusal = "case $* in *-fopenmp*) echo unsupported option >&2; exit 1; esac"
    compiler.write_text(f'#!/bin/sh\n{refusal}\nexec {shutil.which("c++")} "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    source = tmp_path / "source.cpp"
    source.write_text('#ifndef _OPENMP\nextern "C" int threads() { return 1; }\n#endif\n')
    with pytest.warns(UserWarning, match=r"has no OpenMP: source\.cpp runs in one thread"):
        assert open_library(source).threads() == 1
    source.write_text("this is no C++")
    with pytest.raises(ValueError, match=r"clang\+\+ could not compile source\.cpp: .*error"):
        open_library(source)
