"""A small interface to the `tokenizers` library: encode, decode, save.

Knows nothing of where a vocabulary comes from (`build.py`), or of models and tensors.
"""

import codecs
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken
import tokenizers

from ..machine.files import write_json
from .kinds import (
    BYTES,
    SYMBOLS,
    adds_prefix_space,
    kind_of,
    mergeable_by_rank,
    splits_like,
)
from .usage import GENERATION, TOKENIZER, Usage, write_templates

END_OF_TEXT = "<|endoftext|>"
Unknown = Literal["error", "skip"]
ABSENT = np.iinfo(np.uint32).max  # marks unknown characters in the table of a char tokenizer

# GPT-2's pre-tokenizer as tiktoken writes it; in `tokenizers` it is "ByteLevel".
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """Converts text to ids and back. Immutable, so threads may share it."""

    def __init__(self, backend: tokenizers.Tokenizer, usage: Usage | None = None) -> None:
        """`usage` is what a folder says beside the vocabulary."""
        backend.encode_special_tokens = True  # text that looks like <|endoftext|> stays text
        switch_off_what_varies(backend)
        self.backend = backend
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values()) + 1
        self.end_of_text: int | None = self.vocab.get(END_OF_TEXT)
        self.spec: dict[str, Any] = json.loads(backend.to_str())
        self.kind = kind_of(self.spec)
        self.usage = usage or Usage()

    # -- properties

    @cached_property
    def specials(self) -> dict[int, str]:
        """The special tokens, which stand for no text."""
        return {t["id"]: t["content"] for t in self.spec["added_tokens"] if t["special"]}

    @cached_property
    def added(self) -> list[dict[str, Any]]:
        """The tokens that were added for a text of their own, which is found before splitting."""
        return [token for token in self.spec["added_tokens"] if not token["special"]]

    @cached_property
    def cuts_at_spaces(self) -> bool:
        """Whether a text may be cut before white space, as far as added tokens are concerned."""
        return not any(
            token["lstrip"] or token["rstrip"] or re.search(r"\s", token["content"])
            for token in self.added
        )

    @cached_property
    def ends(self) -> frozenset[int]:
        """The ids that end a text: <|endoftext|>, and those that the folder names."""
        named = self.usage.generation.get("eos_token_id")
        ids = named if isinstance(named, list) else [named]
        ids = [*ids, self.end_of_text, self.vocab.get(self.usage.tokenizer.get("eos_token", ""))]
        return frozenset(id for id in ids if type(id) is int and 0 <= id < self.vocab_size)

    @property
    def document_end(self) -> int | None:
        """The id after each document in training data: <|endoftext|>, or what the folder names."""
        named = self.vocab.get(self.usage.tokenizer.get("eos_token", ""))
        return named if self.end_of_text is None else self.end_of_text

    @cached_property
    def pieces(self) -> dict[int, bytes]:
        """The bytes that each id stands for."""
        plain = self.vocab if self.kind == "char" else self.specials.values()
        own = {*plain, *(token["content"] for token in self.added)}  # written as they are
        return {
            id: token.encode() if token in own else bytes(BYTES[c] for c in token)
            for token, id in self.vocab.items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the tokenizer's behaviour: pieces, merges, pre-tokenizer, special ids.

        Files that describe the same tokenizer differently have the same fingerprint.
        """
        does = {
            "pieces": {str(id): self.pieces[id].hex() for id in sorted(self.pieces)},
            "merges": self.spec["model"].get("merges", []),
            "splits": "characters" if self.kind == "char" else splits_like(self.spec),
            "specials": {str(id): self.specials[id] for id in sorted(self.specials)},
        }
        if self.added:
            does["added"] = self.added
        return hashlib.sha256(json.dumps(does, ensure_ascii=True).encode()).hexdigest()

    def padding_with(self, token: str) -> "Tokenizer":
        """Return the same tokenizer with another padding token, for tools that make batches."""
        named = {**self.usage.tokenizer, "pad_token": token}
        return Tokenizer(self.backend, replace(self.usage, tokenizer=named))

    # -- text to ids

    def encode(self, text: str, *, unknown: Unknown = "error") -> list[int]:
        """Return the ids of a text; ValueError for a lone surrogate or an unknown character."""
        refuse_surrogates(text)
        if self.kind == "char":
            return self._encode_characters(text, unknown).tolist()
        return self._encode_by_library(text)

    def encode_array(self, text: str, *, unknown: Unknown = "error") -> np.ndarray:
        """Encode much text into an array of uint16, or uint32 if the vocabulary needs it.

        Threads can run in parallel. BPE uses tiktoken if it gives the same ids, several times
        faster.
        """
        refuse_surrogates(text)
        if self.kind == "char":
            ids = self._encode_characters(text, unknown)
        elif self.kind == "byte" and not self.added:
            ids = self._byte_table[np.frombuffer(text.encode(), np.uint8)]
        elif self._tiktoken is not None:
            ids = self._tiktoken.encode_to_numpy(text, disallowed_special=())
        else:
            ids = np.array(self._encode_by_library(text))
        return ids.astype(self.dtype)

    def encode_together(self, texts: Sequence[str]) -> list[np.ndarray] | None:
        """As `encode_array`, for many short texts in one call; None if that is impossible.

        Threads that return from tiktoken thousands of times per second wait for Python's lock.
        """
        bpe = None if self.kind in ("char", "byte") else self._tiktoken
        joined = END_OF_TEXT.join(texts)
        if bpe is None or self.end_of_text is None or joined.count(END_OF_TEXT) != len(texts) - 1:
            return None
        refuse_surrogates(joined)
        ids = bpe.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        ids = ids.astype(self.dtype)
        ends = np.flatnonzero(ids == self.end_of_text)  # ordinary text never gives this id
        starts = [0, *(ends + 1)]
        return [ids[start:end] for start, end in zip(starts, [*ends, len(ids)], strict=True)]

    @property
    def dtype(self) -> type:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

    def _encode_by_library(self, text: str) -> list[int]:
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:  # a panic in Rust is no Exception, and has no class to name
            if type(error).__name__ != "PanicException":
                raise
            names = ", ".join(repr(token["content"]) for token in self.added)
            raise ValueError(
                f"the tokenizers library cannot find the added tokens ({names}) in this text, and "
                f"fails with {str(error)!r}: leave out those that are or strip spaces"
            ) from error

    def _encode_characters(self, text: str, unknown: Unknown) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        table = self._character_table
        ids = table[np.minimum(codes, len(table) - 1)]
        if (missing := ids == ABSENT).any():
            if unknown == "skip":
                return ids[~missing]
            at = int(missing.argmax())
            raise ValueError(
                f"unknown character {text[at]!r} (U+{ord(text[at]):04X}) at position {at:,}: this "
                f"tokenizer knows {len(self.vocab)} characters; leave it out"
            )
        return ids

    @cached_property
    def _character_table(self) -> np.ndarray:
        """The id of each code point; the last entry is for all that follow."""
        characters = {ord(token): id for token, id in self.vocab.items() if len(token) == 1}
        table = np.full(max(characters) + 2, ABSENT, np.uint32)
        for code, id in characters.items():
            table[code] = id
        return table

    @cached_property
    def _byte_table(self) -> np.ndarray:
        """The id of each byte."""
        return np.array([self.vocab[SYMBOLS[byte]] for byte in range(256)], np.uint32)

    @cached_property
    def _tiktoken(self) -> tiktoken.Encoding | None:
        """The same BPE in tiktoken; None if its ids might differ."""
        if not mergeable_by_rank(self.spec, self.vocab):
            return None
        ranks = {piece: id for id, piece in self.pieces.items() if id not in self.specials}
        return tiktoken.Encoding(
            "gptsmith",
            pat_str=GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens={text: id for id, text in self.specials.items()},
        )

    # -- ids to text

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of an id; empty for an id that is only in the model's vocabulary."""
        return self.pieces.get(int(id), b"")

    def byte_lengths(self) -> np.ndarray:
        """Return the number of text bytes of each id, (V,); 0 for special tokens."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for id, piece in self.pieces.items():
            lengths[id] = 0 if id in self.specials else len(piece)
        return lengths

    def decoder(self) -> "TextDecoder":
        """Return a decoder for ids that arrive one at a time."""
        return TextDecoder(self)

    # -- on disk

    def save(self, folder: Path, *, context_length: int | None = None) -> None:
        """Write `tokenizer.json` and what belongs to it, in Hugging Face's form."""
        usage, end = self.usage, None if self.end_of_text is None else END_OF_TEXT
        config = usage.tokenizer_config(self.vocab, end=end, context_length=context_length)
        if adds_prefix_space(self.spec):  # transformers 4 believes this file, 5 the other
            config["add_prefix_space"] = True
        text = self.backend.to_str(pretty=True)
        (folder / "tokenizer.json").write_text(text, encoding="utf-8", newline="\n")
        write_json(folder / TOKENIZER, config)
        write_templates(usage.templates, folder)
        if usage.generation:  # a model's folder gets further defaults, by its context
            write_json(folder / GENERATION, usage.generation)


class TextDecoder:
    """Converts ids to text one at a time; a character appears once all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Return the text that an id completes, which may be empty."""
        return self.utf8.decode(self.tokenizer.token_bytes(id))

    @property
    def whole(self) -> bool:
        """Whether no character is incomplete."""
        return not self.utf8.getstate()[0]

    def flush(self) -> str:
        """Return the rest at the end of the ids: U+FFFD for an incomplete character, or ""."""
        return self.utf8.decode(b"", final=True)


def switch_off_what_varies(backend: tokenizers.Tokenizer) -> None:
    """Make the ids of a text depend on the text alone.

    transformers saves the truncation and the padding of its last call; BPE dropout is random.
    """
    backend.no_truncation()
    backend.no_padding()
    model = backend.model
    if isinstance(model, tokenizers.models.BPE) and model.dropout:
        warnings.warn(
            f"the tokenizer has a BPE dropout of {model.dropout:.3g}, which gives a text other ids "
            "each time: it is switched off",
            stacklevel=4,
        )
        model.dropout = None


def refuse_surrogates(text: str) -> None:
    """Raise ValueError if a text has a lone surrogate, which no encoding can represent."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise ValueError(
            f"the text has a lone surrogate, U+{ord(text[at]):04X}, at position {at:,}: "
            "it is not valid Unicode; remove it"
        ) from None
