"""Drafts for speculative decoding: guesses of the next tokens, from the text or a smaller model.

The large model reads all guessed tokens in one forward pass, which costs little more than reading
one. It keeps those that it would have chosen itself, so the text does not depend on the draft.

Shapes:  S tokens so far    K tokens guessed
"""

from typing import Protocol

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.gpt import GPT

LONGEST_MATCH = 4  # last tokens to look for earlier in the text


class Draft(Protocol):
    """Anything that guesses the next tokens."""

    def guess(self, tokens: Tensor, most: int) -> Tensor:
        """Guess the next tokens: 0 to `most` of them.  (S,) -> (K,)"""
        ...


class FromText:
    """Guesses that the text repeats itself (prompt lookup): good for code, lists and quotations."""

    def guess(self, tokens: Tensor, most: int) -> Tensor:
        """Return what followed the latest earlier occurrence of the last tokens.  (S,) -> (K,)"""
        for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
            earlier = tokens[:-1].unfold(0, length, 1)  # (S - length, length)
            matches = (earlier == tokens[-length:]).all(dim=1).nonzero()  # (matches, 1)
            if len(matches):
                start = int(matches[-1]) + length
                return tokens[start : start + most]
        return tokens[:0]


class FromModel:
    """Guesses the greedy continuation of a smaller model with the same tokenizer."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.cache = KVCache(model.config, 1, dtype=model.dtype, device=model.device)
        self.read = torch.empty(0, dtype=torch.long, device=model.device)  # the tokens in the cache

    @torch.inference_mode()
    def guess(self, tokens: Tensor, most: int) -> Tensor:
        """Return the smaller model's greedy continuation, within its context.  (S,) -> (K,)"""
        most = min(most, self.model.config.context_length - len(tokens))
        known = min(len(self.read), len(tokens) - 1)  # the last token is read for its logits
        shared = (self.read[:known] == tokens[:known]).long().cumprod(0).sum()
        self.cache.rewind(int(shared))
        text = tokens
        for _ in range(most):
            unread = text[self.cache.length :]
            features = self.model.features(unread.unsqueeze(0), self.cache)[:, -1]
            likeliest = self.model.lm_head(features).argmax(dim=-1)  # (1,)
            text = torch.cat([text, likeliest])
        self.read = text[: self.cache.length]
        return text[len(tokens) :]
