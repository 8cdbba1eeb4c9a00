"""Turn text into a folder of token shards, completely or not at all, or only for an evaluation.

Knows nothing of how text is found (`sources.py`) and encoded (`encode.py`), or of the file format
(`tokenfile.py`).
"""

import shutil
import tempfile
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config.fields import SettingError
from ..config.settings import PrepareSettings, Split
from ..machine.environment import checked_threads
from ..machine.files import write_json, written_whole
from ..tokenizers import Tokenizer, char_tokenizer, open_tokenizer
from .documents import text_bytes
from .encode import encode_all
from .repeats import (
    documents_in_training,
    repeats_of_earlier,
    stretches_in_training,
    warnings_of,
)
from .shards import (
    DATASET_FORMAT,
    DATASET_VERSION,
    INFO,
    Dataset,
    TokenStream,
    is_dataset,
    prepared_info,
)
from .sources import Source, find_sources
from .split import Counts, Reader, has_documents, split_rule
from .tokenfile import ShardWriter

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


def described(
    sources: Sequence[Source], options: PrepareSettings, rule: tuple[str, str], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return the part of dataset.json that the arguments determine, but for the sources' SHA-256.

    `rule` is that of `split_rule`.
    """
    settings = {name: value for name, value in asdict(options).items() if name != "workers"}
    return {
        "format": DATASET_FORMAT,
        "version": DATASET_VERSION,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "split": {"rule": rule[0], "fraction": options.validation_fraction, "text": rule[1]},
        "sources": [{"path": source.name, "bytes": source.size} for source in sources],
        "settings": settings,
    }


def with_sums(info: dict[str, Any], sums: Sequence[str]) -> dict[str, Any]:
    """Return what `described` gave with the SHA-256 of each source."""
    pairs = zip(info["sources"], sums, strict=True)
    return info | {"sources": [source | {"sha256": each} for source, each in pairs]}


def check_made_by(
    out: Path, info: dict[str, Any], asked: dict[str, Any], sums: Sequence[str]
) -> None:
    """Raise ValueError if the dataset.json of `out` is not what these arguments would make."""
    # What an older version did not know of had its default.
    there = info | {"settings": asdict(PrepareSettings()) | (info.get("settings") or {})}
    there["settings"].pop("workers")
    asked = with_sums(asked, sums)
    differing = [key for key, value in asked.items() if there.get(key) != value]
    if differing:
        raise ValueError(
            f"{out} was prepared with other {' and '.join(differing)}: "
            "choose another --out, or remove it first"
        )


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


# -- writing


def write_dataset(folder: Path, reader: Reader, tokenizer: Tokenizer) -> Iterator[int]:
    """Write shards, tokenizer and dataset.json to a folder; yield the number of tokens so far."""
    options = reader.options
    workers = checked_threads("workers", options.workers)
    encoded = encode_all(reader.passages(), tokenizer, unknown=options.unknown, workers=workers)
    sizes = tokenizer.vocab_size, options.shard_tokens
    with (
        ShardWriter(folder, "train", *sizes) as train,
        ShardWriter(folder, "validation", *sizes) as validation,
        closing(encoded),
    ):
        for train_ids, validation_ids, _ in encoded:
            train.write(train_ids)
            validation.write(validation_ids)
            yield train.tokens + validation.tokens
    reader.bad_rows.warn()
    tokenizer.save(folder)
    rule = split_rule(reader.sources, options, reader.repeated)
    info = with_sums(described(reader.sources, options, rule, tokenizer), reader.sums)
    write_info(folder, info, reader.counts, train, validation, tokenizer)


def write_info(
    folder: Path,
    info: dict[str, Any],
    counts: Counts,
    train: ShardWriter,
    validation: ShardWriter,
    tokenizer: Tokenizer,
) -> None:
    """Write dataset.json for shards that are finished; `info` is what the arguments determine.

    ValueError if a split that was asked for is empty.
    """
    names = ", ".join(source["path"] for source in info["sources"][:3])
    fraction = info["settings"]["validation_fraction"]
    if not train.tokens:
        raise ValueError(f"{names} has too little text to train on: use more")
    if fraction and not validation.tokens:
        raise ValueError(
            f"{names} has too little text to hold out {fraction:.4g} of it: "
            "use a larger --validation-fraction, or 0"
        )
    for writer, size, documents in zip(
        (train, validation), counts.bytes, counts.documents, strict=True
    ):
        split = {"tokens": writer.tokens, "bytes": size, "documents": documents}
        info[writer.prefix] = {**split, "shards": writer.shards} if writer.tokens else None
    if info["settings"]["deduplicate"]:
        info["dropped"] = {"documents": counts.dropped_documents, "bytes": counts.dropped_bytes}
    if validation.tokens:
        info["overlap"] = overlap_of(counts, train, validation, tokenizer)
    write_json(folder / INFO, info)


def overlap_of(
    counts: Counts, train: ShardWriter, validation: ShardWriter, tokenizer: Tokenizer
) -> dict[str, int]:
    """Return how much of the validation text is in the training text too; warn of much."""
    learned, held_out = (
        TokenStream([each.folder / shard["file"] for shard in each.shards], mapped_bytes=1 << 24)
        for each in (train, validation)
    )
    sought, found = stretches_in_training(learned, held_out, tokenizer.document_end)
    overlap = {
        "documents": documents_in_training(*counts.digests),
        "stretches": sought,
        "repeated_stretches": found,
    }
    for warning in warnings_of(overlap, counts.documents[True]):
        warnings.warn(warning, stacklevel=2)
    return overlap


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


# -- for an evaluation


@contextmanager
def opened_tokens(
    data: str | Path,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    *,
    split: Split | None = None,
    options: PrepareSettings | None = None,
) -> Iterator[TokenStream]:
    """Yield the tokens of DATA for a model with this tokenizer and vocabulary.

    For prepared data these are one split: by default validation, or train if nothing was held out.
    A text is encoded whole, with the given options. ValueError if the tokens do not suit the model.
    """
    if is_dataset(Path(data)):
        yield Dataset.open(Path(data)).tokens_for(tokenizer, vocab_size, split)
        return
    if tokenizer is None:
        raise ValueError(
            f"the model has no tokenizer to encode {data}: use data made by `gptsmith prepare`"
        )
    if split == "validation":
        raise SettingError("split", f"is for prepared data: {data} is text, which is read whole")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        whole = replace(options or PrepareSettings(), validation_fraction=0.0)
        for _ in prepare([str(data)], tokenizer, folder, options=whole):
            pass
        with closing(Dataset.open(folder)) as dataset:
            yield dataset.train


@contextmanager
def opened_splits(
    data: str | Path, tokenizer: Tokenizer, *, options: PrepareSettings | None = None
) -> Iterator[Dataset]:
    """Yield DATA as a run learns it: a prepared folder, or a text that is prepared like a run's.

    The text's dataset is in a temporary folder, which is removed at the end.
    """
    if is_dataset(Path(data)):
        yield Dataset.open(Path(data))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        for _ in prepare([str(data)], tokenizer, folder, options=options):
            pass
        with closing(Dataset.open(folder)) as dataset:
            yield dataset
