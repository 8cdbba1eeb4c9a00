"""Encode documents in several threads, in order, cutting long ones where the ids stay the same.

Knows nothing of files or shards; the caller decides the split of each text. Memory is bounded: text
is processed in stretches of a quarter of a megabyte.
"""

import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np

from ..tokenizers import Tokenizer

STRETCH = 1 << 18  # characters that one thread encodes at once
LONGEST = 1 << 21  # characters without a safe place to cut, after which text is cut anyway

# A character that neither Python nor any regex library counts as white space, before a space or a
# newline. GPT-2's pattern always splits there, so cutting there does not change the ids.
SAFE = re.compile("[^\\s\x1c-\x1f\x85\u180e\u200b\ufeff](?=[ \n])")


class SplitText(NamedTuple):
    """Some text of a document as it is read, and its split."""

    text: str
    held_out: bool
    ends: bool  # the document
    place: str  # for errors
    read: int  # bytes of all sources up to the end of this text


class Stretch(NamedTuple):
    """Some text of a document that can be encoded on its own."""

    text: str
    held_out: bool
    begins: bool  # the document, or its part in this split
    ends: bool
    place: str
    offset: int  # characters of the document before this text
    read: int


class Encoded(NamedTuple):
    """Several stretches as ids; each pair is (train, validation)."""

    ids: tuple[np.ndarray, np.ndarray]  # (N,), (M,)
    bytes: tuple[int, int]  # of text, in UTF-8
    documents: tuple[int, int]
    read: int


def encode_all(
    texts: Iterable[SplitText],
    tokenizer: Tokenizer,
    *,
    unknown: Literal["error", "skip"] = "error",
    workers: int = 1,
) -> Generator[Encoded, None, None]:
    """Yield all documents as ids, in order; the result does not depend on the number of threads.

    ValueError, with the place, if the tokenizer refuses a text.
    """
    pending: deque[tuple[Future[Encoded], int]] = deque()
    length = 0  # characters in pending jobs
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in gathered(stretches(texts, tokenizer)):
                size = sum(len(stretch.text) for stretch in job)
                pending.append((pool.submit(encode, job, tokenizer, unknown), size))
                length += size
                while length > (workers + 1) * STRETCH:
                    future, size = pending.popleft()
                    length -= size
                    yield future.result()
            while pending:
                yield pending.popleft()[0].result()
        finally:
            pool.shutdown(cancel_futures=True)


def stretches(texts: Iterable[SplitText], tokenizer: Tokenizer) -> Iterator[Stretch]:
    """Yield documents in stretches that can be encoded separately; the last of each is marked."""
    text, held_out, begins, offset = "", False, True, 0
    for each in texts:
        if each.held_out != held_out:
            if text:
                yield Stretch(text, held_out, begins, False, each.place, offset, each.read)
                offset += len(text)
            text, held_out, begins = "", each.held_out, True
        text += each.text
        start = 0
        while end := place_to_cut(text, start, tokenizer):
            cut = text[start:end]
            yield Stretch(cut, held_out, begins, False, each.place, offset, each.read)
            offset, start, begins = offset + len(cut), end, False
        text = text[start:]
        if each.ends:
            yield Stretch(text, held_out, begins, True, each.place, offset, each.read)
            text, begins, offset = "", True, 0


def place_to_cut(text: str, start: int, tokenizer: Tokenizer) -> int:
    """Return the end of the stretch that begins at `start`, or 0 if it needs more text.

    A very long text without spaces (no language has one) is cut anyway, to bound memory.
    """
    enough = start + STRETCH
    if len(text) <= enough:
        return 0
    if tokenizer.kind in ("char", "byte"):
        return enough
    if not tokenizer.splits_at_spaces:
        return 0
    if found := SAFE.search(text, enough):
        return found.end()
    return start + LONGEST if len(text) > start + LONGEST else 0


def gathered(stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
    """Group stretches into jobs that are large enough for a thread."""
    job: list[Stretch] = []
    length = 0
    for stretch in stretches:
        job.append(stretch)
        length += len(stretch.text)
        if length >= STRETCH:
            yield job
            job, length = [], 0
    if job:
        yield job


def ids_of(
    job: list[Stretch], tokenizer: Tokenizer, unknown: Literal["error", "skip"]
) -> Iterator[np.ndarray]:
    """Yield the ids of each stretch: (N,)."""
    try:
        together = tokenizer.encode_together([stretch.text for stretch in job])
    except ValueError:
        together = None  # encoded one by one, the error names the place
    if together is not None:
        yield from together
        return
    for stretch in job:
        try:
            yield tokenizer.encode_array(stretch.text, unknown=unknown)
        except ValueError as error:
            after = f", after {stretch.offset:,} characters" if stretch.offset else ""
            raise ValueError(f"{stretch.place}{after}: {error}") from error


def encode(job: list[Stretch], tokenizer: Tokenizer, unknown: Literal["error", "skip"]) -> Encoded:
    """Encode stretches, with <|endoftext|> after each document if the tokenizer has it."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    ids: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    sizes, documents = [0, 0], [0, 0]
    for stretch, found in zip(job, ids_of(job, tokenizer, unknown), strict=True):
        ids[stretch.held_out].append(found)
        if stretch.ends:
            ids[stretch.held_out].append(np.array(end, found.dtype))
        sizes[stretch.held_out] += len(stretch.text.encode())
        documents[stretch.held_out] += stretch.begins
    none = np.empty(0, np.uint16)
    train, validation = (np.concatenate(arrays) if arrays else none for arrays in ids)
    return Encoded(
        (train, validation), (sizes[0], sizes[1]), (documents[0], documents[1]), job[-1].read
    )
