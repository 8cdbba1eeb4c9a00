"""The door: a table of commands, and what a mistake looks like.

Exits 0, 2 for a mistake (one line says what was got, what was wanted and what to do), or 128 + N
after signal N.
"""

import errno
import os
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from .. import __version__
from ..config.fields import suggestion
from ..machine.environment import share_cores
from ..machine.terminal import tell
from .bench import add_bench, bench
from .describe import add_describe, describe
from .evaluate import add_evaluate, evaluate
from .export import add_export, export
from .flags import Parser, UsageError
from .import_ import add_import, import_
from .plot import add_plot, plot
from .prepare import add_prepare, prepare
from .quantize import add_quantize, quantize
from .sample import add_sample, sample
from .serve import add_serve, serve
from .tokenizer import add_tokenizer, tokenizer
from .train import add_train, train


class Verb(NamedTuple):
    """A command: what it does, its flags, and what carries it out (and may return an exit code)."""

    summary: str
    add: Callable[[Parser], None]
    run: Callable[[Namespace], int | None]


VERBS = {
    "prepare": Verb("turn text into token shards", add_prepare, prepare),
    "tokenizer": Verb("learn a byte-level BPE from text", add_tokenizer, tokenizer),
    "train": Verb("train a model, or go on training it", add_train, train),
    "sample": Verb("let a model write", add_sample, sample),
    "evaluate": Verb("measure a model's loss on a text", add_evaluate, evaluate),
    "plot": Verb("draw the loss curves of runs", add_plot, plot),
    "describe": Verb("show a model's components, memory and FLOPs", add_describe, describe),
    "import": Verb("bring a model from another format", add_import, import_),
    "export": Verb("write a model in another format", add_export, export),
    "quantize": Verb("write a model in 8 or 4 bits, and what that costs", add_quantize, quantize),
    "serve": Verb("serve a model by OpenAI's API", add_serve, serve),
    "bench": Verb("measure how fast this machine trains and generates", add_bench, bench),
}


def overall_help() -> str:
    """What `gptsmith --help` says."""
    width = max(map(len, VERBS))
    rows = "\n".join(f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: gptsmith VERB ...\n\nGPT-2, whole: from a folder of text to a trained model, and "
        f"back to text.\n\n{rows}\n\n"
        "gptsmith VERB --help says more; --traceback shows where an error came from.\n"
        "A first run:  gptsmith train shakespeare"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Carry out a command line; the exit status: 0, 2 for a mistake, 128 + N after signal N."""
    arguments = list(sys.argv[1:] if words is None else words)
    with_traceback = "--traceback" in arguments
    open_closed()
    share_cores()
    arguments = [word for word in arguments if word != "--traceback"]
    try:
        with notes_to_stderr():
            return dispatch(arguments)
    except KeyboardInterrupt:
        tell("interrupted")
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_about_memory(error):
            raise
        if with_traceback:
            traceback.print_exc()
        tell(f"gptsmith: {one_line(error)}")
        return 2


def open_closed() -> None:
    """Open what we were started without, of standard output and error, lest a socket be taken for
    it: a new file gets the lowest number that is free."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def dispatch(words: list[str]) -> int:
    """Find the verb and carry it out."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(overall_help())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"gptsmith {__version__}")
        return 0
    name = words[0]
    if name not in VERBS:
        raise UsageError(
            f"no command '{name}'{suggestion(name, VERBS)} (known: {', '.join(VERBS)})"
        )
    verb = VERBS[name]
    parser = Parser(prog=f"gptsmith {name}", description=verb.run.__doc__)
    verb.add(parser)
    try:
        options = parser.parse(words[1:])
    except SystemExit:  # argparse leaves this way after --help
        return 0
    return verb.run(options) or 0


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
    """Whether PyTorch failed to allocate; it has no class for that on a CPU."""
    said = str(error)
    return any(word in said for word in ("t allocate memory", "size calculation overflowed"))


def one_line(error: BaseException) -> str:
    """An error in one line, with the file that a system error is about."""
    if isinstance(error, MemoryError | RuntimeError):
        return "not enough memory for this: use a smaller model, batch or request"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full: free some space and try again"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
