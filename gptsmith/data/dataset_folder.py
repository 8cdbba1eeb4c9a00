"""Write the folder of a dataset, and tell whether the same arguments made one.

Knows nothing of how text is found, read and encoded, or of how a folder is written whole or not at
all (`prepare.py`).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config.settings import PrepareSettings
from ..machine.environment import checked_threads
from ..machine.files import write_json
from ..tokenizers import Tokenizer
from .encode import encode_all
from .repeats import documents_in_training, stretches_in_training, warnings_of
from .shards import DATASET_FORMAT, DATASET_VERSION, INFO, TokenStream
from .sources import Source
from .split import Counts, Reader, split_rule
from .tokenfile import ShardWriter

# -- what the arguments determine


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
