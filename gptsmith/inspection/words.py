"""Text and tokens: a prompt as ids, and what an id is called and how it was made."""

from typing import Any

from ..config.fields import SettingError
from ..tokenizers import Tokenizer
from ..tokenizers.merging import merge_ranks, merge_steps


def prompt_tokens(
    tokenizer: Tokenizer, text: str, context_length: int, name: str = "prompt"
) -> list[int]:
    """Return the ids of a prompt; SettingError if it is empty, or longer than the context."""
    ids = tokenizer.encode(text)
    if not 0 < len(ids) <= context_length:
        raise SettingError(
            name, f"has {len(ids):,} tokens: from 1 to {context_length:,}, the context, are needed"
        )
    return ids


def single_token(tokenizer: Tokenizer, text: str, name: str) -> int:
    """Return the id of a text that is one token; SettingError with the tokens that it is."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([id])) for id in ids)
        these = f" ({pieces})" if ids else ""
        raise SettingError(name, f"is {text!r}, which is {len(ids)} tokens{these}: name one token")
    return ids[0]


class Words:
    """What each id is called, with a cache: the same ids occur at many places."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ranks = tokenizer, merge_ranks(tokenizer)
        self.known: dict[int, dict[str, Any]] = {}

    def named(self, id: Any) -> dict[str, Any]:
        """Return an id and its text; bytes that are no whole character are written as \\xe2."""
        id = int(id)
        if id not in self.known:
            piece = self.tokenizer.token_bytes(id)
            text = piece.decode(errors="backslashreplace") if piece else f"[{id}]"
            self.known[id] = {"id": id, "text": text}
        return self.known[id]

    def about(self, id: int) -> dict[str, Any]:
        """Return an id, its text, its bytes, and the pieces after each merge that made it."""
        piece = self.tokenizer.token_bytes(id)
        plain = id in self.tokenizer.specials or self.tokenizer.kind != "bpe"
        steps = [] if plain else merge_steps(piece, self.ranks)
        merges = [[each.decode(errors="backslashreplace") for each in step] for step in steps]
        return {**self.named(id), "bytes": list(piece), "merges": merges}
