"""What a run does on a simulated Windows, whose files cannot be replaced while they are open."""

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from gptsmith.cli.main import main
from gptsmith.config.recipe import short_name
from gptsmith.machine.files import file_written_whole, write_text, written_whole
from tests.conftest import TOY
from tests.machine.windows import simulated_windows

pytestmark = pytest.mark.system("linux", "simulates Windows")

TEXT = "".join(f"Line {i}: die Füchse → {i * i} ☃.\n" for i in range(60))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8", newline="\n")
    monkeypatch.chdir(tmp_path)


def run(line: str, status: int = 0) -> str:
    """Run a command; what it said on both streams."""
    streams = [stream.buffer for stream in (sys.stdout, sys.stderr)]
    for stream in streams:
        stream.seek(0)
        stream.truncate()
    found = main(line.split())
    sys.stdout.flush()
    said = b"".join(stream.getvalue() for stream in streams).decode("utf-8")
    assert found == status, f"{line}: {said}"
    return said


@simulated_windows()
def test_it_refuses_what_windows_refuses() -> None:
    handle = os.open("text.txt", os.O_RDONLY)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fsync(handle)
    with pytest.raises(PermissionError):
        Path("text.txt").unlink()
    os.close(handle)
    mapped = np.memmap("text.txt", np.uint8, "r")
    with pytest.raises(PermissionError):
        Path("text.txt").replace("other.txt")
    del mapped
    for name in ("a:b", "NUL", "aux.txt", "ends.", "what?"):
        with pytest.raises(OSError, match="not valid") as refused:
            Path(name).write_text("", encoding="utf-8")
        assert refused.value.errno == errno.EINVAL
    with pytest.raises(UnicodeEncodeError):
        Path("snow.txt").write_text("☃")
    with pytest.raises(UnicodeEncodeError):
        print("☃", flush=True)


@simulated_windows()
def test_the_file_layer() -> None:
    for text in ("one\n", "two\n"):
        write_text(Path("file"), text)
        assert Path("file").read_bytes() == text.encode()
    with written_whole(Path("folder")) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_bytes(b"3")
    assert '"inner/file"' in Path("folder/manifest.json").read_text(encoding="utf-8")
    with file_written_whole(Path("whole")) as temporary:
        temporary.write_bytes(b"4")
    assert {each.name for each in Path().iterdir()} == {"text.txt", "file", "folder", "whole"}


@pytest.mark.slow
@simulated_windows()
def test_training_and_using_a_model() -> None:
    run(f"train text.txt {TOY} --steps 6 --stop-after 4 --evaluate-every 1 --keep 1 --out run")
    run("train --resume run --log-every 1")
    assert len([*Path("run/checkpoints").iterdir()]) <= 2
    for name in ("config.toml", "metrics.jsonl", "events.jsonl", "samples.md", "last"):
        assert b"\r" not in Path("run", name).read_bytes(), name
    run("sample run --max-tokens 3 --seed 1 --threads 1 --prompt →☃")
    run("evaluate run --data text.txt --threads 1")
    run("plot run")
    run("export run theirs --to nanogpt")  # which is read from a memory map before it is renamed


@simulated_windows()
def test_a_run_that_fails_leaves_no_folder() -> None:
    """Not even one whose data was read."""
    write_text(Path("gpt2.txt"), "word " * 400)
    run("prepare gpt2.txt --out data --validation-fraction 0")
    assert "was made with another tokenizer" in run(f"train data {TOY} --out new/run", 2)
    assert not Path("new").exists()


@simulated_windows()
def test_names_that_windows_cannot_have() -> None:
    run("prepare text.txt --tokenizer char:→☃.:FLdefhiknsxü0123456789?*<>/ --unknown skip")
    assert [each.name for each in Path("data").iterdir()] == [
        "text-char-→☃.-FLdefhiknsxü0123456789-----"
    ]
    assert short_name("notes/aux.v2") == "aux-v2"
