"""Texts of different lengths, continued together: the logits after each, and what is kept of it.

Each row is read as if it were alone: within the context limit through the cache, beyond it whole.
Knows nothing of how a token is chosen, or of what the tokens stand for.

Shapes:  B batch    S tokens of the longest text    K tokens guessed    T tokens read at once
         R rows read together    V vocabulary
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.gpt import GPT
from .compiled import Decoder


class Rows:
    """The texts, (B, S), their lengths, and a cache of those within the context limit.

    A shorter text is filled up with its own first token: whoever looks for the tokens that a row
    has used finds no others.
    """

    def __init__(
        self, model: GPT, tokens: Tensor, lengths: Sequence[int], decoder: Decoder | None = None
    ) -> None:
        self.model, self.limit = model, model.config.context_length
        self.decoder = decoder
        self.lengths = list(lengths)
        places = torch.arange(max(lengths), device=tokens.device)
        beyond = places >= torch.tensor(self.lengths, device=tokens.device).unsqueeze(1)  # (B, S)
        self.text = torch.where(beyond, tokens[:, :1], tokens[:, : len(places)])
        self.cache: KVCache | None = None

    def make_cache(self, new_tokens: int) -> None:
        """Remember what is read, up to so many new tokens, of the rows that the limit allows."""
        within = [length for length in self.lengths if length <= self.limit]
        if within:
            self.cache = KVCache(
                self.model.config,
                len(self.lengths),
                capacity=min(self.limit, max(within) + new_tokens),
                dtype=self.model.dtype,
                device=self.model.device,
            )

    @torch.inference_mode()
    def next_logits(self, guessed: Tensor) -> Tensor:
        """The logits after each text, and after each guess for it.  (B, K) -> (B, K + 1, V)

        Guesses are for a single row, and need a cache.
        """
        if self.cache is None:
            return self.whole(range(len(self.lengths)))
        text = torch.cat([self.text, guessed], dim=1)
        K, past = guessed.shape[1], self.past()
        # A row past the limit goes along, at the cost of a token, and what it gets is replaced.
        ends = [1 if row in past else length + K for row, length in enumerate(self.lengths)]
        logits = self.read(text, self.cache.lengths, ends, K + 1, self.cache)
        if past:
            logits[past] = self.whole(past)
        return logits

    def past(self) -> list[int]:
        """The rows that are longer than the context limit."""
        return [row for row, length in enumerate(self.lengths) if length > self.limit]

    def whole(self, rows: Sequence[int]) -> Tensor:
        """The logits after some of the rows, of which the last context is read.  -> (R, 1, V)"""
        ends = [self.lengths[row] for row in rows]
        starts = [max(0, end - self.limit) for end in ends]
        return self.read(self.text[list(rows)], starts, ends, 1, None)

    def read(
        self,
        text: Tensor,
        starts: Sequence[int],
        ends: Sequence[int],
        places: int,
        cache: KVCache | None,
    ) -> Tensor:
        """Read each row from its start to its end, all in one pass: the logits after the last
        `places` tokens of each.  (B, S) -> (B, places, V)

        A shorter stretch is read with what follows it, which causality keeps from mattering.
        """
        spans = [end - start for start, end in zip(starts, ends, strict=True)]
        tokens = stretch(text, starts, max(spans))  # (B, T)
        last = [span - places for span in spans]
        if self.decoder is not None and cache is not None and self.decoder.takes(tokens):
            logits = self.decoder.next_logits(tokens, cache, max(spans) - min(last))
            return stretch(logits, [place - min(last) for place in last], places)
        features = self.model.features(tokens, cache)  # (B, T, C)
        return self.model.lm_head(stretch(features, last, places))

    def append(self, chosen: Tensor) -> None:
        """Add a token to each text.  (B,)"""
        new = chosen.unsqueeze(1)  # (B, 1)
        if min(self.lengths) == self.text.shape[1]:  # nothing is filled up
            self.text = torch.cat([self.text, new], dim=1)
        else:
            ends = torch.tensor(self.lengths, device=new.device).unsqueeze(1)  # (B, 1)
            text = torch.cat([self.text, self.text[:, :1]], dim=1)
            self.text = text.scatter(1, ends, new)
        self.lengths = [length + 1 for length in self.lengths]

    def settle(self) -> None:
        """Keep in the cache what is read and is text: no padding, no wrong guess, and nothing of
        rows past the limit, whose every position shifts from now on."""
        past = self.past()
        if len(past) == len(self.lengths):
            self.cache = None
        if self.cache is not None:
            self.cache.rewind([0 if n > self.limit else n - 1 for n in self.lengths])


def stretch(rows: Tensor, starts: Sequence[int], width: int) -> Tensor:
    """As many places of each row, from its own start.  (B, S, ...) -> (B, width, ...)"""
    if len(set(starts)) == 1:
        return rows[:, starts[0] : starts[0] + width]
    return torch.stack(
        [row[start : start + width] for row, start in zip(rows, starts, strict=True)]
    )
