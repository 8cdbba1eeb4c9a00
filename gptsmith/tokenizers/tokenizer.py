"""One small interface over the `tokenizers` library: encode, decode, save, load.

Knows nothing of where a vocabulary comes from (`build.py`) or of models and tensors.
"""

import codecs
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken
import tokenizers

END_OF_TEXT = "<|endoftext|>"
Unknown = Literal["error", "skip"]
ABSENT = np.iinfo(np.uint32).max  # in the table of a char tokenizer: no such character

# GPT-2's pre-tokenizer, as tiktoken writes it; `tokenizers` has the same one, as "ByteLevel".
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def bytes_to_symbols() -> dict[int, str]:
    """GPT-2's alphabet: a printable character for each byte, in which BPE files are written.

    Printable Latin-1 stands for itself; the other bytes get the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


SYMBOLS = bytes_to_symbols()
BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


class Tokenizer:
    """Text to ids and back; never changes once made, and threads may share it."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True  # text that looks like <|endoftext|> stays text
        self.backend = backend
        self.vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self.vocab.values()) + 1
        self.end_of_text: int | None = self.vocab.get(END_OF_TEXT)
        self.spec: dict[str, Any] = json.loads(backend.to_str())
        self.kind = kind_of(self.spec)
        self._lock = threading.Lock()

    # -- what it does

    @cached_property
    def specials(self) -> dict[int, str]:
        """The special tokens, which stand for no text."""
        return {t["id"]: t["content"] for t in self.spec["added_tokens"] if t["special"]}

    @cached_property
    def pieces(self) -> dict[int, bytes]:
        """The bytes that each id stands for."""
        if self.kind == "char":
            return {id: token.encode() for token, id in self.vocab.items()}
        return {
            id: token.encode() if id in self.specials else bytes(BYTES[c] for c in token)
            for token, id in self.vocab.items()
        }

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of what the tokenizer does: pieces, merges, pre-tokenizer, special ids.

        Two files that say the same in other words have one fingerprint.
        """
        merges = self.spec["model"].get("merges", [])
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        does = {
            "pieces": {str(id): self.pieces[id].hex() for id in sorted(self.pieces)},
            "merges": pairs,
            "splits": "characters" if self.kind == "char" else splits_like(self.spec),
            "specials": {str(id): self.specials[id] for id in sorted(self.specials)},
        }
        return hashlib.sha256(json.dumps(does, ensure_ascii=True).encode()).hexdigest()

    @property
    def splits_at_spaces(self) -> bool:
        """Whether text may be cut before any space that follows a non-space, with the same ids."""
        return self.kind in ("char", "byte") or splits_like(self.spec) == "gpt2"

    # -- text to ids

    def encode(self, text: str, *, unknown: Unknown = "error") -> list[int]:
        """The ids of a text; ValueError for a lone surrogate or an unknown character."""
        refuse_surrogates(text)
        if self.kind == "char":
            return self._encode_characters(text, unknown).tolist()
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_array(self, text: str, *, unknown: Unknown = "error") -> np.ndarray:
        """`encode` for bulk: uint16, or uint32 where the vocabulary needs it; threads run side by
        side, and BPE goes through tiktoken, which is several times faster with the same ids."""
        refuse_surrogates(text)
        if self.kind == "char":
            ids = self._encode_characters(text, unknown)
        elif self.kind == "byte":
            ids = self._byte_table[np.frombuffer(text.encode(), np.uint8)]
        elif self._tiktoken is not None:
            ids = self._tiktoken.encode_to_numpy(text, disallowed_special=())
        else:
            ids = np.array(self.backend.encode(text, add_special_tokens=False).ids)
        return ids.astype(self.dtype)

    def encode_together(self, texts: Sequence[str]) -> list[np.ndarray] | None:
        """`encode_array` of many short texts by one call, or None where that is not possible.

        Threads that come back from tiktoken thousands of times a second wait for one another.
        """
        bpe = None if self.kind in ("char", "byte") else self._tiktoken
        joined = END_OF_TEXT.join(texts)
        if bpe is None or self.end_of_text is None or joined.count(END_OF_TEXT) != len(texts) - 1:
            return None
        refuse_surrogates(joined)
        ids = bpe.encode_to_numpy(joined, allowed_special={END_OF_TEXT}, disallowed_special=())
        ids = ids.astype(self.dtype)
        ends = np.flatnonzero(ids == self.end_of_text)  # no text alone makes this id
        starts = [0, *(ends + 1)]
        return [ids[start:end] for start, end in zip(starts, [*ends, len(ids)], strict=True)]

    @property
    def dtype(self) -> type:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.uint16 if self.vocab_size <= 1 << 16 else np.uint32

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
        """Code point to id; the last entry stands for all beyond."""
        characters = {ord(token): id for token, id in self.vocab.items() if len(token) == 1}
        table = np.full(max(characters) + 2, ABSENT, np.uint32)
        for code, id in characters.items():
            table[code] = id
        return table

    @cached_property
    def _byte_table(self) -> np.ndarray:
        """Byte to id."""
        return np.array([self.vocab[SYMBOLS[byte]] for byte in range(256)], np.uint32)

    @property
    def _tiktoken(self) -> tiktoken.Encoding | None:
        with self._lock:  # a cached_property may run twice in two threads; this one is slow
            return self._tiktoken_encoding

    @cached_property
    def _tiktoken_encoding(self) -> tiktoken.Encoding | None:
        """The same BPE for tiktoken; None where it could not promise the same ids."""
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
        """The text of some ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, id: int) -> bytes:
        """The bytes that an id stands for; none for an id that the model has, but no token."""
        return self.pieces.get(int(id), b"")

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, (V,); a special token for none."""
        lengths = np.zeros(self.vocab_size, np.int64)
        for id, piece in self.pieces.items():
            lengths[id] = 0 if id in self.specials else len(piece)
        return lengths

    def decoder(self) -> "Decoder":
        """A decoder for ids that come one at a time."""
        return Decoder(self)

    # -- on disk

    def save(self, folder: Path, *, model_max_length: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as Hugging Face loads them."""
        end = None if self.end_of_text is None else END_OF_TEXT
        config: dict[str, Any] = {
            # transformers 5 would take a folder that says gpt2 for GPT-2's own tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
        }
        if model_max_length is not None:
            config["model_max_length"] = model_max_length
        (folder / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        text = json.dumps({k: v for k, v in config.items() if v is not None}, indent=2)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


class Decoder:
    """Ids to text, one at a time: a character comes out once all of its bytes are in."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that this id completes, which may be none."""
        return self.utf8.decode(self.tokenizer.token_bytes(id))

    @property
    def whole(self) -> bool:
        """Whether no character waits for the rest of its bytes."""
        return not self.utf8.getstate()[0]

    def flush(self) -> str:
        """What is left when no more comes: U+FFFD for half a character, or nothing."""
        return self.utf8.decode(b"", final=True)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder with a `tokenizer.json`: char, byte, or a byte-level BPE."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no tokenizer.json")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is not a tokenizer: {error}") from error
    try:
        return Tokenizer(backend)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def refuse_surrogates(text: str) -> None:
    """ValueError where a text holds half of a UTF-16 pair, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise ValueError(
            f"the text has a lone surrogate, U+{ord(text[at]):04X}, at position {at:,}: "
            "it is not valid Unicode; remove it"
        ) from None


# -- what a tokenizer.json says


def kind_of(spec: Mapping[str, Any]) -> str:
    """ "char", "byte" or "bpe"; ValueError for a tokenizer that works in another way."""
    model, splitter = spec["model"], spec["pre_tokenizer"]
    if model["type"] != "BPE" or spec["normalizer"] is not None:
        got = model["type"] if model["type"] != "BPE" else "a normalizer"
        raise ValueError(
            f"the tokenizer has {got}: only byte-level BPE, byte and char are understood"
        )
    if splitter is None and not model["merges"]:
        return "char"
    if splits_like(spec) == "bytes" and not model["merges"]:
        return "byte"
    specials = {token["content"] for token in spec["added_tokens"]}
    odd = [t for t in model["vocab"] if t not in specials and not all(c in BYTES for c in t)]
    if odd or splits_like(spec) is None:
        raise ValueError("the tokenizer is a BPE that is not byte-level, which GPT-2's are")
    return "bpe"


def splits_like(spec: Mapping[str, Any]) -> str | None:
    """How text is split before merging: "gpt2", "bytes" (not at all), or the rule in full.

    None where it is not turned into bytes.
    """
    splitter = spec["pre_tokenizer"]
    if splitter is None:
        return None
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if not levels:
        return None
    if len(steps) == 1 and not levels[0]["add_prefix_space"]:
        return "gpt2" if levels[0].get("use_regex", True) else "bytes"
    # `trim_offsets` only moves the offsets, which are not used.
    plain = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    return json.dumps(plain, sort_keys=True)


def mergeable_by_rank(spec: Mapping[str, Any], vocab: Mapping[str, int]) -> bool:
    """Whether tiktoken, which merges by the ids of the results, gives this BPE's ids.

    So it does where ids grow in the order of the merges, every merge makes another token, and the
    text is split as GPT-2 splits it.
    """
    model = spec["model"]
    plain = not (model.get("ignore_merges") or model.get("dropout") or model.get("byte_fallback"))
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    results = [vocab.get("".join(pair), -1) for pair in pairs]
    specials = {token["id"] for token in spec["added_tokens"]}
    singles = [vocab.get(symbol, -1) for symbol in BYTES]
    return (
        plain
        and splits_like(spec) == "gpt2"
        and min(singles) >= 0
        and all(a < b for a, b in zip([max(singles), *results], results, strict=False))
        and len(specials) + 256 + len(results) == len(vocab)
    )
