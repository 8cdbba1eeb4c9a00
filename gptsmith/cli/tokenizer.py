"""The command that learns a byte-level BPE from text: tokenizer."""

from argparse import Namespace
from pathlib import Path

from ..config.recipe import parse_value, updated
from ..config.settings import PrepareSettings
from ..machine.terminal import tell
from .flags import Parser, add_flags, given
from .opening import SOURCE_HELP


def add_tokenizer(parser: Parser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    parser.add_argument(
        "--vocab-size", metavar="N", required=True, help="number of tokens to learn"
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder to make")
    add_flags(parser, PrepareSettings, without=("unknown", "validation_fraction", "shard_tokens"))


def tokenizer(options: Namespace) -> None:
    """Learn a byte-level BPE from text."""
    from ..data.prepare import texts
    from ..data.sources import find_sources
    from ..machine.files import written_whole
    from ..tokenizers import learn_bpe

    settings = updated(PrepareSettings(), given(options, PrepareSettings), "tokenizer")
    size = parse_value("vocab_size", options.vocab_size, int)
    sources = [source for source in find_sources(options.sources) if source.size]
    if not sources:
        raise ValueError(f"there is no text in {', '.join(options.sources)}: it is empty")
    learned = learn_bpe(texts(sources, settings), size)
    with written_whole(Path(options.out)) as folder:
        learned.save(folder)
    tell(f"{learned.vocab_size:,} tokens; use it with: --tokenizer {options.out}")
    print(options.out)
