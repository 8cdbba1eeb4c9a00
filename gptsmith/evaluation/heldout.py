"""Evaluate a model on a text: loss, perplexity and bits per byte.

Every window is read once, in order, and every token weighs the same, so the result does not depend
on the batch size, and two models can be compared, document by document.

Shapes:  R rows    T tokens (the context length)    S targets of a row    N documents
"""

from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..config.classifier import check_writes
from ..config.fields import SettingError
from ..config.model import GPTConfig
from ..config.settings import PrepareSettings, Split
from ..data.batches import Tokens
from ..machine.devices import with_float64
from ..machine.processes import my_share, sum_of_numbers
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from .documents import Documents, opened_documents
from .result import Evaluation

BATCH_TOKENS = 8192  # tokens per forward pass; only speed and memory depend on it


def evaluate(
    model: GPT,
    tokenizer: Tokenizer | None,
    data: str | Path,
    *,
    split: Split | None = None,
    tokens: int | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    text: PrepareSettings | None = None,
) -> Evaluation:
    """Evaluate a model on DATA: all of a source, or one split of a folder made by `prepare`.

    `split` is the validation split by default; `tokens` limits the evaluation to the first tokens.
    `context_length` is the window in tokens, by default the model's, and `stride` how far it moves,
    by default as far as it is long. `text` has the settings for reading text files. ValueError
    where the data does not suit the model.
    """
    check_writes(model.config, "the model")
    check_window(model.config, context_length, stride)
    vocabularies = [(tokenizer, model.config.vocab_size)]
    with opened_documents(data, vocabularies, split=split, first_tokens=tokens, options=text) as [
        (stream, documents)
    ]:
        return evaluate_documents(
            model, stream, documents, context_length=context_length, stride=stride
        )


def check_window(config: GPTConfig, context_length: int | None, stride: int | None) -> None:
    """Raise SettingError for a window that the model cannot read, or a stride beyond it."""
    limit = config.context_length
    if context_length is not None and not 1 <= context_length <= limit:
        problem = f"is {context_length}: 1 to the model's {limit} is needed"
        raise SettingError("context_length", problem)
    if stride is not None and not 1 <= stride <= (context_length or limit):
        problem = f"is {stride}: 1 to the {context_length or limit} tokens of a window is needed"
        raise SettingError("stride", problem)


def evaluate_documents(
    model: GPT,
    stream: Tokens,
    documents: Documents,
    *,
    context_length: int | None = None,
    stride: int | None = None,
) -> Evaluation:
    """Evaluate a model on the documents of a stream of tokens, window by window.

    Windows lie side by side, so that a token has between 1 and `context_length` tokens before it.
    With a `stride` the window moves by that many tokens, and only its last ones count: each, but
    for those of the first window, has more than context_length - stride tokens before it. Losses
    are summed in float64.
    """
    T = context_length or model.config.context_length
    first, stop = int(documents.bounds[0]), int(documents.bounds[-1])
    nats = np.zeros(len(documents) + 2)  # also of what is before and after the documents
    by_position = np.zeros((2, T))
    place = 1  # of the next target in the stream
    was_training = model.training
    model.eval()
    try:
        for tokens, targets in windows(stream, stop, T, stride):
            losses = token_losses(model, tokens, targets, nullcontext()).double().cpu().numpy()
            which = np.searchsorted(
                documents.bounds, np.arange(place, place + targets.size), side="right"
            )
            nats += np.bincount(which, losses.ravel(), len(nats))
            scored = slice(tokens.shape[1] - targets.shape[1], tokens.shape[1])
            by_position[:, scored] += losses.sum(0), np.full(targets.shape[1], len(targets))
            place += targets.size
    finally:
        model.train(was_training)
    counted, size = stop - first, int(documents.bytes.sum())
    nats = nats[1:-1]
    loss = float(nats.sum()) / counted
    return Evaluation(loss, counted, size or None, documents, nats, by_position)


def window_sums(
    model: GPT,
    stream: Tokens,
    tokenizer: Tokenizer | None = None,
    first_tokens: int | None = None,
    context_length: int | None = None,
    precision: AbstractContextManager[None] | None = None,
) -> Generator[np.ndarray, None, None]:
    """Evaluate this process's share of the windows of a stream, or of its first tokens.

    The first token of the stream has no context and is no target; the last window may be shorter.
    In a run of several processes, they share the windows. Yields nats, targets and bytes of each
    batch, (3,) float64, so that a caller can show progress or break off.
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


def windows(
    stream: Tokens, length: int, T: int, stride: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens and targets of consecutive windows, (R, T) each; the last is (1, T or less).

    With a `stride`, S below T, each window but the first begins S tokens after the one before, and
    has only its last S targets, (R, S).
    """
    S = stride or T
    start = done = 0  # the next window's first token; targets so far
    if S < T:
        done = min(T, length - 1)
        ids = stream.read(0, done + 1)
        yield ids[None, :-1], ids[None, 1:]
        start = S
    rows = max(1, BATCH_TOKENS // T)
    while start + T < length:
        count = min(rows, (length - 1 - start - T) // S + 1)
        ids = stream.read(start, start + (count - 1) * S + T + 1)
        batch = np.lib.stride_tricks.sliding_window_view(ids, T + 1)[::S]  # (R, T + 1)
        yield batch[:, :-1].copy(), batch[:, T + 1 - S :].copy()
        start, done = start + count * S, done + count * S
    if done < length - 1:
        ids = stream.read(start, length)
        yield ids[None, :-1], ids[None, done - start + 1 :]


def loss_sum(
    model: GPT, tokens: np.ndarray, targets: np.ndarray, precision: AbstractContextManager[None]
) -> float:
    """Return the summed loss of a batch of windows, in nats.  (R, T), (R, T) -> float"""
    losses = with_float64(token_losses(model, tokens, targets, precision))
    return float(losses.flatten().double().sum())


@torch.inference_mode()
def token_losses(
    model: GPT, tokens: np.ndarray, targets: np.ndarray, precision: AbstractContextManager[None]
) -> Tensor:
    """Return the loss at the last S positions, in nats.  (R, T), (R, S) -> (R, S)"""
    device = model.device
    with precision:
        logits = model(torch.from_numpy(tokens).to(device)).logits[:, -targets.shape[1] :]
    following = torch.from_numpy(targets).to(device)
    losses = F.cross_entropy(logits.float().flatten(0, 1), following.flatten(), reduction="none")
    return losses.view_as(following)
