"""What quantizing costs: size and speed, and how far the predictions move.

Two models are compared on the same tokens: of some data, or written by the original itself at
temperature 1. On such text the loss that quantizing adds is expected to be the Kullback-Leibler
divergence, so no data is needed to know it. One model at a time is in memory. Knows nothing of how
numbers are packed.

Shapes:  R rows    T tokens of a row    V vocabulary
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint import folder, saved
from ..checkpoint.tensors import packing
from ..config.model import GPTConfig
from ..config.settings import GREEDY, SamplingSettings
from ..data.batches import Tokens
from ..generation.compiled import open_decoder
from ..generation.writing import generate_tokens
from ..machine.devices import synchronize
from ..machine.files import written_whole
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from .heldout import windows

ROWS_WRITTEN = 16  # texts that a model writes at once
SEED = 0  # of what it writes
KEPT_NUMBERS = 2**26  # logits that wait for the other model: 256 MB
POSITIONS_AT_ONCE = 64  # of which the float64 copies take 26 MB each, for GPT-2's vocabulary
TIMED_PROMPT, TIMED_TOKENS = 8, 24

Opener = Callable[[], GPT]
Row = tuple[Tensor, Tensor]  # tokens and targets, (T,) each


# -- the predictions


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """How far one model's predictions are from the original's, over the positions of a text."""

    positions: int
    mean_kl: float  # nats, original || other
    largest_kl: float
    same_likeliest: float  # share of the positions
    original_loss: float  # nats per token
    loss: float


def divergence(original: Tensor, other: Tensor, targets: Tensor) -> Divergence:
    """How far apart the logits of two models are, in float64.  (T, V), (T, V), (T,)"""
    parts = zip(
        *(each.split(POSITIONS_AT_ONCE) for each in (original, other, targets)), strict=True
    )
    return joined([_divergence(*part) for part in parts])


def _divergence(original: Tensor, other: Tensor, targets: Tensor) -> Divergence:
    p, q = (logits.double().log_softmax(-1) for logits in (original, other))
    kl = (p.exp() * (p - q)).sum(-1)  # (T,)
    return Divergence(
        positions=len(targets),
        mean_kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        same_likeliest=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        original_loss=float(F.nll_loss(p, targets)),
        loss=float(F.nll_loss(q, targets)),
    )


def joined(parts: Sequence[Divergence]) -> Divergence:
    """The divergence over all positions of some texts together."""
    positions = sum(part.positions for part in parts)
    means = {
        name: sum(getattr(part, name) * part.positions for part in parts) / positions
        for name in ("mean_kl", "same_likeliest", "original_loss", "loss")
    }
    return Divergence(
        positions=positions, largest_kl=max(part.largest_kl for part in parts), **means
    )


# -- tokens


def first_token(tokenizer: Tokenizer | None) -> int:
    """What a text of a model's own begins with."""
    return 0 if tokenizer is None else tokenizer.end_of_text or 0


def own_text(model: GPT, tokens: int, *, first: int = 0) -> list[Row]:
    """What a model writes at temperature 1, in rows that begin with the token `first`."""
    T = min(model.config.context_length, math.ceil(tokens / ROWS_WRITTEN))
    start = torch.full((math.ceil(tokens / T), 1), first, device=model.device)  # (R, 1)
    new = generate_tokens(model, start, T, sampling=SamplingSettings(temperature=1.0), seed=SEED)
    text = torch.cat([start, *(chosen.unsqueeze(1) for chosen in new)], dim=1).cpu()  # (R, T + 1)
    return [(row[:-1], row[1:]) for row in text]


def text_rows(stream: Tokens, tokens: int | None, context_length: int) -> list[Row]:
    """The first tokens of a text, in windows of the context length."""
    length = len(stream) if tokens is None else min(tokens, len(stream))
    if length < 2:
        raise ValueError(f"a text of {length} tokens cannot be compared on: at least 2 are needed")
    return [
        (torch.from_numpy(row), torch.from_numpy(following))
        for rows, targets in windows(stream, length, context_length)
        for row, following in zip(rows, targets, strict=True)
    ]


# -- comparing


@torch.inference_mode()
def logits_of(model: GPT, rows: Iterable[Row]) -> Iterator[Tensor]:
    """What a model says to each row, in float32.  -> (T, V), (T, V), ..."""
    for tokens, _ in rows:
        yield model(tokens.unsqueeze(0).to(model.device)).logits[0].float().cpu()


def compare_with(kept: Sequence[Tensor], model: GPT, rows: Sequence[Row]) -> Divergence:
    """How far a model is from the original's logits, a (T, V) for each row, on the same rows."""
    found = zip(kept, logits_of(model, rows), (targets for _, targets in rows), strict=True)
    return joined([divergence(*row) for row in found])


