"""Tokenizers of characters, of bytes, with GPT-2's vocabulary, or learned from your text.

Each is saved as a `tokenizer.json` of the `tokenizers` library, so other tools can read it.
"""

from .build import (
    byte_tokenizer,
    char_tokenizer,
    character_level,
    gpt2_tokenizer,
    learn_bpe,
    open_tokenizer,
    tokenizer_in,
)
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Tokenizer",
    "byte_tokenizer",
    "char_tokenizer",
    "character_level",
    "gpt2_tokenizer",
    "learn_bpe",
    "load_tokenizer",
    "open_tokenizer",
    "tokenizer_in",
]
