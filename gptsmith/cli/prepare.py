"""The command that turns text into token shards: prepare."""

from argparse import Namespace
from pathlib import Path

from ..config.recipe import updated
from ..config.settings import PrepareSettings
from ..machine.terminal import tell
from .flags import Parser, add_flags, given
from .opening import SOURCE_HELP, short_name


def add_prepare(parser: Parser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument(
        "--tokenizer",
        default="gpt2",
        metavar="gpt2|char|byte|FOLDER",
        help="how text becomes ids (default: gpt2)",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder to make (default: data/NAME-TOKENIZER)"
    )
    add_flags(parser, PrepareSettings)


def prepare(options: Namespace) -> None:
    """Turn text into token shards for training."""
    from ..data.prepare import prepare
    from ..data.shards import Dataset
    from ..machine.terminal import Display, duration

    settings = updated(PrepareSettings(), given(options, PrepareSettings), "prepare")
    name = f"{short_name(options.sources[0])}-{short_name(options.tokenizer)}"
    out = Path(options.out) if options.out else Path("data") / name
    display = Display()
    seconds = 0.0
    try:
        for progress in prepare(options.sources, options.tokenizer, out, options=settings):
            display.preparing(progress.bytes_done, progress.bytes_total, progress.tokens)
            seconds = progress.seconds
    finally:
        display.close_bar()
    dataset = Dataset.open(out)
    held_out = 0 if dataset.validation is None else len(dataset.validation)
    tell(
        f"{len(dataset.train):,} tokens to learn from and {held_out:,} held out, "
        f"in {duration(seconds)}; train with: gptsmith train {out}"
    )
    print(out)