def compare(original: Opener, other: Opener, rows: Sequence[Row], vocab_size: int) -> Divergence:
    """How far a model is from the original, with one of the two in memory at a time.

    They are opened anew for every `KEPT_NUMBERS` of logits.
    """
    longest = max(len(tokens) for tokens, _ in rows)
    step, found = max(1, KEPT_NUMBERS // (longest * vocab_size)), []
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        kept = list(logits_of(original(), part))
        found.append(compare_with(kept, other(), part))
    return joined(found)


def decode_speed(model: GPT) -> float | None:
    """Tokens per second of one row, greedy, the first not counted; None if it has no room."""
    room = model.config.context_length - 1
    prompt, count = min(TIMED_PROMPT, room // 2), min(TIMED_TOKENS, room // 2)
    if count < 2:
        return None
    decoder = open_decoder(model)
    tokens = torch.zeros(1, prompt, dtype=torch.long, device=model.device)
    times = []
    for _ in generate_tokens(model, tokens, count, sampling=GREEDY, decoder=decoder):
        synchronize(model.device)
        times.append(time.perf_counter())
    return (count - 1) / (times[-1] - times[0])


# -- all of it


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of a model; `str` is for people, `to_json` the whole of it."""

    source: str
    target: str
    bits: int
    weight_bytes: tuple[int, int]  # before and after, as for the next
    folder_bytes: tuple[int, int]
    speeds: dict[str, float | None]  # tokens per second of one row, by precision
    text: str  # what was compared on, in words
    divergence: Divergence

    def __str__(self) -> str:
        found, (before, after) = self.divergence, self.weight_bytes
        speeds = [
            f"{name} {'unknown' if speed is None else f'{speed:,.1f}'}"
            for name, speed in self.speeds.items()
        ]
        rows = {
            "weights": f"{before:,} bytes before, {after:,} after: {before / after:.2f} times less",
            "folder": "{:,} bytes before, {:,} after".format(*self.folder_bytes),
            "speed": f"{', '.join(speeds)} tokens/s, one row",
            "compared on": self.text,
            "perplexity": f"{math.exp(found.original_loss):.4f} before, {math.exp(found.loss):.4f} "
            f"after (loss {found.original_loss:.4f}, {found.loss:.4f} nats per token)",
            "divergence": f"{found.mean_kl:.2g} nats on average, {found.largest_kl:.2g} at most",
            "likeliest": f"the same token at {found.same_likeliest:.2%} of {found.positions:,} "
            "positions",
        }
        lines = [f"  {name:<13}{words}" for name, words in rows.items()]
        return "\n".join([f"{self.source}: {self.bits} bits, in {self.target}", *lines])

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        values = asdict(self)
        for name in ("weight_bytes", "folder_bytes"):
            values[name] = dict(zip(("before", "after"), values[name], strict=True))
        return values


def quantize(
    source: Path,
    out: Path,
    bits: int,
    *,
    tokens: int,
    data: Callable[[GPTConfig, Tokenizer | None], Tokens] | None = None,
) -> Report:
    """Write a folder's model as a new folder in 8 or 4 bits, whole or not at all, and measure it.

    It is compared on so many tokens, the first of `data`, or else what the original writes.
    """
    stored = saved.open_folder(source)
    if stored.bits is not None:
        raise ValueError(
            f"{source} is quantized already, in {stored.bits} bits: the model that it was made "
            "from is needed"
        )
    packed = packing(stored, bits)
    rows = None
    if data is not None:
        stream = data(stored.config, stored.tokenizer)
        rows = text_rows(stream, tokens, stored.config.context_length)
    with written_whole(out) as temporary:
        saved.write(packed, temporary)
        original = saved.build(stored)
        speeds = {"float32": decode_speed(original)}
        text = f"the first {tokens:,} tokens of the data"
        if rows is None:
            rows = own_text(original, tokens, first=first_token(stored.tokenizer))
            text = f"what the original writes at temperature 1 with seed {SEED}"
        del original
        written = saved.open_folder(temporary)
        speeds["bf16"] = decode_speed(saved.build(stored, dtype=torch.bfloat16))
        speeds[f"int{bits}"] = decode_speed(saved.build(written))
        found = compare(
            lambda: saved.build(stored),
            lambda: saved.build(written),
            rows,
            stored.config.vocab_size,
        )
        folders = bytes_of_folder(source), bytes_of_folder(temporary)
        before, after = folder.read_folder(source), folder.read_folder(temporary)
    return Report(
        source=str(source),
        target=str(out),
        bits=bits,
        weight_bytes=(before.tensor_bytes, after.tensor_bytes),
        folder_bytes=folders,
        speeds=speeds,
        text=text,
        divergence=found,
    )


def bytes_of_folder(place: Path) -> int:
    """What the files of a model take, without those of its training."""
    return sum(path.stat().st_size for path in place.iterdir() if path.is_file())
