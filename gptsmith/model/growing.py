"""Give a model rows for more tokens. Knows nothing of what the tokens are.

Shapes:  V vocabulary before    W vocabulary after    C channels
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from .gpt import GPT


def grow_vocabulary(model: GPT, vocab_size: int) -> None:
    """Let a model's embedding and head have at least `vocab_size` rows, in place.

    A new row is the mean of the others, so that no new token begins as a likely one. An embedding
    that is padded already, as nanoGPT's to 50,304 rows, may have room.
    """
    if vocab_size <= model.config.vocab_size:
        return
    model.wte.weight = grown(model.wte.weight, vocab_size)
    model.wte.num_embeddings = vocab_size
    if not model.config.tie_weights:
        model.lm_head.weight = grown(model.lm_head.weight, vocab_size)
    model.lm_head.out_features = vocab_size
    model.config = replace(model.config, vocab_size=vocab_size)
    model.tie_weights()


@torch.no_grad()
def grown(weight: Tensor, rows: int) -> nn.Parameter:
    """Return weights with more rows, each the mean of those that there are.  (V, C) -> (W, C)"""
    mean = weight.mean(0, keepdim=True)
    return nn.Parameter(torch.cat([weight, mean.expand(rows - len(weight), -1)]))
