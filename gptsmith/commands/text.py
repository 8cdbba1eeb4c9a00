"""The commands that make tokens of text: prepare and tokenizer."""

from argparse import Namespace
from pathlib import Path

from ..flags import Parser, add_flags, given
from ..recipe import convert, updated
from ..settings import PrepareSettings
from .words import SOURCE_HELP, short_name, tell


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
    from ..training.progress import Display, duration

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
    from ..folder import written_whole
    from ..tokenizers import learn_bpe

    settings = updated(PrepareSettings(), given(options, PrepareSettings), "tokenizer")
    size = convert("vocab_size", options.vocab_size, int)
    sources = [source for source in find_sources(options.sources) if source.size]
    if not sources:
        raise ValueError(f"there is no text in {', '.join(options.sources)}: it is empty")
    learned = learn_bpe(texts(sources, settings), size)
    with written_whole(Path(options.out)) as folder:
        learned.save(folder)
    tell(f"{learned.vocab_size:,} tokens; use it with: --tokenizer {options.out}")
    print(options.out)
