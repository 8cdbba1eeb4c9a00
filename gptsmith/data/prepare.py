"""Turn text into a folder of token shards, completely or not at all.

Knows nothing of how text is found (`sources.py`) and encoded (`encode.py`), or of what is in the
folder (`dataset_folder.py`).
"""

import shutil
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..config.settings import PrepareSettings
from ..machine.files import written_whole
from ..tokenizers import Tokenizer, char_tokenizer, open_tokenizer
from .dataset_folder import check_made_by, described, write_dataset
from .documents import text_bytes
from .repeats import (
    repeats_of_earlier,
)
from .shards import (
    Dataset,
    prepared_info,
)
from .sources import Source, find_sources
from .split import Reader, has_documents, split_rule

REPORT_SECONDS = 0.1  # between two reports of progress


class Progress(NamedTuple):
    """The progress of preparing; bytes that are read again, to learn from them, count again."""

    bytes_done: int
    bytes_total: int
    tokens: int
    seconds: float


def prepare(
    names: Sequence[str],
    tokenizer: Tokenizer | str,
    out: Path,
    *,
    options: PrepareSettings | None = None,
) -> Iterator[Progress]:
    """Turn sources into a dataset in the folder `out`, and yield the progress from time to time.

    `tokenizer` may be a name ("gpt2", "byte", a folder), or "char" for one that is learned from the
    whole text. The same arguments give the same bytes with any number of workers. If `out` was made
    with the same arguments, it is left unchanged; any other non-empty folder is refused. ValueError
    or OSError in one line, with nothing left behind.
    """
    yield from timed(preparing(names, tokenizer, Path(out), options or PrepareSettings()))


def timed(steps: Generator[tuple[int, int, int], None, None]) -> Iterator[Progress]:
    """Yield the progress from time to time, of steps that give bytes read, all bytes and tokens."""
    started = reported = time.monotonic()
    with closing(steps):  # so that it removes what it has written when we are interrupted
        for done, total, tokens in steps:
            now = time.monotonic()
            if done == total or now - reported >= REPORT_SECONDS:
                reported = now
                yield Progress(done, total, tokens, now - started)


def preparing(
    names: Sequence[str], tokenizer: Tokenizer | str, out: Path, options: PrepareSettings
) -> Generator[tuple[int, int, int], None, None]:
    """Do the work of `prepare`; yield bytes read, all bytes and tokens after every step."""
    if out.exists() and not (out.is_dir() and (prepared_info(out) or not any(out.iterdir()))):
        raise ValueError(f"{out} already exists: choose another --out, or remove it first")
    sources = sources_with_text(names, options)
    size = sum(source.size for source in sources)
    done, total = 0, size * (1 + (tokenizer == "char") + options.deduplicate)
    repeated = b""
    if options.deduplicate:
        comparing = Reader(sources, replace(options, validation_fraction=0.0))
        for _ in comparing.passages():
            yield comparing.read, total, 0
        repeated, done = repeats_of_earlier(comparing.counts.digests[False]), size
    if tokenizer == "char":
        characters: set[str] = set()
        for read in learning(sources, options, characters):
            yield done + read, total, 0
        tokenizer, done = char_tokenizer(characters), done + size
    elif isinstance(tokenizer, str):
        tokenizer = open_tokenizer(tokenizer)
    reader = Reader(sources, options, separator_for(tokenizer, sources), repeated)
    if info := prepared_info(out):
        sums = [source.sha256() for source in sources]
        rule = split_rule(sources, options, repeated)
        check_made_by(out, info, described(sources, options, rule, tokenizer), sums)
        there = Dataset.open(out)
        yield total, total, len(there.train) + len(there.validation or ())
        return
    check_disk(out, most_bytes(sources, tokenizer, options.field))
    tokens = 0
    with written_whole(out, manifest=False) as folder:
        for tokens in write_dataset(folder, reader, tokenizer):
            yield done + reader.read, total, tokens
    yield total, total, tokens


# -- before writing


def sources_with_text(names: Sequence[str], options: PrepareSettings) -> list[Source]:
    """Return the sources that are not empty; ValueError if there is none."""
    sources = [source for source in find_sources(names) if source.size]
    if not sources:
        raise ValueError(f"there is no text in {', '.join(names)}: it is empty")
    if options.field != "text" and not any(source.has_rows for source in sources):
        warnings.warn("--field has no effect: no source has rows", stacklevel=2)
    return sources


def learning(
    sources: Sequence[Source], options: PrepareSettings, characters: set[str]
) -> Iterator[int]:
    """Add the characters of all documents to a set; yield the bytes read so far."""
    reader = Reader(sources, options, "\n" if has_documents(sources) else "", rule="none")
    for passage in reader.passages():
        characters.update(passage.text)
        yield reader.read


def separator_for(tokenizer: Tokenizer, sources: Sequence[Source]) -> str:
    """Return the text that ends each document where the tokenizer has no token for it."""
    if tokenizer.document_end is not None or not has_documents(sources):
        return ""
    if tokenizer.kind == "char" and "\n" in tokenizer.vocab:
        return "\n"
    warnings.warn(
        "the tokenizer has no token for the end of a document: nothing separates the documents",
        stacklevel=2,
    )
    return ""


def most_bytes(sources: Sequence[Source], tokenizer: Tokenizer, field: str) -> int:
    """Return how many bytes the tokens of some sources take at most."""
    size = sum(text_bytes(source, field=field) for source in sources)
    most = size * np.dtype(tokenizer.dtype).itemsize  # a token for every byte
    # Of a BPE, fewer than one for every two bytes, in any text worth learning from.
    return most // 2 if tokenizer.kind == "bpe" else most


def check_disk(out: Path, most: int) -> None:
    """Raise OSError if so many bytes do not fit on the disk of `out`."""
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if most > free:
        raise OSError(
            f"{out} could need {most / 1e9:,.3f} GB, but {free / 1e9:,.3f} GB are free on its "
            "disk: free some space, or choose an --out on another"
        )
