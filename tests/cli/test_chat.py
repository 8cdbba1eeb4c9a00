"""`gptsmith chat`: a line a turn where nobody types, and in a real terminal where somebody does."""

import codecs
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gptsmith
from gptsmith import GPTConfig
from gptsmith.cli.main import main
from gptsmith.generation.writing import generate_greedy
from gptsmith.tokenizers import byte_tokenizer
from gptsmith.tokenizers.chat import ALPACA, open_template, with_template
from tests.conftest import TINY, scrambled, until

FLAGS = "--temperature 0 --max-tokens 6 --compile no --threads 1".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers, though with nothing sensible."""
    place = tmp_path_factory.mktemp("chat") / "tuned"
    model = scrambled(GPTConfig(**(TINY | {"vocab_size": 257, "context_length": 400})))
    gptsmith.save(model, with_template(byte_tokenizer(), ALPACA), place)
    return place


def chat(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: str,
    folder: Path,
    *flags: str,
) -> tuple[int, str, str]:
    """Pipe lines to the command; the status, and what it wrote to stdout and stderr."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), "ascii"))
    status = main(["chat", str(folder), *FLAGS, *flags])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_each_line_is_a_turn_and_only_answers_are_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = chat(monkeypatch, capsys, "Hello\n\nÄnd then?\n", folder)
    model, tokenizer = gptsmith.load(folder)
    assert tokenizer is not None
    template = open_template(folder, tokenizer)
    assert template is not None
    messages, expected = [], ""
    for text in ("Hello", "Änd then?"):
        messages.append({"role": "user", "content": text})
        ids = template.ids(messages)
        new = generate_greedy(model, torch.tensor([ids]), 6)[0, len(ids) :].tolist()
        messages.append({"role": "assistant", "content": tokenizer.decode(new)})
        expected += tokenizer.decode(new) + "\n"
    assert (status, out) == (0, expected)
    assert (
        err.splitlines() == ["(cut: the answer reached --max-tokens or the end of the context)"] * 2
    )


def test_commands(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    lines = f"/system Be kind.\nHello\n/save {first}\nMore\n/save {first}\n/reset\n/system\n Anew\n"
    status, out, err = chat(monkeypatch, capsys, f"{lines}/save {second}\n/help\n", folder)
    assert status == 0, err
    rows = [json.loads(path.read_text(encoding="utf-8"))["messages"] for path in (first, second)]
    said = [[(each["role"], each["content"]) for each in row] for row in rows]
    assert [role for role, _ in said[0]] == ["system", *["user", "assistant"] * 2]
    assert [text for role, text in said[0] if role != "assistant"] == ["Be kind.", "Hello", "More"]
    assert [role for role, _ in said[1]] == ["user", "assistant"]
    assert said[1][0][1] == "Anew"
    assert out == "".join(t + "\n" for row in said for role, t in row if role == "assistant")
    assert f"5 messages written to {first}" in err
    assert "Ctrl-C stops an answer" in err


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("/sav x\n", "there is no command '/sav', did you mean '/save'? (/help shows them all)"),
        ("/save\n", "/save needs the name of a file, and something that was said"),
        ("Hi\n/save model.txt\n", "model.txt exists already: choose another name"),
        ("Hi\n/save no/where\n", "No such file or directory"),
        ("x" * 400 + "\n", "but the model's context_length is 400: shorten it"),
        ("a \ufdd0\n", "a message has a noncharacter, such as U+FDD0: remove it"),
    ],
)
def test_mistakes_end_a_pipe_in_one_line(
    lines: str,
    told: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.txt").write_text("precious", encoding="utf-8")
    status, _, err = chat(monkeypatch, capsys, lines, folder)
    assert status == 2
    last = err.splitlines()[-1]
    assert last.startswith("gptsmith: ")
    assert told in last
    assert [path.name for path in tmp_path.iterdir()] == ["model.txt"]
    assert Path("model.txt").read_text(encoding="utf-8") == "precious"


def test_the_oldest_messages_leave_and_a_line_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = chat(monkeypatch, capsys, ("y" * 60 + "\n") * 5, folder)
    assert status == 0
    assert re.search(r"\(the context is full: the oldest [24] messages were dropped\)", err)


def test_a_model_without_a_template_names_finetune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = scrambled(GPTConfig(**(TINY | {"vocab_size": 257})))
    gptsmith.save(model, byte_tokenizer(), tmp_path / "plain")
    status, out, err = chat(monkeypatch, capsys, "Hello\n", tmp_path / "plain")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "has no chat template" in err
    assert f"gptsmith finetune {tmp_path}/plain --data DATA" in err


class Terminal:
    """The command in a terminal of its own, 80 columns wide."""

    def __init__(self, *words: str) -> None:
        import pty

        self.mine, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptsmith", "chat", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=environment,
            start_new_session=True,
            # Whoever runs the tests in the background lets them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        self.screen, self.decoder = "", codecs.getincrementaldecoder("utf-8")("replace")

    def see(self, text: str, seconds: float = 120) -> str:
        """Wait until a text is shown, without colours; what was shown up to it."""
        end = time.monotonic() + seconds
        while text not in (plain := re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.screen)):
            assert time.monotonic() < end, f"no {text!r} in {plain!r}"
            if select.select([self.mine], [], [], 0.2)[0]:
                self.read()
        before, _, rest = plain.partition(text)
        self.screen = rest
        return before

    def read(self) -> None:
        """Read what is there, or wait for it."""
        self.screen += self.decoder.decode(os.read(self.mine, 4096))

    def type(self, keys: str) -> None:
        os.write(self.mine, keys.encode())

    def interrupt(self) -> None:
        """Send what Ctrl-C sends, once the process waits for a key: a signal that comes between
        the prompt and that would be noticed with the next key only."""
        time.sleep(0.2)
        state = Path(f"/proc/{self.process.pid}/stat")
        until(lambda: state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "S")
        self.process.send_signal(signal.SIGINT)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    flags = "--temperature 0 --max-tokens 300 --compile no --threads 1".split()
    terminal = Terminal(str(folder), *flags)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.mine)


@pytest.mark.slow
def test_a_talk_in_a_terminal(terminal: Terminal) -> None:
    assert "400 tokens of context; /help shows the commands" in terminal.see("Ctrl-D leaves")
    terminal.see("> ")
    terminal.type("/hepl\n")
    assert "did you mean '/help'?" in terminal.see("(/help shows them all)")
    terminal.see("> ")
    terminal.type("Hellp\x7fo\\\n")  # an edited line that goes on in another
    terminal.see("… ")
    terminal.type("there\n")
    terminal.see("there")
    shown = terminal.see("(cut: the answer reached")
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", shown)  # the model wrote such
    terminal.see("> ")
    terminal.type("\x1b[A")  # the line above
    terminal.see("there")
    terminal.type("\n/reset\n")
    terminal.see("a new conversation")
    terminal.see("> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_twice_leaves(folder: Path, terminal: Terminal) -> None:
    terminal.see("> ")
    terminal.type("Go on\n")
    terminal.see("Go on")
    while len(terminal.screen) < 40:
        terminal.read()
    terminal.process.send_signal(signal.SIGINT)
    terminal.see("(stopped)")
    terminal.see("> ")
    terminal.interrupt()
    terminal.see("Ctrl-C again, or Ctrl-D, leaves")
    terminal.see("> ")
    terminal.interrupt()
    assert terminal.process.wait(60) == 0
