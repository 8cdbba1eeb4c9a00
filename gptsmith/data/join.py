"""Join the parts of a text that `parts.py` prepared, into the dataset that `prepare` makes of it.

Knows nothing of how text is read and encoded: which documents are repeats, and which are held out,
follows from their digests and their order.
"""

import shutil
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..machine.files import written_whole
from ..tokenizers import Tokenizer, load_tokenizer
from .dataset_folder import check_made_by, with_sums, write_info
from .part_folder import TOKENIZER, Part, PartFolder, open_part, verify
from .prepare import Progress, check_disk, timed
from .repeats import repeats_of_earlier
from .shards import Dataset, TokenStream, prepared_info
from .split import Counts, is_held_out
from .tokenfile import ShardWriter

BLOCK = 1 << 20  # tokens that are copied at once
DROPPED = 2  # where a section goes that is neither train (0) nor validation (1)


def join(folders: Sequence[Path], out: Path) -> Iterator[Progress]:
    """Join all parts of a text into a dataset in the folder `out`, and yield the progress.

    The result is, byte for byte, what `prepare` makes of the text. The order of the folders does
    not matter. If `out` is this dataset already, it is left unchanged; any other non-empty folder
    is refused. ValueError or OSError in one line, with nothing left behind.
    """
    yield from timed(joining([Path(folder) for folder in folders], Path(out)))


def joining(folders: Sequence[Path], out: Path) -> Generator[tuple[int, int, int], None, None]:
    """Do the work of `join`; yield bytes read, all bytes and tokens after every step."""
    if out.exists() and not (out.is_dir() and (prepared_info(out) or not any(out.iterdir()))):
        raise ValueError(f"{out} already exists: choose another --out, or remove it first")
    parts = all_parts(folders)
    asked, sums = parts[0].info["dataset"], sums_of_sources(parts)
    if info := prepared_info(out):
        check_made_by(out, info, asked, sums)
        there = Dataset.open(out)
        yield 1, 1, len(there.train) + len(there.validation or ())
        return
    tokenizer = load_tokenizer(parts[0].folder / TOKENIZER)
    size = np.dtype(tokenizer.dtype).itemsize
    total = size * sum(sum(each.info["tokens"]) for each in parts)
    check_disk(out, total)
    for each in parts:
        verify(each)
        yield 0, total, 0
    with written_whole(out, manifest=False) as folder:
        for tokens in write_joined(folder, parts, with_sums(asked, sums), tokenizer):
            yield size * tokens, total, tokens
        shutil.copytree(parts[0].folder / TOKENIZER, folder, dirs_exist_ok=True)
    yield total, total, tokens


# -- are they all there?


def all_parts(folders: Sequence[Path]) -> list[PartFolder]:
    """Return all parts of one text in order; ValueError if these are not just that."""
    parts = [open_part(folder) for folder in folders]
    one = parts[0]
    for each in parts[1:]:
        if each.part.of != one.part.of:
            raise ValueError(
                f"{one.folder} is part {one.part}, but {each.folder} is part {each.part}: parts of "
                "the same number are needed"
            )
        here, there = one.info["dataset"], each.info["dataset"]
        if differing := [key for key in here if here[key] != there.get(key)]:
            raise ValueError(
                f"{one.folder} and {each.folder} were prepared with different "
                f"{' and '.join(differing)}: prepare all parts with the same arguments"
            )
    parts.sort(key=lambda each: each.part)
    numbers = Counter(each.part for each in parts)
    for part, count in numbers.items():
        if count > 1:
            twice = " and ".join(str(each.folder) for each in parts if each.part == part)
            raise ValueError(f"part {part} is there {count} times, as {twice}: name it once")
    wanted = [Part(number, one.part.of) for number in range(1, one.part.of + 1)]
    if missing := [str(part) for part in wanted if part not in numbers]:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise ValueError(
            f"of {one.part.of} parts, {len(missing)} {'is' if len(missing) == 1 else 'are'} "
            f"missing: make --part {shown}"
        )
    return parts


