"""Tokenizers of characters, of bytes, with GPT-2's vocabulary, or learned from your text.

Each is saved as a `tokenizer.json` of the `tokenizers` library, so other tools can read it.
"""

from .build import (
    byte_tokenizer,
    char_tokenizer,
    character_level,
    gpt2_tokenizer,
    has_tokenizer,
    learn_bpe,
    load_tokenizer,
    open_tokenizer,
    with_special,
)
from .tokenizer import Tokenizer
from .usage import Usage, read_usage

__all__ = [
    "Tokenizer",
    "Usage",
    "byte_tokenizer",
    "char_tokenizer",
    "character_level",
    "gpt2_tokenizer",
    "has_tokenizer",
    "learn_bpe",
    "load_tokenizer",
    "open_tokenizer",
    "read_usage",
    "with_special",
]
