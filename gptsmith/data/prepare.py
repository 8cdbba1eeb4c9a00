"""Turn text into a folder of token shards, completely or not at all.

Knows nothing of how text is found (`sources.py`) and encoded (`encode.py`), or of the file format
(`tokenfile.py`).
"""

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..config.settings import PrepareSettings
from ..machine.environment import checked_threads
from ..machine.files import write_json, written_whole
from ..tokenizers import Tokenizer, char_tokenizer, open_tokenizer
from .documents import read_documents, text_bytes
from .encode import SplitText, encode_all
from .shards import DATASET_FORMAT, DATASET_VERSION, INFO, Dataset, prepared_info
from .sources import Source, find_sources
from .tokenfile import ShardWriter, dtype_for

REPORT_SECONDS = 0.1  # between two reports of progress


class Progress(NamedTuple):
    """The progress of preparing; if characters are learned first, all bytes count twice."""

    bytes_done: int
    bytes_total: int
    tokens: int
    seconds: float


class ProgressClock:
    """Decides when to report progress again."""

    def __init__(self, total: int) -> None:
        self.total = total  # bytes
        self.started = self.reported = time.monotonic()

    def due(self) -> bool:
        """Return whether it is time to report again."""
        if time.monotonic() - self.reported < REPORT_SECONDS:
            return False
        self.reported = time.monotonic()
        return True

    def report(self, done: int, tokens: int) -> Progress:
        """Return the progress after `done` bytes."""
        return Progress(done, self.total, tokens, time.monotonic() - self.started)


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
    out, options = Path(out), options or PrepareSettings()
    if out.exists() and not (out.is_dir() and (prepared_info(out) or not any(out.iterdir()))):
        raise ValueError(f"{out} already exists: choose another --out, or remove it first")
    sources = [source for source in find_sources(names) if source.size]
    if not sources:
        raise ValueError(f"there is no text in {', '.join(names)}: it is empty")
    size = sum(source.size for source in sources)
    clock = ProgressClock(2 * size if tokenizer == "char" else size)
    if tokenizer == "char":
        characters: set[str] = set()
        for text, read in read_texts(sources, options):
            characters.update(text)
            if clock.due():
                yield clock.report(read, 0)
        tokenizer = char_tokenizer(characters)
    elif isinstance(tokenizer, str):
        tokenizer = open_tokenizer(tokenizer)
    if out.exists() and (there := made_before(out, sources, tokenizer, options)):
        tokens = len(there.train) + (0 if there.validation is None else len(there.validation))
        yield clock.report(clock.total, tokens)
        return
    check_disk(out, sources, tokenizer, options.field)
    tokens = 0
    with written_whole(out, manifest=False) as folder:
        for read, tokens in write_dataset(folder, sources, tokenizer, options):
            if clock.due():
                yield clock.report(clock.total - size + read, tokens)
    yield clock.report(clock.total, tokens)


def texts(sources: Sequence[Source], options: PrepareSettings) -> Iterator[str]:
    """Yield all text of the sources, in order, a megabyte or a row at a time."""
    for text, _ in read_texts(sources, options):
        yield text


def read_texts(sources: Sequence[Source], options: PrepareSettings) -> Iterator[tuple[str, int]]:
    """Yield all text of the sources, and the bytes read so far."""
    before = 0
    for source in sources:
        for chunk in read_documents(source, field=options.field, encoding=options.encoding):
            yield chunk.text, before + chunk.read
        before += source.size


# -- the split, and checks before writing


def split_rule(sources: Sequence[Source], fraction: float) -> tuple[str, str]:
    """Return the rule that chooses the validation text, and a sentence that explains it.

    Whole documents are held out if there are rows or enough files; else the tail of each document.
    """
    if fraction == 0:
        return "none", "nothing is held out"
    held_out = math.floor(len(sources) * fraction + 0.5)
    if any(source.has_rows for source in sources) or 0 < held_out < len(sources):
        return "documents", (
            f"document i, counted from 0 in the order of the sources, is held out where "
            f"floor((i + 1) * {fraction} + 0.5) > floor(i * {fraction} + 0.5)"
        )
    return "tail", (
        f"the last {fraction:.4g} of the bytes of each document is held out: from byte "
        f"int(size * (1 - {fraction})), moved forward to the start of a character"
    )


def is_held_out(number: int, fraction: float) -> bool:
    """Return whether document `number`, from 0, is held out; these are evenly spaced."""
    return math.floor((number + 1) * fraction + 0.5) > math.floor(number * fraction + 0.5)


