"""The verb that turns text into token shards: prepare."""

import shlex
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ..config.fields import setting
from ..config.recipe import short_name
from ..config.settings import PrepareSettings
from ..machine.terminal import Display, count, duration, size, tell
from .flags import Parser, add_flags, chosen
from .opening import SOURCE_HELP


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The tokenizer, and where the dataset is written."""

    tokenizer: str = setting(
        "gpt2",
        "tokenizer: gpt2, char, char:ABC (these characters), byte or a folder with a "
        "tokenizer.json",
        metavar="gpt2|char|byte|FOLDER",
    )
    out: Path | None = setting(None, "new folder (default: data/NAME-TOKENIZER)", metavar="DIR")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith prepare`."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    add_flags(parser, TargetSettings)
    add_flags(parser, PrepareSettings)


def run(options: Namespace) -> None:
    """Turn text into token shards for training."""
    target, settings = chosen(options, TargetSettings), chosen(options, PrepareSettings)
    from ..checkpoint.finding import best_of
    from ..data.prepare import prepare
    from ..data.shards import Dataset

    name = f"{short_name(options.sources[0])}-{short_name(target.tokenizer)}"
    out = target.out or Path("data") / name
    tokenizer, display = best_of(target.tokenizer), Display()
    seconds = 0.0
    try:
        for progress in prepare(options.sources, tokenizer, out, options=settings):
            display.preparing(progress.bytes_done, progress.bytes_total, progress.tokens)
            seconds = progress.seconds
    finally:
        display.close_bar()
    dataset = Dataset.open(out)
    if dropped := dataset.info.get("dropped"):
        lost = f"{count(dropped['documents'], 'document')}, {size(dropped['bytes'])} of text"
        tell(f"dropped exact repeats of earlier documents: {lost}")
    held_out = 0 if dataset.validation is None else len(dataset.validation)
    tell(
        f"{len(dataset.train):,} training tokens and {held_out:,} validation tokens, in "
        f"{duration(seconds)}; train with: gptsmith train {shlex.quote(str(out))}"
    )
    print(out)
