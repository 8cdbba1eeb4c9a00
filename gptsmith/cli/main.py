"""The command line: finds the verb, runs it, and reports mistakes in one line.

The exit status is 0, 2 after a mistake, or 128 + N after signal N.
"""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from keyword import iskeyword
from typing import Any

from .. import __version__
from ..config.fields import suggestion
from ..machine.environment import AnotherProcessFailedError, local_rank, share_cores
from ..machine.terminal import tell
from .flags import Parser, UsageError

# Each verb is a module of this package with `arguments(parser)` and `run(options)`. If its name is
# a Python keyword, the module's name ends with an underscore.
VERBS = {
    "prepare": "turn text into token shards",
    "tokenizer": "learn a byte-level BPE tokenizer from text",
    "train": "train a model, or resume a run",
    "finetune": "fine-tune a model on examples of answers, labels or preferences",
    "sample": "generate text",
    "chat": "talk with a model in the terminal",
    "classify": "label texts",
    "evaluate": "measure models on a text, and compare them",
    "sweep": "train a run for each of several settings, and compare them",
    "plot": "plot the loss curves of runs",
    "compare": "compare runs in a table: settings that differ, losses, time",
    "inspect": "look inside a model: attention, layers, and what wrote a token, as a page",
    "describe": "show a model's parameters, shapes, memory and FLOPs",
    "import": "import a model from another format",
    "export": "export a model to another format",
    "merge": "merge a LoRA adapter into its base model",
    "quantize": "quantize a model to 8 or 4 bits, and measure what it costs",
    "serve": "serve a model through OpenAI's API",
    "doctor": "report what this machine has, how fast it is, and what is missing",
    "bench": "measure how fast this machine trains and generates",
    "completion": "write a script that completes command lines in bash, zsh or fish",
}


def overall_help() -> str:
    """Return the text of `gptsmith --help`."""
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in VERBS.items())
    return (
        "usage: gptsmith VERB ...\n\nGPT-2 from a folder of text to a trained model, and back to "
        f"text.\n\n{rows}\n\n"
        "`gptsmith VERB --help` shows a verb's options. With --traceback, an error shows where in "
        "the code it happened.\nA first run:  gptsmith train shakespeare"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status: 0, 2 after a mistake, 128 + N after signal N."""
    arguments = list(sys.argv[1:] if words is None else words)
    with_traceback = "--traceback" in arguments
    set_up_streams()
    share_cores()
    arguments = [word for word in arguments if word != "--traceback"]
    try:
        with notes_to_stderr():
            status = dispatch(arguments)
        sys.stdout.flush()  # while an error can still be told
        return status
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except BrokenPipeError:  # the reader of our output has exited, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except AnotherProcessFailedError:
        return 2
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_about_memory(error):
            raise
        # Until they have joined, all processes make the same mistake, and one of each machine
        # reports it; later the first one that fails does, whose error has a note of its rank.
        if local_rank() > 0 and not hasattr(error, "__notes__"):
            return 2
        if with_traceback:
            traceback.print_exc()
        tell(f"gptsmith: {one_line(error)}")
        return 2
    finally:
        leave_streams()


def leave_streams() -> None:
    """Flush standard output and error; what cannot be written is dropped.

    Python would try again at its end, complain, and exit with 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, a reader that is gone; a closed stream
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def set_up_streams() -> None:
    """Make standard output and error UTF-8, and write to nowhere for one that was closed.

    Any other encoding lacks characters that a model may write. Names of files that are not UTF-8
    become the same bytes again.
    """
    for name, errors in (("stdout", "surrogateescape"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8", errors=errors))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def dispatch(words: list[str]) -> int:
    """Find the verb and run it."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overall_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"gptsmith {__version__}")
        return 0
    verb, parser = find_verb(words[0])
    try:
        options = parser.parse(words[1:])
    except SystemExit:  # argparse leaves this way after --help
        return 0
    with parser.naming_flags(options):
        return verb.run(options) or 0


def find_verb(name: str) -> tuple[Any, Parser]:
    """Return a verb's module and the parser of its arguments; UsageError for an unknown verb."""
    if name not in VERBS:
        known = ", ".join(VERBS)
        raise UsageError(f"there is no command '{name}'{suggestion(name, VERBS)} (known: {known})")
    verb: Any = import_module(f".{name}_" if iskeyword(name) else f".{name}", __package__)
    parser = Parser(prog=f"gptsmith {name}", description=verb.run.__doc__)
    verb.arguments(parser)
    return verb, parser


@contextmanager
def notes_to_stderr() -> Iterator[None]:
    """Show our own warnings as one line each, without the place in the code."""

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        tell(f"note: {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def is_about_memory(error: RuntimeError) -> bool:
    """Whether PyTorch failed to allocate memory; on a CPU it has no class for that error."""
    said = str(error)
    words = ("t allocate memory", "size calculation overflowed", "MPS backend out of memory")
    return any(word in said for word in words)


def one_line(error: BaseException) -> str:
    """Return an error as one line, with the file that a system error is about."""
    if isinstance(error, MemoryError | RuntimeError):
        return "there is not enough memory: use a smaller model, batch or request"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: free some space and try again"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