def described(
    sources: Sequence[Source], sums: Sequence[str], tokenizer: Tokenizer, options: PrepareSettings
) -> dict[str, Any]:
    """Return the part of dataset.json that the arguments determine.

    `sums` are the SHA-256 of the sources.
    """
    rule, sentence = split_rule(sources, options.validation_fraction)
    settings = {name: value for name, value in asdict(options).items() if name != "workers"}
    return {
        "format": DATASET_FORMAT,
        "version": DATASET_VERSION,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "split": {"rule": rule, "fraction": options.validation_fraction, "text": sentence},
        "sources": [
            {"path": source.name, "bytes": source.size, "sha256": each}
            for source, each in zip(sources, sums, strict=True)
        ],
        "settings": settings,
    }


def made_before(
    out: Path, sources: Sequence[Source], tokenizer: Tokenizer, options: PrepareSettings
) -> Dataset | None:
    """Return the dataset in `out` if the same arguments made it; ValueError if others did."""
    info = prepared_info(out)
    if not info:
        return None
    asked = described(sources, [source.sha256() for source in sources], tokenizer, options)
    differing = [key for key, value in asked.items() if info.get(key) != value]
    if differing:
        raise ValueError(
            f"{out} was prepared with other {' and '.join(differing)}: "
            "choose another --out, or remove it first"
        )
    return Dataset.open(out)


def check_disk(out: Path, sources: Sequence[Source], tokenizer: Tokenizer, field: str) -> None:
    """Raise OSError if the shards might not fit on the disk."""
    size = sum(text_bytes(source, field=field) for source in sources)
    most = size * dtype_for(tokenizer.vocab_size).itemsize  # a token for every byte
    if tokenizer.kind == "bpe":
        most //= 2  # fewer than one for every two bytes, in any text worth learning from
    place = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(place).free
    if most > free:
        raise OSError(
            f"{out} could need {most / 1e9:,.3f} GB, but {free / 1e9:,.3f} GB are free on its disk"
        )


# -- text to shards


def write_dataset(
    folder: Path, sources: Sequence[Source], tokenizer: Tokenizer, options: PrepareSettings
) -> Iterator[tuple[int, int]]:
    """Write shards, tokenizer and dataset.json to a folder; yield bytes read and tokens so far."""
    sums = [hashlib.sha256() for _ in sources]
    sizes, documents = [0, 0], [0, 0]
    encoded = encode_all(
        labelled(sources, sums, options),
        tokenizer,
        unknown=options.unknown,
        workers=checked_threads("workers", options.workers),
    )
    with ExitStack() as stack:
        train, held_out = writers = [
            stack.enter_context(
                ShardWriter(folder, split, tokenizer.vocab_size, options.shard_tokens)
            )
            for split in ("train", "validation")
        ]
        for each in stack.enter_context(closing(encoded)):
            for side, writer in enumerate(writers):
                writer.write(each.ids[side])
                sizes[side] += each.bytes[side]
                documents[side] += each.documents[side]
            yield each.read, train.tokens + held_out.tokens
    check_result(train.tokens, held_out.tokens, sources, options)
    info = described(sources, [each.hexdigest() for each in sums], tokenizer, options)
    for writer, size, count in zip(writers, sizes, documents, strict=True):
        split = {"tokens": writer.tokens, "bytes": size, "documents": count}
        info[writer.prefix] = {**split, "shards": writer.shards} if writer.tokens else None
    tokenizer.save(folder)
    write_json(folder / INFO, info)


def labelled(
    sources: Sequence[Source], sums: Sequence["hashlib._Hash"], options: PrepareSettings
) -> Iterator[SplitText]:
    """Yield all text with its split; `sums` are updated with every byte that is read."""
    fraction = options.validation_fraction
    rule, _ = split_rule(sources, fraction)
    total = before = 0  # documents, and bytes, of the sources so far
    for source, digest in zip(sources, sums, strict=True):
        tail = int(source.size * (1 - fraction)) if rule == "tail" else None
        number = read = 0  # documents, and bytes, of this source so far
        for chunk in read_documents(
            source, field=options.field, encoding=options.encoding, stop=tail, digest=digest
        ):
            held_out = is_held_out(total + number, fraction) if tail is None else read >= tail
            read = chunk.read
            place = f"{source.name}, document {number + 1}" if source.has_rows else source.name
            yield SplitText(chunk.text, held_out, chunk.ends, place, before + read)
            number += chunk.ends
        total, before = total + number, before + source.size


def check_result(
    learned: int, held_out: int, sources: Sequence[Source], options: PrepareSettings
) -> None:
    """Raise ValueError if a requested split has no tokens."""
    names = ", ".join(source.name for source in sources[:3])
    if not learned:
        raise ValueError(f"{names} has too little text to train on: use more")
    if options.validation_fraction and not held_out:
        raise ValueError(
            f"{names} has too few documents to hold out {options.validation_fraction:.4g} of them: "
            "use a larger --validation-fraction, or 0"
        )