def sums_of_sources(parts: Sequence[PartFolder]) -> list[str]:
    """Return the SHA-256 of each source; ValueError if the parts did not read the same bytes."""
    sources = parts[0].info["dataset"]["sources"]
    pieces: list[list[dict[str, Any]]] = [[] for _ in sources]
    for each in parts:
        for piece in each.info["pieces"]:
            pieces[piece["source"]].append(piece)
    for source, (first, *later) in zip(sources, pieces, strict=True):
        if first.get("later", []) != [piece["sha256"] for piece in later]:
            raise ValueError(
                f"{source['path']} was changed between the making of its parts: make them again"
            )
    return [first.get("whole", first["sha256"]) for first, *_ in pieces]


# -- writing


def write_joined(
    folder: Path, parts: Sequence[PartFolder], info: dict[str, Any], tokenizer: Tokenizer
) -> Iterator[int]:
    """Write the shards and dataset.json; yield the number of tokens that were read."""
    sizes = tokenizer.vocab_size, info["settings"]["shard_tokens"]
    repeated = np.zeros(0, bool)
    if info["settings"]["deduplicate"]:
        digests = b"".join(each.documents()["digest"].tobytes() for each in parts)
        repeated = np.frombuffer(repeats_of_earlier(bytearray(digests)), bool)
    counts = Counts()
    kept = before = read = 0  # documents so far that are not dropped, all documents, and tokens
    with (
        ShardWriter(folder, "train", *sizes) as train,
        ShardWriter(folder, "validation", *sizes) as validation,
    ):
        for each in parts:
            documents = each.documents()
            dropped = repeated[before : before + len(documents)]
            if not len(repeated):
                dropped = np.zeros(len(documents), bool)
            places = places_of(dropped, kept, info["split"])
            count(counts, documents, places, info["split"]["rule"])
            before, kept = before + len(documents), kept + int((~dropped).sum())
            for section, stream in enumerate(each.streams()):
                for tokens, place in blocks(stream, each.ends()[:, section], places[:, section]):
                    train.write(tokens[place == 0])
                    validation.write(tokens[place == 1])
                    read += len(tokens)
                    yield read
    write_info(folder, info, counts, train, validation, tokenizer)


def places_of(dropped: np.ndarray, kept: int, split: dict[str, Any]) -> np.ndarray:
    """Return where both sections of each document go: train 0, validation 1, or DROPPED.  (D, 2)

    `dropped` (D,) says which documents are; `kept` were not, in the parts before.
    """
    places = np.tile(np.array([0, 1], np.int8), (len(dropped), 1))
    if split["rule"] == "documents":
        numbers = range(kept, kept + int((~dropped).sum()))
        held_out = [is_held_out(number, split["fraction"]) for number in numbers]
        places[~dropped, 0] = held_out
    places[dropped] = DROPPED
    return places


def count(counts: Counts, documents: np.ndarray, places: np.ndarray, rule: str) -> None:
    """Add the documents (D,) of a part to the counts of the splits, by their places (D, 2)."""
    for split in (0, 1):
        counts.bytes[split] += int(documents["bytes"][places == split].sum())
        counts.documents[split] += int((documents["there"] & (places == split)).sum())
        if rule != "tail":
            counts.digests[split].extend(documents["digest"][places[:, 0] == split].tobytes())
    dropped = documents[places[:, 0] == DROPPED]
    counts.dropped_documents += len(dropped)
    counts.dropped_bytes += int(dropped["bytes"].sum()) - int(dropped["separator"].sum())


def blocks(
    stream: TokenStream, ends: np.ndarray, places: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield all tokens (N,) and where each goes (N,), by the ends and places of sections (D,)."""
    for start in range(0, len(stream), BLOCK):
        stop = min(start + BLOCK, len(stream))
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        lengths = np.diff(np.clip(ends[first : last + 1], start, stop), prepend=start)
        yield stream.read(start, stop), np.repeat(places[first : last + 1], lengths)
