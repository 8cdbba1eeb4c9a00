"""Prepare one of several parts of a text, each on a machine of its own.

A part is a share of the bytes, in whole documents. Which are repeats, or held out, depends on the
documents of the parts before it: that is decided when `join.py` makes a dataset of all parts.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..config.settings import PrepareSettings
from ..machine.environment import checked_threads
from ..machine.files import write_json, written_whole
from ..tokenizers import Tokenizer, char_tokenizer, open_tokenizer
from .dataset_folder import described
from .decoding import checked_encoding
from .documents import read_documents
from .encode import encode_all
from .part_folder import (
    DOCUMENT,
    DOCUMENTS,
    ENDS,
    PART_FORMAT,
    PART_INFO,
    PART_VERSION,
    SECTIONS,
    TOKENIZER,
    Part,
    is_part,
    open_part,
)
from .pieces import divide, with_sums_of_later
from .prepare import (
    Progress,
    check_disk,
    learning,
    most_bytes,
    separator_for,
    sources_with_text,
    timed,
)
from .repeats import new_digest
from .sources import Source
from .split import Passage, Reader, is_held_out, split_rule
from .tokenfile import ShardWriter


def prepare_part(
    names: Sequence[str],
    tokenizer: Tokenizer | str,
    out: Path,
    part: Part,
    *,
    options: PrepareSettings | None = None,
) -> Iterator[Progress]:
    """Turn a part of the sources into a folder for `join.join`, and yield the progress.

    The other arguments must be the same for all parts; they mean what they mean for `prepare`. If
    `out` is this part of them, it is left unchanged; any other non-empty folder is refused.
    ValueError or OSError in one line, with nothing left behind.
    """
    steps = preparing_part(names, tokenizer, Path(out), part, options or PrepareSettings())
    yield from timed(steps)


def preparing_part(
    names: Sequence[str],
    tokenizer: Tokenizer | str,
    out: Path,
    part: Part,
    options: PrepareSettings,
) -> Generator[tuple[int, int, int], None, None]:
    """Do the work of `prepare_part`; yield bytes read, all bytes and tokens after every step."""
    if out.exists() and not (out.is_dir() and (is_part(out) or not any(out.iterdir()))):
        raise ValueError(f"{out} already exists: choose another --out, or remove it first")
    sources = sources_with_text(names, options)
    done, size = 0, sum(source.size for source in sources)
    whole = divide(sources, part.of, checked_encoding(options.encoding))
    pieces = whole[part.number - 1]
    total = sum(piece.text.size for piece in pieces)
    if tokenizer == "char":  # of all the text, in every part
        characters: set[str] = set()
        for read in learning(sources, options, characters):
            yield read, size + total, 0
        tokenizer, done = char_tokenizer(characters), size
    elif isinstance(tokenizer, str):
        tokenizer = open_tokenizer(tokenizer)
    total += done
    rule = split_rule(sources, options, first_repeats(sources, options))
    info: dict[str, Any] = {
        "format": PART_FORMAT,
        "version": PART_VERSION,
        "part": str(part),
        "dataset": described(sources, options, rule, tokenizer),
    }
    if is_part(out):
        tokens = check_same_part(out, info, [piece.text.sha256() for piece in pieces])
        yield total, total, tokens
        return
    check_disk(out, most_bytes([piece.text for piece in pieces], tokenizer, options.field))
    separator, own_rule = separator_for(tokenizer, sources), "tail" if rule[0] == "tail" else "none"
    reader = Reader([piece.text for piece in pieces], options, separator, rule=own_rule)
    with written_whole(out) as folder:
        for tokens in write_tokens(folder, reader, tokenizer, info):
            yield done + min(reader.read, total - done), total, tokens
        info["pieces"] = with_sums_of_later(pieces, reader.sums, whole[part.number :])
        write_json(folder / PART_INFO, info)
    yield total, total, sum(info["tokens"])


# -- what a part is


def first_repeats(sources: Sequence[Source], options: PrepareSettings) -> bytes:
    """Return a byte for each of the first documents: 1 if it repeats an earlier one, else 0.

    These are as many as decide by which rule text is held out; none unless repeats are dropped.
    """
    repeated, seen, splits = bytearray(), set[bytes](), set[bool]()
    for source in sources if options.deduplicate and options.validation_fraction else ():
        digest = new_digest()
        for chunk in read_documents(source, field=options.field, encoding=options.encoding):
            digest.update(chunk.text.encode())
            if chunk.ends:
                repeated.append(digest.digest() in seen)
                if not repeated[-1]:
                    splits.add(is_held_out(len(seen), options.validation_fraction))
                    seen.add(digest.digest())
                if len(splits) == 2:
                    return bytes(repeated)
                digest = new_digest()
    return bytes(repeated)


def check_same_part(out: Path, asked: dict[str, Any], sums: Sequence[str]) -> int:
    """Return the tokens of the part in `out`; ValueError unless the same arguments made it."""
    there = open_part(out).info
    differing = ["part"] if there["part"] != asked["part"] else []
    dataset = asked["dataset"]
    differing += [key for key in dataset if there["dataset"].get(key) != dataset[key]]
    if not differing and [piece["sha256"] for piece in there["pieces"]] != sums:
        differing = ["sources"]
    if differing:
        raise ValueError(
            f"{out} was prepared with other {' and '.join(differing)}: "
            "choose another --out, or remove it first"
        )
    return sum(there["tokens"])


# -- writing


def write_tokens(
    folder: Path, reader: Reader, tokenizer: Tokenizer, info: dict[str, Any]
) -> Iterator[int]:
    """Write all files of a part but its description, to which it adds what they are.

    Yields the number of tokens so far.
    """
    options = reader.options
    workers = checked_threads("workers", options.workers)
    sizes = tokenizer.vocab_size, options.shard_tokens
    info["documents"] = 0
    with (
        ShardWriter(folder, SECTIONS[0], *sizes) as first,
        ShardWriter(folder, SECTIONS[1], *sizes) as tail,
        (folder / DOCUMENTS).open("wb") as documents,
        (folder / ENDS).open("wb") as ends,
        closing(
            encode_all(
                recorded(reader.passages(), documents),
                tokenizer,
                unknown=options.unknown,
                workers=workers,
            )
        ) as encoded,
    ):
        for ids in encoded:
            ends.write(np.add(ids.ends, [first.tokens, tail.tokens]).astype("<i8").tobytes())
            info["documents"] += len(ids.ends)
            first.write(ids.train)
            tail.write(ids.validation)
            yield first.tokens + tail.tokens
    reader.bad_rows.warn()
    (folder / TOKENIZER).mkdir()
    tokenizer.save(folder / TOKENIZER)
    info["tokens"] = [first.tokens, tail.tokens]
    info["shards"] = [[shard["file"] for shard in each.shards] for each in (first, tail)]


def recorded(passages: Iterable[Passage], file: BinaryIO) -> Iterator[Passage]:
    """Yield passages, and write a DOCUMENT to a file for each document that ends."""
    document, digest = np.zeros((), DOCUMENT), new_digest()
    for passage in passages:
        data = passage.text.encode()
        document["bytes"][int(passage.held_out)] += len(data)
        document["there"][int(passage.held_out)] = True
        digest.update(data[: len(data) - passage.separator])
        if passage.ends:
            document["separator"] = passage.separator
            document["digest"] = np.frombuffer(digest.digest(), np.uint8)
            file.write(document.tobytes())
            document, digest = np.zeros((), DOCUMENT), new_digest()
        yield passage
