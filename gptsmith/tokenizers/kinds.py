"""What a `tokenizer.json` describes: characters, bytes or a BPE, and how it splits text.

Knows nothing of encoding.
"""

import json
from collections.abc import Mapping
from typing import Any


def bytes_to_symbols() -> dict[int, str]:
    """Return GPT-2's alphabet: the printable character that stands for each byte in BPE files.

    Printable Latin-1 characters stand for themselves; other bytes get characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


SYMBOLS = bytes_to_symbols()
BYTES = {symbol: byte for byte, symbol in SYMBOLS.items()}


def kind_of(spec: Mapping[str, Any]) -> str:
    """Return "char", "byte" or "bpe"; ValueError for any other kind of tokenizer."""
    model, splitter = spec["model"], spec["pre_tokenizer"]
    if model["type"] != "BPE" or spec["normalizer"] is not None:
        got = model["type"] if model["type"] != "BPE" else "a normalizer"
        raise ValueError(
            f"the tokenizer has {got}: only byte-level BPE, byte and char are supported"
        )
    added = [token["content"] for token in spec["added_tokens"] if not token["special"]]
    if splitter is None and not model["merges"]:
        if added:
            raise ValueError(
                f"the char tokenizer has an added token, {added[0]!r}: only single characters and "
                "special tokens are supported"
            )
        return "char"
    if splits_like(spec) == "bytes" and not model["merges"]:
        return "byte"
    for token in added:  # found in text as it is, but as a token of BPE it stands for other bytes
        if token in model["vocab"] and not token.isascii():
            raise ValueError(
                f"the tokenizer's added token {token!r} is a token of its BPE too, with other text"
            )
    specials = {token["content"] for token in spec["added_tokens"]}
    characters = {*"".join(model["vocab"].keys() - specials)}
    if characters - BYTES.keys() or splits_like(spec) is None:
        raise ValueError(
            "the tokenizer is a BPE, but not a byte-level one: only those are supported"
        )
    return "bpe"


def splitting_steps(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rules that split text before merging, in their order."""
    splitter = spec["pre_tokenizer"]
    if splitter is None:
        return []
    return splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]


def adds_prefix_space(spec: Mapping[str, Any]) -> bool:
    """Return whether a space is put before a text that begins without one."""
    return any(step.get("add_prefix_space") for step in splitting_steps(spec))


def splits_like(spec: Mapping[str, Any]) -> str | None:
    """Return how text is split before merging: "gpt2", "bytes" (not at all), or the rules as JSON.

    None if text is not converted to bytes.
    """
    steps = splitting_steps(spec)
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    if not levels:
        return None
    if len(steps) == 1 and not levels[0]["add_prefix_space"]:
        return "gpt2" if levels[0].get("use_regex", True) else "bytes"
    # `trim_offsets` affects only offsets, which we do not use.
    plain = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    return json.dumps(plain, sort_keys=True)


def mergeable_by_rank(spec: Mapping[str, Any], vocab: Mapping[str, int]) -> bool:
    """Return whether tiktoken, which merges in the order of token ids, gives this BPE's ids.

    It does if ids grow in the order of the merges, every merge gives a new token, text is split as
    GPT-2 does, and no text has a token that was added for it.
    """
    model = spec["model"]
    plain = not (model.get("ignore_merges") or model.get("byte_fallback"))
    results = [vocab.get("".join(pair), -1) for pair in model["merges"]]
    added = spec["added_tokens"]
    singles = [vocab.get(symbol, -1) for symbol in BYTES]
    return (
        plain
        and all(token["special"] for token in added)
        and splits_like(spec) == "gpt2"
        and min(singles) >= 0
        and all(a < b for a, b in zip([max(singles), *results], results, strict=False))
        and len(added) + 256 + len(results) == len(vocab)
    )
