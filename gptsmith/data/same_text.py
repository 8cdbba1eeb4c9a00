"""Give models of different tokenizers the same text.

Text that was prepared for one tokenizer is decoded, document by document, and encoded for the
others. Knows nothing of models.
"""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ..config.settings import PrepareSettings, Split
from ..tokenizers import Tokenizer, has_tokenizer, load_tokenizer
from .for_evaluation import opened_tokens
from .shards import Dataset, TokenStream, is_dataset

Vocabulary = tuple[Tokenizer | None, int]  # a model's tokenizer, and the size of its vocabulary
PART = 1 << 20  # tokens that are decoded at once


@contextmanager
def opened_for_each(
    data: str | Path,
    vocabularies: Sequence[Vocabulary],
    *,
    split: Split | None = None,
    first_tokens: int | None = None,
    options: PrepareSettings | None = None,
) -> Iterator[list[TokenStream]]:
    """Yield the tokens of DATA for each of several models, as `for_evaluation.opened_tokens` for
    one.

    If their tokenizers differ, all encode the same text, that of the `first_tokens` of DATA by the
    tokenizer that made it or, of a text, by the first model's. ValueError if the tokens do not suit
    a model, or a tokenizer is missing.
    """
    with ExitStack() as opened:
        if differ(vocabularies):
            if not all(tokenizer for tokenizer, _ in vocabularies):
                raise ValueError(
                    "a model without a tokenizer.json cannot be compared with models of different "
                    "tokenizers: add its tokenizer to its folder"
                )
            folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            data = written_text(folder, data, vocabularies, split, first_tokens, options)
            split, options = None, None
        streams: dict[str | None, TokenStream] = {}
        for tokenizer, vocab_size in vocabularies:
            key = tokenizer.fingerprint if tokenizer else None
            if key not in streams:
                streams[key] = opened.enter_context(
                    opened_tokens(data, tokenizer, vocab_size, split=split, options=options)
                )
        yield [streams[each.fingerprint if each else None] for each, _ in vocabularies]


def differ(vocabularies: Sequence[Vocabulary]) -> bool:
    """Return whether the models have different tokenizers."""
    return len({tokenizer.fingerprint for tokenizer, _ in vocabularies if tokenizer}) > 1


def written_text(
    folder: Path,
    data: str | Path,
    vocabularies: Sequence[Vocabulary],
    split: Split | None,
    first_tokens: int | None,
    options: PrepareSettings | None,
) -> Path:
    """Write the text of DATA to a file in a folder, a document on each line, and return its path.

    If one of the models' tokenizers has no token for the end of a document, each document ends with
    a newline for all of them, as `prepare` does for that one.
    """
    tokenizers = [tokenizer for tokenizer, _ in vocabularies if tokenizer]
    ends_lines = any(each.document_end is None and "\n" in each.vocab for each in tokenizers)
    path = folder / "text.jsonl"
    with opened_by_maker(data, tokenizers, split, options) as (stream, maker):
        length = len(stream) if first_tokens is None else min(first_tokens, len(stream))
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for text in documents_in(stream, maker, length):
                end = "\n" if ends_lines and not text.endswith("\n") else ""
                file.write(json.dumps({"text": text + end}) + "\n")
    return path


@contextmanager
def opened_by_maker(
    data: str | Path,
    tokenizers: Sequence[Tokenizer],
    split: Split | None,
    options: PrepareSettings | None,
) -> Iterator[tuple[TokenStream, Tokenizer]]:
    """Yield the tokens of DATA and the tokenizer that made them.

    A text is encoded by the first of the given ones, of those that mark the end of a document if
    there are any. ValueError for tokens that were made by an unknown tokenizer.
    """
    if not is_dataset(Path(data)):
        maker = min(tokenizers, key=lambda each: each.document_end is None)
        with opened_tokens(data, maker, maker.vocab_size, split=split, options=options) as stream:
            yield stream, maker
        return
    dataset = Dataset.open(Path(data))
    if dataset.fingerprint is None or not has_tokenizer(Path(data)):
        raise ValueError(
            f"{data} does not have the tokenizer that made it, so models of different tokenizers "
            "cannot be compared on it: use the text"
        )
    maker = load_tokenizer(Path(data))
    yield dataset.tokens_for(maker, maker.vocab_size, split), maker


def documents_in(stream: TokenStream, tokenizer: Tokenizer, length: int) -> Iterator[str]:
    """Yield the text of each document among the first tokens; bytes that are no text as U+FFFD.

    Special tokens stand for no text.
    """
    texts = tokenizer.pieces | dict.fromkeys(tokenizer.specials, b"")
    pieces: list[bytes] = []  # of the document so far
    for first in range(0, length, PART):
        ids = stream.read(first, min(first + PART, length))
        start = 0
        for end in [*np.flatnonzero(ids == tokenizer.document_end), len(ids)]:
            pieces += (texts.get(id, b"") for id in ids[start:end].tolist())
            if end < len(ids) and pieces:
                yield b"".join(pieces).decode("utf-8", errors="replace")
                pieces = []
            start = end + 1
    if pieces:
        yield b"".join(pieces).decode("utf-8", errors="replace")
