"""Convert tokenizers to GGUF's lists of tokens, types and merges, and back.

All of our tokenizers become a byte-level BPE that splits text as GPT-2's does, with the same ids in
llama.cpp. llama.cpp needs an end of text; if the tokenizer has none, it is the last id. Two things
differ: llama.cpp reads "<|endoftext|>" in text as the special token, and it skips characters that a
char tokenizer does not know.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from ..tokenizers import Tokenizer, Usage, character_level
from ..tokenizers.kinds import BYTES, SYMBOLS, splits_like
from ..tokenizers.tokenizer import END_OF_TEXT

KIND = "gptsmith.tokenizer"  # our key: "bpe", "byte" or "char"; llama.cpp ignores it
NO_MERGES = ["[no] [merges]"]  # llama.cpp needs a list, but the library cannot write an empty one
NORMAL, CONTROL, UNUSED = 1, 3, 5  # types of tokens

# Hugging Face's names, and llama.cpp's.
SPECIALS = {"bos": "bos", "eos": "eos", "pad": "padding"}
MORE_ENDS = ("eot", "eom")
TEMPLATE = "tokenizer.chat_template"
SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


# -- writing


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise ValueError if llama.cpp would not give the tokenizer's ids."""
    odd = [token["content"] for token in tokenizer.added]
    if tokenizer.kind == "bpe":
        model = tokenizer.spec["model"]
        switches = ("ignore_merges", "byte_fallback", "unk_token")
        affixes = ("continuing_subword_prefix", "end_of_word_suffix")
        odd += [name for name in (*switches, *affixes) if model.get(name)]
        if splits_like(tokenizer.spec) != "gpt2":
            odd.append("another pre-tokenizer")
    if odd:
        raise ValueError(
            f"the tokenizer has {odd[0]}, unlike GPT-2's: llama.cpp would give other ids"
        )


def write_tokenizer(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Add the tokenizer as a byte-level BPE that splits text as GPT-2's does."""
    texts = {id: token for token, id in tokenizer.vocab.items()}
    if tokenizer.kind == "char":
        texts = {id: symbols(token.encode()) for id, token in texts.items()}
    end = tokenizer.end_of_text
    if end is None:
        end = vocab_size - 1
        texts[end] = END_OF_TEXT
    controls = {end, *tokenizer.specials}
    tokens = [texts.get(id, f"[PAD{id}]") for id in range(vocab_size)]
    if len(set(tokens)) < len(tokens):
        raise ValueError("the tokenizer has a token [PAD...], the name that unused ids would get")
    types = [
        CONTROL if id in controls else NORMAL if id in texts else UNUSED for id in range(vocab_size)
    ]
    writer.add_string(KIND, tokenizer.kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges_of(tokenizer) or NO_MERGES)
    writer.add_add_bos_token(False)
    write_usage(writer, tokenizer, end)


def write_usage(writer: Any, tokenizer: Tokenizer, end: int) -> None:
    """Add the special tokens, chat templates and sampling defaults; `end` is the end of text."""
    usage, token = tokenizer.usage, dict[str, int]()
    for name, key in SPECIALS.items():
        token[key] = tokenizer.vocab.get(usage.tokenizer.get(f"{name}_token", ""), end)
    # llama.cpp ends a text at the end of a turn and of a message, too, one token each.
    others = sorted(tokenizer.ends - {token["eos"]})
    token |= dict(zip(MORE_ENDS, others, strict=False))
    for key, id in token.items():
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", id)
    if usage.templates:
        named = [{"name": name, "template": text} for name, text in usage.templates.items()]
        writer.add_chat_template(named)
    for name, key in SAMPLING.items():
        if isinstance(value := usage.generation.get(name), int | float):
            add = writer.add_int32 if name == "top_k" else writer.add_float32
            add(f"general.sampling.{key}", value)


def symbols(data: bytes) -> str:
    """Return bytes in GPT-2's printable alphabet."""
    return "".join(SYMBOLS[byte] for byte in data)


def merges_of(tokenizer: Tokenizer) -> list[str]:
    """Return the merges; for a char tokenizer, they join the bytes of each character in order."""
    if tokenizer.kind != "char":
        pairs = tokenizer.spec["model"]["merges"]
        return [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    found = dict[str, None]()
    for character in tokenizer.vocab:
        data = symbols(character.encode())
        found |= {f"{data[:at]} {data[at]}": None for at in range(1, len(data))}
    return list(found)


# -- reading


def read_tokenizer(path: Path, values: Mapping[str, Any], vocab_size: int) -> Tokenizer | None:
    """Return the tokenizer of a file; None if it has none, ValueError if it is not GPT-2's kind."""
    model = values.get("tokenizer.ggml.model", "none")
    if model in ("none", "no_vocab"):
        return None
    split = values.get("tokenizer.ggml.pre", "gpt-2")  # absent in files from before May 2024
    if (model, split) != ("gpt2", "gpt-2"):
        raise ValueError(
            f"{path} has the tokenizer {model!r}, {split!r}: only GPT-2's is supported"
        )
    try:
        return build_tokenizer(values, vocab_size)
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} has no valid tokenizer: {error}") from error


def build_tokenizer(values: Mapping[str, Any], vocab_size: int) -> Tokenizer:
    """Build the tokenizer from a header's lists."""
    kind = values.get(KIND, "bpe")
    tokens = values["tokenizer.ggml.tokens"][:vocab_size]
    types = values.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    pairs = values.get("tokenizer.ggml.merges", [])
    merges: Any = [] if pairs == NO_MERGES else [tuple(pair.split(" ")) for pair in pairs]
    vocab = {t: id for id, t in enumerate(tokens) if types[id] != UNUSED}
    if kind == "char":
        vocab = {bytes(BYTES[s] for s in token).decode(): id for token, id in vocab.items()}
        return character_level(vocab, usage_in(values, tokens))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=kind != "byte"
    )
    backend.decoder = decoders.ByteLevel()
    specials = [t for t, id in vocab.items() if types[id] == CONTROL or t == END_OF_TEXT]
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in specials])
    return Tokenizer(backend, usage_in(values, tokens))


def usage_in(values: Mapping[str, Any], tokens: Sequence[str]) -> Usage:
    """Return what a header says about the use of the model, as far as its vocabulary has it."""

    def token(key: str) -> int | None:
        id = values.get(f"tokenizer.ggml.{key}_token_id")
        return id if isinstance(id, int) and 0 <= id < len(tokens) else None

    specials = {f"{name}_token": token(key) for name, key in SPECIALS.items()}
    ends = sorted({id for key in ("eos", *MORE_ENDS) if (id := token(key)) is not None})
    found = {name: values.get(f"general.sampling.{key}") for name, key in SAMPLING.items()}
    sampling = {
        name: shortest(value) if isinstance(value, float) else value
        for name, value in found.items()
        if value is not None
    }
    named = {"default": TEMPLATE}
    named |= {name: f"{TEMPLATE}.{name}" for name in values.get(f"{TEMPLATE}s", [])}
    return Usage(
        {name: tokens[id] for name, id in specials.items() if id is not None},
        {"eos_token_id": ends, **sampling} if ends else sampling,
        {name: values[key] for name, key in named.items() if key in values},
    )


def shortest(number: float) -> float:
    """Return the shortest decimal of a float32: 1e-05 for 9.99999974e-06, its value in the file."""
    return float(str(np.float32(number)))
