"""The command that brings a model from another format: import."""

from argparse import Namespace
from pathlib import Path

from ..machine.environment import return_freed_memory
from .export import READABLE, add_common, choices, show
from .flags import Parser


def add_import(parser: Parser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a file or folder of another format, or gpt2[-medium|...]"
    )
    parser.add_argument("out", metavar="OUT", help="the new folder")
    parser.add_argument(
        "--from", dest="format", metavar="FORMAT", help=f"instead of looking at SOURCE: {READABLE}"
    )
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="gpt2, byte, none, a folder or a meta.pkl"
    )
    add_common(parser, "float32|fp16|bf16")


def import_(options: Namespace) -> None:
    """Bring a model from another format into a folder of our own."""
    from ..convert import import_model

    return_freed_memory()
    report = import_model(
        Path(options.source),
        Path(options.out),
        format=options.format,
        tokenizer=options.tokenizer,
        **choices(options),
    )
    show(report, options)
