"""Evaluate a model on a text: loss, perplexity and bits per byte.

Every window is read once, in order, and every token weighs the same, so the result does not depend
on the batch size, and two models can be compared.

Shapes:  R rows    T tokens (the context length)    V vocabulary
"""

import math
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..config.classifier import check_writes
from ..config.fields import SettingError
from ..config.settings import PrepareSettings, Split
from ..data.batches import Tokens
from ..data.prepare import opened_tokens
from ..machine.processes import my_share, sum_of_numbers
from ..model.gpt import GPT
from ..tokenizers import Tokenizer

BATCH_TOKENS = 8192  # tokens per forward pass; only speed and memory depend on it


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation."""

    loss: float  # nats per token
    tokens: int  # number of targets
    bytes: int | None  # of their text; None without a tokenizer

    @property
    def perplexity(self) -> float:
        """exp(loss): as uncertain as a choice among that many equally likely tokens."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per byte of text, which is comparable between tokenizers."""
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
    """Evaluate a model on DATA: all of a source, or one split of a folder made by `prepare`.

    `split` is the validation split by default; `tokens` limits the evaluation to the first tokens.
    `context_length` is the window in tokens, by default the model's. `text` has the settings for
    reading text files. ValueError where the data does not suit the model.
    """
    check_writes(model.config, "the model")
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
    """Evaluate a model on a stream of tokens, or on its first tokens, window by window.

    The tokenizer gives the number of bytes of each token. The first token of the stream has no
    context and is no target; the last window may be shorter. The loss is summed in float64. In a
    run of several processes, they share the windows, and all get the result for the whole stream.
    """
    sums = np.zeros(3)
    for part in window_sums(model, stream, tokenizer, first_tokens, context_length, precision):
        sums += part
    return evaluation_of(sums, tokenizer, model.device)


def window_sums(
    model: GPT,
    stream: Tokens,
    tokenizer: Tokenizer | None = None,
    first_tokens: int | None = None,
    context_length: int | None = None,
    precision: AbstractContextManager[None] | None = None,
) -> Generator[np.ndarray, None, None]:
    """Evaluate this process's share of the windows, a batch at a time, as in `evaluate_tokens`.

    Yields nats, targets and bytes of each batch, (3,) float64, so that a caller can show progress
    or break off.
    """
    length = len(stream) if first_tokens is None else min(first_tokens, len(stream))
    if length < 2:
        raise ValueError(f"a text of {length} tokens cannot be evaluated: at least 2 are needed")
    T = context_length or model.config.context_length
    lengths = np.zeros(model.config.vocab_size, np.int64)  # bytes of each id, (V,)
    if tokenizer is not None:
        lengths[: tokenizer.vocab_size] = tokenizer.byte_lengths()
    was_training = model.training
    model.eval()
    try:
        for tokens, targets in my_share(windows(stream, length, T)):
            nats = loss_sum(model, tokens, targets, precision or nullcontext())
            yield np.array([nats, targets.size, lengths[targets].sum()])
    finally:
        model.train(was_training)


def evaluation_of(
    sums: np.ndarray, tokenizer: Tokenizer | None, device: torch.device
) -> Evaluation:
    """Return the evaluation of all processes, whose sums of nats, targets and bytes are (3,)."""
    nats, counted, size = sum_of_numbers(sums.tolist(), device)
    return Evaluation(nats / counted, int(counted), None if tokenizer is None else int(size))


def windows(stream: Tokens, length: int, T: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens and targets of consecutive windows, (R, T) each; the last is (1, T or less)."""
    rows = max(1, BATCH_TOKENS // T)
    whole = (length - 1) // T  # number of full windows
    for first in range(0, whole, rows):
        last = min(first + rows, whole)
        ids = stream.read(first * T, last * T + 1)
        yield ids[:-1].reshape(-1, T), ids[1:].reshape(-1, T)
    if whole * T < length - 1:
        ids = stream.read(whole * T, length)
        yield ids[None, :-1], ids[None, 1:]


@torch.inference_mode()
def loss_sum(
    model: GPT, tokens: np.ndarray, targets: np.ndarray, precision: AbstractContextManager[None]
) -> float:
    """Return the summed loss of a batch of windows, in nats.  (R, T), (R, T) -> float"""
    device = model.device
    with precision:
        logits = model(torch.from_numpy(tokens).to(device)).logits
    losses = F.cross_entropy(
        logits.float().flatten(0, 1),
        torch.from_numpy(targets).to(device).flatten(),
        reduction="none",
    )
    return float(losses.double().sum())
