"""Encode documents in several threads, in order, cutting long ones where the ids stay the same.

Knows nothing of files or shards; the caller decides the split of each text. Memory is bounded: text
is processed in stretches of a quarter of a megabyte.
"""

import re
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..tokenizers import Tokenizer
from ..tokenizers.kinds import splits_like
from ..tokenizers.tokenizer import Unknown
from .split import Passage

STRETCH = 1 << 18  # characters that one thread encodes at once
LONGEST = 1 << 21  # characters without a safe place to cut, after which text is cut anyway

# A character that neither Python nor any regex library counts as white space, before a space or a
# newline. GPT-2's pattern always splits there, so cutting there does not change the ids.
SAFE = re.compile("[^\\s\x1c-\x1f\x85\u180e\u200b\ufeff](?=[ \n])")


class Ids(NamedTuple):
    """The ids of some text, of which D documents end."""

    train: np.ndarray  # (N,)
    validation: np.ndarray  # (M,)
    ends: np.ndarray  # for each document that ends, how many of both come up to there: (D, 2)


def encode_all(
    passages: Iterable[Passage], tokenizer: Tokenizer, *, unknown: Unknown, workers: int
) -> Generator[Ids, None, None]:
    """Yield all documents as ids, in order; the result does not depend on the number of threads.

    ValueError, with the place, if the tokenizer refuses a text.
    """
    tokenizer.encode_array("")  # builds its tables once, and not in every thread
    pending: deque[tuple[Future[Ids], int]] = deque()
    length = 0  # characters in pending jobs
    with ThreadPoolExecutor(workers) as pool:
        try:
            for job in gathered(stretches(passages, tokenizer)):
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


def stretches(passages: Iterable[Passage], tokenizer: Tokenizer) -> Iterator[Passage]:
    """Yield documents in passages that are long, and that can be encoded separately."""
    text, held_out, offset = "", False, 0
    for passage in passages:
        if passage.held_out != held_out:
            if text:
                yield Passage(text, held_out, False, passage.place, offset)
                offset += len(text)
            text, held_out = "", passage.held_out
        text += passage.text
        start = 0
        while end := place_to_cut(text, start, tokenizer):
            yield Passage(text[start:end], held_out, False, passage.place, offset)
            offset, start = offset + end - start, end
        text = text[start:]
        if passage.ends:
            yield Passage(text, held_out, True, passage.place, offset)
            text, offset = "", 0


def place_to_cut(text: str, start: int, tokenizer: Tokenizer) -> int:
    """Return the end of the stretch that begins at `start`, or 0 if it needs more text.

    A very long text without spaces (no language has one) is cut anyway, to bound memory.
    """
    enough = start + STRETCH
    if len(text) <= enough:
        return 0
    if tokenizer.kind in ("char", "byte") and not tokenizer.added:
        return enough
    if splits_like(tokenizer.spec) not in ("gpt2", "bytes") or not tokenizer.cuts_at_spaces:
        return 0
    if found := SAFE.search(text, enough):
        return found.end()
    return start + LONGEST if len(text) > start + LONGEST else 0


def gathered(stretches: Iterable[Passage]) -> Iterator[list[Passage]]:
    """Group stretches into jobs that are large enough for a thread."""
    job: list[Passage] = []
    length = 0
    for stretch in stretches:
        job.append(stretch)
        length += len(stretch.text)
        if length >= STRETCH:
            yield job
            job, length = [], 0
    if job:
        yield job


def encode(job: list[Passage], tokenizer: Tokenizer, unknown: Unknown) -> Ids:
    """Encode stretches, with a token after each document if the tokenizer has one for it."""
    end = [] if tokenizer.document_end is None else [tokenizer.document_end]
    none = np.empty(0, np.uint16)
    train, validation = parts = [none], [none]
    counts, ends = [0, 0], []
    for stretch, found in zip(job, ids_of(job, tokenizer, unknown), strict=True):
        parts[stretch.held_out].append(found)
        counts[stretch.held_out] += len(found)
        if stretch.ends:
            parts[stretch.held_out].append(np.array(end, found.dtype))
            counts[stretch.held_out] += len(end)
            ends.append(tuple(counts))
    return Ids(
        np.concatenate(train), np.concatenate(validation), np.array(ends, np.int64).reshape(-1, 2)
    )


def ids_of(job: list[Passage], tokenizer: Tokenizer, unknown: Unknown) -> Iterator[np.ndarray]:
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
