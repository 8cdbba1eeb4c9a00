"""The verb that learns a byte-level BPE from text: tokenizer."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config.fields import REQUIRED, setting
from ..config.settings import PrepareSettings
from ..machine.shell import typed
from ..machine.terminal import Display, size, tell
from .flags import Parser, add_flags, chosen
from .opening import SOURCE_HELP


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """What is learned, and where it goes."""

    vocab_size: int = setting(
        REQUIRED, "number of tokens, including the 256 bytes and <|endoftext|>"
    )
    out: Path = setting(REQUIRED, "new folder", metavar="DIR")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith tokenizer`."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    add_flags(parser, TokenizerSettings)
    others = ("unknown", "validation_fraction", "deduplicate", "workers", "shard_tokens")
    add_flags(parser, PrepareSettings, without=others)


def run(options: Namespace) -> None:
    """Learn a byte-level BPE tokenizer from text."""
    settings, text = chosen(options, TokenizerSettings), chosen(options, PrepareSettings)
    from ..data.sources import find_sources
    from ..data.split import Reader
    from ..machine.files import written_whole
    from ..tokenizers import learn_bpe

    sources = [source for source in find_sources(options.sources) if source.size]
    if not sources:
        raise ValueError(f"there is no text in {', '.join(options.sources)}: it is empty")
    display, total = Display(), sum(source.size for source in sources)

    def texts() -> Iterator[str]:
        reader = Reader(sources, text)
        display.open_bar("reading", total)
        for passage in reader.passages():
            yield passage.text
            display.move_bar(reader.read, f"{size(reader.read)} of {size(total)}")
        display.open_bar(f"learning {settings.vocab_size:,} tokens", None)

    try:
        learned = learn_bpe(texts(), settings.vocab_size)
    finally:
        display.close_bar()
    with written_whole(settings.out) as folder:
        learned.save(folder)
    place = typed(settings.out)
    tell(f"{learned.vocab_size:,} tokens; use them with: --tokenizer {place}")
    print(settings.out)
