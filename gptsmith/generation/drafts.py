"""Guesses of the next tokens, made cheaply: from the text itself, or by a smaller model.

The large model then reads several guesses in one pass, which costs little more than reading one
token. A guess decides nothing: what is not the model's own choice is thrown away.

Shapes:  S tokens so far    K tokens guessed
"""

from typing import Protocol

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.gpt import GPT

LONGEST_MATCH = 4  # tokens that a passage is recognised by


class Draft(Protocol):
    """Whatever guesses."""

    def guess(self, tokens: Tensor, most: int) -> Tensor:
        """Up to `most` tokens that may follow; none is a guess too.  (S,) -> (K,)"""
        ...


class FromText:
    """Guesses that a passage goes on as it did before: good for code, lists, quotations, edits."""

    def guess(self, tokens: Tensor, most: int) -> Tensor:
        """What followed the last place where the text stood as it stands now.  (S,) -> (K,)"""
        for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
            earlier = tokens[:-1].unfold(0, length, 1)  # (S - length, length)
            places = (earlier == tokens[-length:]).all(dim=1).nonzero()  # (found, 1)
            if len(places):
                start = int(places[-1]) + length
                return tokens[start : start + most]
        return tokens[:0]


class FromModel:
    """Guesses what a smaller model of the same tokens finds likeliest."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.cache = KVCache(model.config, 1, dtype=model.dtype, device=model.device)
        self.read = torch.empty(0, dtype=torch.long, device=model.device)  # what the cache holds

    @torch.inference_mode()
    def guess(self, tokens: Tensor, most: int) -> Tensor:
        """The smaller model's greedy continuation, as far as its context reaches.  (S,) -> (K,)"""
        most = min(most, self.model.config.context_length - len(tokens))
        known = min(len(self.read), len(tokens) - 1)  # the last is read again, for its logits
        same = (self.read[:known] == tokens[:known]).long().cumprod(0).sum()
        self.cache.rewind(int(same))
        text = tokens
        for _ in range(most):
            unread = text[self.cache.length :]
            features = self.model.features(unread.unsqueeze(0), self.cache)[:, -1]
            likeliest = self.model.lm_head(features).argmax(dim=-1)  # (1,)
            text = torch.cat([text, likeliest])
        self.read = text[: self.cache.length]
        return text[len(tokens) :]
