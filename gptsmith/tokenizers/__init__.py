"""Text to ids and back: characters, bytes, GPT-2's own vocabulary, or one learned from your text.

Every tokenizer is a `tokenizer.json` of the `tokenizers` library, so other tools read it too.
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
from .tokenizer import Decoder, Tokenizer, load_tokenizer

__all__ = [
    "Decoder",
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
