"""How well a model predicts a text: one full pass, token by token.

Every window is read once, in order, and every token weighs the same, so two evaluations of one
model agree whatever the batch size, and two models can be compared.

Shapes:  R rows    T tokens (the context length)    V vocabulary
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..config.fields import SettingError
from ..config.settings import PrepareSettings, Split
from ..data.batches import Tokens
from ..data.tokens import opened_tokens
from ..machine.processes import my_share, sum_of_numbers
from ..model.gpt import GPT
from ..tokenizers import Tokenizer

ROW_TOKENS = 8192  # tokens computed at once; only speed and memory depend on it


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a text found."""

    loss: float  # nats per token
    tokens: int  # targets that were counted
    bytes: int | None  # bytes of text they stand for; None without a tokenizer

    @property
    def perplexity(self) -> float:
        """How many equally likely tokens the model is torn between."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed per byte of text: comparable between tokenizers."""
        if not self.bytes:
            return None
        return self.loss * self.tokens / math.log(2) / self.bytes

    def __str__(self) -> str:
        bits = "unknown" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"
        return (
            f"loss           {self.loss:.4f} nats per token\n"
            f"perplexity     {self.perplexity:.2f}\n"
            f"bits per byte  {bits}\n"
            f"tokens         {self.tokens:,}"
        )


def evaluate(
    model: GPT,
    tokenizer: Tokenizer | None,
    data: str | Path,
    *,
    split: Split | None = None,
    tokens: int | None = None,
    context_length: int | None = None,
    text: PrepareSettings | None = None,
) -> Evaluation:
    """How well a model predicts DATA: a source, which is read whole, or a folder of `prepare`'s.

    Of prepared data `split` is evaluated, by default what was held out; `tokens` limits it to the
    first so many. `context_length` is the window, by default the model's. `text` says how files are
    read. ValueError where the data does not suit the model.
    """
    limit = model.config.context_length
    if context_length is not None and not 1 <= context_length <= limit:
        problem = f"is {context_length}: 1 to the model's {limit} is needed"
        raise SettingError("context_length", problem)
    with opened_tokens(
        data, tokenizer, model.config.vocab_size, split=split, options=text
    ) as stream:
        return evaluate_tokens(
            model,
            stream,
            tokenizer=tokenizer,
            first_tokens=tokens,
            context_length=context_length,
        )


def evaluate_tokens(
    model: GPT,
    stream: Tokens,
    *,
    tokenizer: Tokenizer | None = None,
    first_tokens: int | None = None,
    context_length: int | None = None,
    precision: AbstractContextManager[None] | None = None,
) -> Evaluation:
    """The loss of a model on a stream of tokens, or on its first ones, in windows.

    The tokenizer gives the number of bytes that a token stands for. The first token of the stream
    is no target, as nothing comes before it; the last window is shorter. The sum is in float64.
    Where several processes train together, they share the windows and all get the whole result.
    """
    length = len(stream) if first_tokens is None else min(first_tokens, len(stream))
    if length < 2:
        raise ValueError(f"a text of {length} tokens cannot be evaluated: at least 2 are needed")
    T = context_length or model.config.context_length
    lengths = None if tokenizer is None else byte_lengths(tokenizer, model.config.vocab_size)
    was_training = model.training
    model.eval()
    nats, counted, size = 0.0, 0.0, 0.0
    try:
        for tokens, targets in my_share(windows(stream, length, T)):
            nats += loss_sum(model, tokens, targets, precision or nullcontext())
            counted += targets.size
            size += 0 if lengths is None else int(lengths[targets].sum())
    finally:
        model.train(was_training)
    nats, counted, size = sum_of_numbers((nats, counted, size), model.device)
    return Evaluation(nats / counted, int(counted), None if lengths is None else int(size))


def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Bytes of text that each id of the vocabulary stands for, (V,); an unused one for none."""
    lengths = tokenizer.byte_lengths()
    return np.pad(lengths, (0, vocab_size - len(lengths)))


def windows(stream: Tokens, length: int, T: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens and targets of neighbouring windows, (R, T) at a time; the last is (1, shorter)."""
    rows = max(1, ROW_TOKENS // T)
    whole = (length - 1) // T  # windows with all their targets
    for first in range(0, whole, rows):
        last = min(first + rows, whole)
        part = stream.read(first * T, last * T + 1)
        yield part[:-1].reshape(-1, T), part[1:].reshape(-1, T)
    if whole * T < length - 1:
        part = stream.read(whole * T, length)
        yield part[None, :-1], part[None, 1:]


@torch.inference_mode()
def loss_sum(
    model: GPT, tokens: np.ndarray, targets: np.ndarray, precision: AbstractContextManager[None]
) -> float:
    """Total loss in nats of a batch of windows.  (R, T), (R, T) -> float"""
    device = model.device
    with precision:
        logits = model(torch.from_numpy(tokens).to(device)).logits
    each = F.cross_entropy(
        logits.float().flatten(0, 1),
        torch.from_numpy(targets).to(device).flatten(),
        reduction="none",
    )
    return float(each.double().sum())
