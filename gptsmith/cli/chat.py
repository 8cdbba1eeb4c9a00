"""The verb to talk with a model: chat."""

import io
import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import at_least, setting, suggestion
from ..config.settings import InferenceSettings, SamplingSettings
from ..machine.environment import use_huge_pages
from ..machine.files import write_text
from ..machine.terminal import Display, count, tell
from .flags import Parser, add_flags, chosen
from .main import one_line
from .opening import MODEL_HELP, open_writer

HELP = """\
/system TEXT  set what the model is told first; without TEXT, drop it
/reset        forget the conversation, but for the system's message
/save FILE    write the conversation as a row of data for `gptsmith finetune`
/help         show these lines
Ctrl-C stops an answer, Ctrl-D leaves.
A line that ends with \\ goes on in the next one.
To send a message that begins with /, begin it with a space."""
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How to talk."""

    system: str | None = setting(None, "what the model is told before the conversation")
    max_tokens: int = setting(256, "maximum number of tokens of an answer")
    seed: int | None = setting(
        None,
        "random seed; the same seed and messages give the same answers (default: a random one)",
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "max_tokens")
        at_least(self, 0, "seed")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith chat`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_flags(parser, ChatSettings)
    add_flags(parser, SamplingSettings)
    add_flags(parser, InferenceSettings)


def run(options: Namespace) -> None:
    """Talk with a model in the terminal. Where standard input is no terminal, each of its lines is
    a message, and only the answers are written."""
    settings = chosen(options, ChatSettings)
    use_huge_pages()
    folder, model, tokenizer, decoder = open_writer(options, options.model)
    from ..generation.conversation import Conversation
    from ..tokenizers.chat import open_template

    template = open_template(folder, tokenizer)
    if template is None:
        raise ValueError(
            f"{options.model} has no chat template, so it has not learned to answer: "
            f"`gptsmith finetune {options.model} --data DATA` teaches it, and "
            "`gptsmith sample` continues a text"
        )
    seed = settings.seed
    conversation = Conversation(
        model,
        tokenizer,
        template,
        system=settings.system,
        max_tokens=settings.max_tokens,
        seed=int.from_bytes(os.urandom(4), "little") if seed is None else seed,
        sampling=chosen(options, SamplingSettings),
        decoder=decoder,
    )
    Chat(conversation).run(options.model)


class Chat:
    """Reads messages and commands, and shows answers; everything else goes to stderr."""

    def __init__(self, conversation: Any) -> None:
        self.conversation = conversation
        self.live = sys.stdin is not None and sys.stdin.isatty()  # somebody types
        self.seen = sys.stdout.isatty()  # somebody reads
        self.display = Display()
        self.saved: Path | None = None
        self.commands: dict[str, Callable[[str], None]] = {
            "/system": self.instruct,
            "/reset": self.reset,
            "/save": self.save,
            "/help": lambda _: self.note(HELP),
        }

    def run(self, name: str) -> None:
        """Talk until the input ends."""
        if self.live:
            context = f"{self.conversation.limit:,} tokens of context"
            self.note(f"{name}, {context}; /help shows the commands, Ctrl-D leaves\n")
        for line in self.typed_lines() if self.live else piped_lines():
            try:
                self.take(line)
            except (ValueError, OSError) as error:
                if not self.live:
                    raise
                self.display.say(one_line(error), "red")
            if self.live and self.seen and line.strip():
                print(flush=True)

    def note(self, text: str) -> None:
        """Say something beside the conversation."""
        self.display.say(text, "dim")

    # -- what is typed

    def typed_lines(self) -> Iterator[str]:
        """Yield what is typed until Ctrl-D, or Ctrl-C twice; a line that ends with a backslash
        goes on in the next one."""
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 (with it, `input` edits lines and recalls them)
        interrupted = False
        while True:
            try:
                line = self.typed("> ")
                while line.endswith("\\"):
                    line = line[:-1] + "\n" + self.typed("… ")
                interrupted = False
            except (EOFError, KeyboardInterrupt) as end:
                tell("")
                if interrupted or isinstance(end, EOFError):
                    return
                interrupted = True
                self.note("Ctrl-C again, or Ctrl-D, leaves")
            else:
                yield line

    def typed(self, prompt: str) -> str:
        """Return a line, asked for in colour where the terminal has colours."""
        if not self.seen:  # the answers go to a file, where the prompt has no place
            print(prompt, end="", file=sys.stderr, flush=True)
            return input()
        if self.display.console.color_system:
            # Between \1 and \2 is what takes no space, so that readline knows where the cursor is.
            prompt = f"\1\033[1;36m\2{prompt}\1\033[0m\2"
        return input(prompt)

    def take(self, line: str) -> None:
        """Obey a command, or answer a message."""
        name, _, rest = line.partition(" ")
        if not name.startswith("/"):
            if line.strip():
                self.answer(line.strip())
        elif name in self.commands:
            self.commands[name](rest.strip())
        else:
            hint = suggestion(name, self.commands)
            raise ValueError(f"there is no command '{name}'{hint} (/help shows them all)")

    def answer(self, message: str) -> None:
        """Show the answer to a message while it is generated, until Ctrl-C if somebody types."""
        talk = self.conversation
        with interrupts(self.live) as stopped:
            pieces = talk.answer(message)
            for number, piece in enumerate(pieces):
                if number == 0 and talk.forgotten:
                    forgotten = count(talk.forgotten, "message")
                    self.note(f"(the context is full: the oldest {forgotten} were dropped)")
                print(visible(piece) if self.seen else piece, end="", flush=True)
                if stopped:
                    break
            pieces.close()
        print(flush=True)
        if stopped:
            self.note("(stopped)")
        elif talk.finish == "length":
            self.note("(cut: the answer reached --max-tokens or the end of the context)")

    # -- commands

    def instruct(self, text: str) -> None:
        """Set what the model is told first."""
        self.conversation.instruct(text or None)
        self.note("the system's message is set" if text else "there is no system's message now")

    def reset(self, _: str) -> None:
        """Begin a new conversation."""
        self.conversation.reset()
        self.note("a new conversation")

    def save(self, name: str) -> None:
        """Write the conversation as a row of examples; an earlier one of this talk is replaced."""
        path, talk = Path(name).expanduser(), self.conversation
        if not name or not talk.turns:
            raise ValueError("/save needs the name of a file, and something that was said")
        if path.exists() and path != self.saved:
            raise ValueError(f"{path} exists already: choose another name")
        write_text(path, json.dumps({"messages": talk.messages}, ensure_ascii=False) + "\n")
        self.saved = path
        self.note(f"{count(len(talk.messages), 'message')} written to {path}")


def piped_lines() -> Iterator[str]:
    """Yield the lines of standard input, in UTF-8 whatever the locale."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")
    for line in sys.stdin or ():
        yield line.rstrip("\r\n")


@contextmanager
def interrupts(wanted: bool) -> Iterator[list[int]]:
    """Collect Ctrl-C in a list, so that it does not raise within a step; a second one raises."""
    found: list[int] = []
    if not wanted:
        yield found
        return

    def note(number: int, _: Any) -> None:
        if found:
            raise KeyboardInterrupt
        found.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)


def visible(text: str) -> str:
    """Return a text without control characters, by which a model could move the cursor."""
    return text.translate(CONTROLS)
