"""Forward passes over several texts, each in its slot of one KV cache.

Knows nothing of jobs, sampling or time.

Shapes:  B slots, or rows of a pass    T tokens of the longest span    R tokens of all spans
         W tokens whose logits are wanted    C channels    V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.gpt import GPT
from .compiled import CompiledDecoder, Decoder
from .graphs import GraphDecoder

# How much costlier several passes may be than one that is mostly padding (measured, as pass_cost).
MOST_PADDING = 1.5
SHORTEST_SHARED = 16  # tokens; copying fewer is not worth it


class Span(NamedTuple):
    """The next tokens to read of a slot's text; the logits of the last `wanted` are returned.

    The tokens follow those that the slot holds. With `past`, the text is longer than a slot: the
    tokens are then its last context_length ones, and nothing is cached, since each new token shifts
    all positions and with them all keys and values.
    """

    slot: int
    tokens: Sequence[int]
    wanted: int
    past: bool = False


class Slots:
    """The texts of all slots, with their keys and values in one cache that is allocated once."""

    def __init__(
        self,
        model: GPT,
        count: int,
        decoder: Decoder | None = None,
        *,
        capacity: int | None = None,
        in_chunks: bool = False,
    ) -> None:
        """`capacity` is in tokens per slot (default: the context_length). `in_chunks` is for
        servers, see `passes`."""
        self.model, self.decoder, self.in_chunks = model, decoder, in_chunks
        self.cache = KVCache(
            model.config, count, capacity=capacity, dtype=model.dtype, device=model.device
        )
        self.capacity = self.cache.capacity
        self.texts: list[list[int]] = [[] for _ in range(count)]  # the tokens in the cache
        self.exact = in_chunks and isinstance(decoder, CompiledDecoder)
        cuda = model.device.type == "cuda"
        self.pass_cost = 512 if cuda else 16  # of any pass, in tokens read beside others
        # Largest number of prompt tokens per step.
        self.chunk = count * self.capacity
        if in_chunks:
            self.chunk = 512 if cuda else 64

    def __len__(self) -> int:
        return len(self.texts)

    @torch.inference_mode()
    def read(self, spans: Sequence[Span]) -> Tensor:
        """Read the spans; return the logits of their wanted tokens, in order.  -> (W, V)"""
        for span in spans:
            if span.past:
                self.texts[span.slot] = []
        passes = self.passes(spans)
        found = [(some, read(some)) for read, some in passes]
        logits = found[0][1]
        if len(passes) > 1:
            apart = {
                span.slot: rows
                for some, each in found
                for span, rows in zip(some, each.split([s.wanted for s in some]), strict=True)
            }
            logits = torch.cat([apart[span.slot] for span in spans])
        for span in spans:
            if not span.past:
                self.texts[span.slot] += span.tokens
        return logits

    # -- choosing passes

    def passes(
        self, spans: Sequence[Span]
    ) -> list[tuple[Callable[[Sequence[Span]], Tensor], Sequence[Span]]]:
        """Group the spans into forward passes.

        With `in_chunks`, for a server, a long prompt must not delay other texts, and no text may
        change with what is read beside it. The compiled step reads all spans in one pass, and a
        text's logits are the same to the bit however it is divided and whatever else is read.
        PyTorch's matrix products round differently for each shape. Without a compiled step, single
        tokens are therefore read in a pass of every slot, used or not, and longer spans, which the
        caller cuts at multiples of `chunk`, in a pass each.

        Otherwise prompts are read whole and in the fastest way: few tokens by the compiled step,
        many by PyTorch, which is then up to 2.5 times as fast, and in a single pass unless that
        has too much padding. benchmarks/notes.md has the figures.
        """
        past, within = [s for s in spans if s.past], [s for s in spans if not s.past]
        tokens = sum(len(span.tokens) for span in within)
        few = isinstance(self.decoder, CompiledDecoder) and self.decoder.takes(tokens)
        if self.exact or few:
            passes = [(self.read_compiled, within)]
        else:
            single = [span for span in within if len(span.tokens) == 1]
            passes = [(self.read_every_slot, single)]
            passes += [(self.read_alone, [span]) for span in within if len(span.tokens) > 1]
            if not self.in_chunks and self.padding_pays(within, len(passes)):
                passes = [(self.read_every_slot, within)]
        return [(read, some) for read, some in [*passes, (self.read_past, past)] if some]

    def padding_pays(self, spans: Sequence[Span], passes: int) -> bool:
        """Whether one padded pass of every slot is faster than so many passes, and fits."""
        T = max((len(span.tokens) for span in spans), default=0)
        apart = sum(len(span.tokens) for span in spans) + passes * self.pass_cost
        fits = max(map(len, self.texts)) + T <= self.capacity
        return fits and len(self) * T <= MOST_PADDING * apart

    # -- forward passes

    def read_compiled(self, spans: Sequence[Span]) -> Tensor:
        """Read all spans in one pass of the compiled step.  -> (W, V)"""
        assert isinstance(self.decoder, CompiledDecoder)
        tokens, texts, places, wanted = list[int](), list[int](), list[int](), list[int]()
        for span in spans:
            start, count = len(self.texts[span.slot]), len(span.tokens)
            tokens += span.tokens
            texts += [span.slot] * count
            places += range(start, start + count)
            wanted += range(len(tokens) - span.wanted, len(tokens))
        return self.decoder.logits(tokens, texts, places, wanted, self.cache)

    def read_every_slot(self, spans: Sequence[Span]) -> Tensor:
        """Read the spans in one pass of every slot, used or not.  -> (W, V)

        Padding is written to the cache after a slot's text, where the next tokens overwrite it.
        """
        self.cache.hold([len(text) for text in self.texts])
        return self.read_padded(spans, [span.slot for span in spans], self.cache)

    def read_alone(self, spans: Sequence[Span]) -> Tensor:
        """Read a single span in a pass of its slot alone.  -> (W, V)"""
        (span,) = spans
        cache = self.cache.row(span.slot)
        cache.hold([len(self.texts[span.slot])])
        return self.read_padded(spans, [0], cache)

    def read_past(self, spans: Sequence[Span]) -> Tensor:
        """Read spans that are not cached in one pass without a cache.  -> (W, V)"""
        return self.read_padded(spans, range(len(spans)), None)

    def read_padded(
        self, spans: Sequence[Span], rows: Sequence[int], cache: KVCache | None
    ) -> Tensor:
        """Read each span in its row of one pass.  -> (W, V)

        Padding is on the right, where causal attention hides it from the span's tokens.
        """
        B = len(spans) if cache is None else len(cache.lengths)
        T = max(len(span.tokens) for span in spans)
        places = max(span.wanted for span in spans) if T > 1 else 1
        filled, starts, wanted = [[0] * T for _ in range(B)], [T - places] * B, list[int]()
        for row, span in zip(rows, spans, strict=True):
            end = len(span.tokens)
            filled[row][:end] = span.tokens
            starts[row] = max(0, end - places)
            last = row * places + end - starts[row]
            wanted += range(last - span.wanted, last)
        tokens = torch.tensor(filled, device=self.model.device)  # (B, T)
        if isinstance(self.decoder, GraphDecoder) and cache is not None and T == 1:
            logits = self.decoder.next_logits(tokens, cache)  # (B, 1, V)
        else:
            features = stretch(self.model.features(tokens, cache), starts, places)
            logits = self.model.lm_head(features)  # (B, places, V)
        logits = logits.flatten(0, 1)
        return logits if wanted == [*range(len(logits))] else logits[wanted]

    # -- the slots' texts

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        """Start a text with the longest beginning of its prompt that any slot has cached.

        At least the prompt's last token is left to be read. Without a compiled step the text
        starts empty, as shared keys and values could change its logits by a rounding error.
        """
        lengths = [common(text, prompt[:-1]) if self.exact else 0 for text in self.texts]
        shared = max(lengths)
        if shared < SHORTEST_SHARED:
            shared = 0
        elif shared > lengths[slot]:
            source = lengths.index(shared)
            for array in (self.cache.keys, self.cache.values):  # (L, B, capacity, G, D)
                array[:, slot, :shared] = array[:, source, :shared]
        self.texts[slot] = list(prompt[:shared])

    def keep(self, slot: int, length: int) -> None:
        """Drop what was read after the first `length` tokens of a text: wrong guesses."""
        del self.texts[slot][length:]

    def end(self, slot: int) -> None:
        """Free a slot; its text stays cached if other texts may begin with it."""
        if not self.exact:
            self.texts[slot] = []

    def clear(self, slot: int) -> None:
        """Drop a text and zero its keys and values, which may be NaN.

        A pass of every slot reads masked positions too, and 0 times NaN would be NaN.
        """
        self.texts[slot] = []
        for array in (self.cache.keys, self.cache.values):
            array[:, slot] = 0


def common(text: Sequence[int], prompt: Sequence[int]) -> int:
    """Return the length of the longest common beginning of two texts, in tokens."""
    pairs = zip(text, prompt, strict=False)
    alike = min(len(text), len(prompt))
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), alike)


def stretch(rows: Tensor, starts: Sequence[int], width: int) -> Tensor:
    """Cut `width` positions out of each row, from its own start.  (B, T, C) -> (B, width, C)"""
    if len(set(starts)) == 1:
        return rows[:, starts[0] : starts[0] + width]
    return torch.stack(
        [row[start : start + width] for row, start in zip(rows, starts, strict=True)]
    )
