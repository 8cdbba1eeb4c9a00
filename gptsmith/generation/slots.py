"""Texts in the slots of one cache: any of them are read on in one step, each as if it were alone.

Knows nothing of who wants them, of sampling or of time.

Shapes:  B slots, or rows of a pass    T tokens of the longest span    R tokens of all spans
         W of them after which the logits are wanted    C channels    V vocabulary
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.gpt import GPT
from .compiled import CompiledDecoder, Decoder
from .graphs import GraphDecoder

# What several passes may cost more than one that is mostly padding: measured, as the next.
PADDING = 1.5
SHORTEST_SHARED = 16  # tokens; copying fewer is not worth it


class Span(NamedTuple):
    """What to read of a slot's text, and after how many of the last tokens the logits are wanted.

    The tokens follow those that the slot holds. Past the capacity of the slots they are instead
    all that the model sees of the text, its last context_length tokens, and nothing is kept: every
    position shifts with each token, so that no key or value would hold for the next.
    """

    slot: int
    tokens: Sequence[int]
    wanted: int
    past: bool = False


class Slots:
    """As many texts as there are slots, and their keys and values in one cache, allocated once."""

    def __init__(
        self,
        model: GPT,
        count: int,
        decoder: Decoder | None = None,
        *,
        capacity: int | None = None,
        in_chunks: bool = False,
    ) -> None:
        """A slot has room for `capacity` tokens, the context_length if none is given. For
        `in_chunks` see `passes`."""
        self.model, self.decoder, self.in_chunks = model, decoder, in_chunks
        self.cache = KVCache(
            model.config, count, capacity=capacity, dtype=model.dtype, device=model.device
        )
        self.capacity = self.cache.capacity
        self.texts: list[list[int]] = [[] for _ in range(count)]  # the tokens in the cache
        self.exact = in_chunks and isinstance(decoder, CompiledDecoder)
        cuda = model.device.type == "cuda"
        self.pass_cost = 512 if cuda else 16  # of any pass, in tokens that are read beside others
        # Tokens of prompts that are read in one step, at most.
        self.chunk = count * self.capacity
        if in_chunks:
            self.chunk = 512 if cuda else 64

    def __len__(self) -> int:
        return len(self.texts)

    @torch.inference_mode()
    def read(self, spans: Sequence[Span]) -> Tensor:
        """Read on in some texts: the logits after the wanted tokens of each, one span's after
        another's.  -> (W, V)"""
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

    # -- in which passes

    def passes(
        self, spans: Sequence[Span]
    ) -> list[tuple[Callable[[Sequence[Span]], Tensor], Sequence[Span]]]:
        """Which spans are read together, and how: here is decided how prompts are read.

        In chunks is for a server, where nobody shall wait for another's prompt, or get another
        text because of it. The compiled step reads all spans in one pass, and the logits of a text
        are to the bit the same however it is cut and whatever is read beside it. PyTorch's
        products round differently for each shape: without a compiled step, single tokens are read
        in a pass of every slot, used or not, and longer spans alone. They are to be cut at
        multiples of `chunk`.

        Else prompts are read whole, in the fastest way: by the compiled step where tokens are few;
        where they are many by PyTorch, which is up to 2.5 times as fast with them, and in one pass
        if not too much of it is padding. benchmarks/notes.md has the figures.
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
        """Whether one pass of every slot, filled up to the longest span, is faster than several,
        and its padding fits behind what the slots hold."""
        T = max((len(span.tokens) for span in spans), default=0)
        apart = sum(len(span.tokens) for span in spans) + passes * self.pass_cost
        fits = max(map(len, self.texts)) + T <= self.capacity
        return fits and len(self) * T <= PADDING * apart

    # -- a pass

    def read_compiled(self, spans: Sequence[Span]) -> Tensor:
        """All spans in one pass of the compiled step.  -> (W, V)"""
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
        """One pass of every slot, used or not: what is read of a slot beyond its span comes to lie
        behind what is kept there.  -> (W, V)"""
        self.cache.hold([len(text) for text in self.texts])
        return self.read_padded(spans, [span.slot for span in spans], self.cache)

    def read_alone(self, spans: Sequence[Span]) -> Tensor:
        """A pass of the only span.  -> (W, V)"""
        (span,) = spans
        cache = self.cache.row(span.slot)
        cache.hold([len(self.texts[span.slot])])
        return self.read_padded(spans, [0], cache)

    def read_past(self, spans: Sequence[Span]) -> Tensor:
        """Texts of which nothing is kept, in one pass without the cache.  -> (W, V)"""
        return self.read_padded(spans, range(len(spans)), None)

    def read_padded(
        self, spans: Sequence[Span], rows: Sequence[int], cache: KVCache | None
    ) -> Tensor:
        """Each span in a row of one pass, filled up on the right, which causality keeps from
        mattering.  -> (W, V)"""
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

    # -- what is kept

    def begin(self, slot: int, prompt: Sequence[int]) -> None:
        """Start a text with what is in the cache already, in whatever slot, of how the prompt
        begins; at least its last token is left to be read.

        Only where texts are the same to the bit however they are cut; elsewhere start empty.
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
        """Forget what was read after the first tokens of a text: guesses that were wrong."""
        del self.texts[slot][length:]

    def end(self, slot: int) -> None:
        """Leave a slot; its text stays where others may begin with it."""
        if not self.exact:
            self.texts[slot] = []

    def clear(self, slot: int) -> None:
        """Forget a text and what was made of it, which may be no numbers: where a pass is of every
        slot, even a place that nothing looks at must hold some."""
        self.texts[slot] = []
        for array in (self.cache.keys, self.cache.values):
            array[:, slot] = 0


def common(text: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(text, prompt, strict=False)
    alike = min(len(text), len(prompt))
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), alike)


def stretch(rows: Tensor, starts: Sequence[int], width: int) -> Tensor:
    """As many places of each row, from its own start.  (B, T, C) -> (B, width, C)"""
    if len(set(starts)) == 1:
        return rows[:, starts[0] : starts[0] + width]
    return torch.stack(
        [row[start : start + width] for row, start in zip(rows, starts, strict=True)]
    )
