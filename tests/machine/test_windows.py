"""What a run does on a simulated Windows, whose files cannot be replaced while they are open."""

import errno
import os
import shlex
import signal
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gptsmith.cli.main import main
from gptsmith.config.recipe import short_name
from gptsmith.machine.files import file_written_whole, write_text, written_whole
from gptsmith.machine.shell import typed
from gptsmith.serving.http import UvicornServer, listen, listen_at, url
from gptsmith.training.loop import Trainer
from gptsmith.training.run_process import RunProcess
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
def test_training_and_using_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Ctrl-Break in the fourth step."""
    step = Trainer.step

    def interrupted(trainer: Trainer, number: int) -> Any:
        if number == 3:
            signal.raise_signal(signal.SIGBREAK)  # type: ignore[attr-defined]
        return step(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        line = f"train text.txt {TOY} --steps 6 --evaluate-every 1 --keep 1 --out run"
        said = run(line, 128 + signal.SIGBREAK)  # type: ignore[attr-defined]
    assert "Stopped and saved after 4 of 6 steps" in said
    run("train --resume run --log-every 1")
    assert len([*Path("run/checkpoints").iterdir()]) <= 2
    for name in ("config.toml", "metrics.jsonl", "events.jsonl", "samples.md", "last"):
        assert b"\r" not in Path("run", name).read_bytes(), name
    run("sample run --max-tokens 3 --seed 1 --threads 1 --prompt →☃")
    run("evaluate run --data text.txt --threads 1")
    run("plot run")
    run("export run theirs --to nanogpt")  # which is read from a memory map before it is renamed


@pytest.mark.slow
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


@simulated_windows()
def test_a_server_has_neither_paths_nor_hang_ups() -> None:
    with pytest.raises(ValueError, match="Windows has no sockets at paths; use --port"):
        listen_at(Path("socket"))
    with listen("127.0.0.1", 0) as bound:
        assert url(bound).startswith("http://127.0.0.1:")

    async def app(*_: Any) -> None:
        """Not asked."""

    with UvicornServer(app, drain=0).capture_signals():
        assert signal.getsignal(signal.SIGINT) != signal.default_int_handler


def test_a_sweep_sends_its_runs_what_windows_can_send(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    process: Any = SimpleNamespace(send_signal=sent.append)
    child = RunProcess("01", Path("01"), 1.0, 0.0, process)
    child.send_signal(signal.SIGINT)
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", 1, raising=False)
    child.send_signal(signal.SIGINT)
    assert sent == [signal.SIGINT, 1]


def test_an_advised_command_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows knows double quotes only, and its paths need none for a backslash."""
    words = ["gptsmith", "train", "--resume"]
    assert shlex.split(typed(*words, "my runs/it's")) == [*words, "my runs/it's"]
    monkeypatch.setattr(os, "name", "nt")
    assert typed(*words, PureWindowsPath("C:/runs/plays-1")) == (
        r"gptsmith train --resume C:\runs\plays-1"
    )
    assert typed(*words, PureWindowsPath("C:/my runs/plays-1")) == (
        r'gptsmith train --resume "C:\my runs\plays-1"'
    )
