"""How byte-level BPE made a token: its bytes, and then the merges one after another.

Knows nothing of how a text is split into words before.
"""

from collections.abc import Mapping
from itertools import pairwise

from .kinds import BYTES
from .tokenizer import Tokenizer


def merge_ranks(tokenizer: Tokenizer) -> dict[tuple[bytes, bytes], int]:
    """Return the order of the merges, by the two pieces that each puts together."""
    merges = tokenizer.spec["model"].get("merges", [])
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return {
        (bytes(BYTES[c] for c in left), bytes(BYTES[c] for c in right)): rank
        for rank, (left, right) in enumerate(pairs)
    }


def merge_steps(piece: bytes, ranks: Mapping[tuple[bytes, bytes], int]) -> list[list[bytes]]:
    """Return the pieces of a token from its single bytes on, after each merge.

    Merging its bytes alone gives the token, whatever was beside it in a word: no merge crossed its
    bounds, or it would be another token. The last step has several pieces if no merges make it, as
    those of an added token.
    """
    pieces = [bytes([byte]) for byte in piece]
    steps = [pieces]
    while known := [pair for pair in pairwise(pieces) if pair in ranks]:
        first = min(known, key=ranks.__getitem__)
        pieces = merged(pieces, first)
        steps.append(pieces)
    return steps


def merged(pieces: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Return the pieces with every occurrence of the pair put together, from the left."""
    result, i = [], 0
    while i < len(pieces):
        together = tuple(pieces[i : i + 2]) == pair
        result.append(b"".join(pieces[i : i + 1 + together]))
        i += 1 + together
    return result
