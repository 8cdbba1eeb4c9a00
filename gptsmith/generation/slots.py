"""Texts in the slots of one cache: any few of them go on in one pass, each as if it were alone.

Knows nothing of who wants them, of sampling or of time.

Shapes:  R tokens read, of all texts    W of them wanted    V vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..machine import devices
from ..model.cache import KVCache
from ..model.gpt import GPT
from .compiled import CompiledDecoder, Decoder

MOST_SLOTS, MOST_SLOTS_PLAIN = 64, 8
SHARE_OF_MEMORY = 1 / 8  # that the cache may take, of what is free
SHORTEST_SHARED = 16  # tokens; copying fewer is not worth it


@dataclass(frozen=True)
class Span:
    """The next tokens of a slot's text, and after how many of the last the logits are wanted."""

    slot: int
    tokens: Sequence[int]
    wanted: int


class Slots:
    """As many texts as there are slots, and their keys and values in one cache, allocated once.

    With a compiled step, all spans are read in one pass, and the logits of a text are to the bit
    the same however it is cut and whatever is read beside it. Without, PyTorch's products round
    differently for each shape: what a text goes on by, one token, is then read in a pass of all
    slots, used or not, and longer spans are read alone. They are to be cut at multiples of `chunk`.
    """

    def __init__(
        self, model: GPT, count: int | None = None, decoder: Decoder | None = None
    ) -> None:
        self.model, self.decoder = model, decoder
        self.exact = isinstance(decoder, CompiledDecoder)
        self.chunk = 512 if model.device.type == "cuda" else 64  # prompt tokens in a pass, at most
        count = suitable_slots(model, self.exact, count)
        self.cache = KVCache(model.config, count, dtype=model.dtype, device=model.device)
        self.texts: list[list[int]] = [[] for _ in range(count)]  # the tokens in the cache

    def __len__(self) -> int:
        return len(self.texts)

    @torch.inference_mode()
    def read(self, spans: Sequence[Span]) -> Tensor:
        """Read on in some texts: the logits after the wanted tokens of each, one span's after
        another's.  -> (W, V)"""
        read = self.read_at_once if isinstance(self.decoder, CompiledDecoder) else self.read_apart
        logits = read(spans)
        for span in spans:
            self.texts[span.slot].extend(span.tokens)
        return logits

    def read_at_once(self, spans: Sequence[Span]) -> Tensor:
        """All spans in one pass of the compiled step.  -> (W, V)"""
        assert isinstance(self.decoder, CompiledDecoder)
        texts = [span.slot for span in spans for _ in span.tokens]
        tokens = torch.tensor([token for span in spans for token in span.tokens])  # (R,)
        starts = [(len(self.texts[span.slot]), span) for span in spans]
        places = torch.cat([torch.arange(at, at + len(span.tokens)) for at, span in starts])  # (R,)
        ends = accumulate(len(span.tokens) for span in spans)
        wanted = [
            row
            for end, span in zip(ends, spans, strict=True)
            for row in range(end - span.wanted, end)
        ]
        return self.decoder.logits(tokens, texts, places, wanted, self.cache)

    def read_apart(self, spans: Sequence[Span]) -> Tensor:
        """Single tokens in a pass of every slot, and longer spans each alone.  -> (W, V)"""
        single = [span for span in spans if len(span.tokens) == 1]
        together = self.read_every_slot(single) if single else None  # (slots, 1, V)
        found = []
        for span in spans:
            if together is not None and len(span.tokens) == 1:
                found.append(together[span.slot, 1 - span.wanted :])
            else:
                found.append(self.read_alone(span))
        return torch.cat(found)

    def read_every_slot(self, spans: Sequence[Span]) -> Tensor:
        """A token of each span, and one that nobody asked for in every other slot, which comes to
        lie behind what is kept there.  -> (slots, 1, V)"""
        tokens = torch.zeros(len(self), 1, dtype=torch.long)
        for span in spans:
            tokens[span.slot] = span.tokens[0]
        tokens = tokens.to(self.model.device)
        self.cache.hold([min(len(text), self.cache.capacity - 1) for text in self.texts])
        if self.decoder is not None and self.decoder.takes(tokens):
            return self.decoder.next_logits(tokens, self.cache, 1)
        return self.model.lm_head(self.model.features(tokens, self.cache))

    def read_alone(self, span: Span) -> Tensor:
        """A span of one text.  -> (W, V)"""
        cache = self.cache.row(span.slot)
        cache.hold([len(self.texts[span.slot])])
        tokens = torch.tensor([span.tokens], device=self.model.device)  # (1, R)
        features = self.model.features(tokens, cache)[0]  # (R, C)
        return self.model.lm_head(features[len(features) - span.wanted :])

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
            for array in (self.cache.keys, self.cache.values):  # (L, slots, capacity, G, D)
                array[:, slot, :shared] = array[:, source, :shared]
        self.texts[slot] = list(prompt[:shared])

    def clear(self, slot: int) -> None:
        """Forget a text and what was made of it, which may be no numbers: where a pass is of every
        slot, even a place that nothing looks at must hold some."""
        self.texts[slot] = []
        for array in (self.cache.keys, self.cache.values):
            array[:, slot] = 0

    def end(self, slot: int) -> None:
        """Leave a slot's text for others to begin with, short of the place that a pass of every
        slot may write to."""
        del self.texts[slot][self.cache.capacity - 1 :]


def common(text: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = zip(text, prompt, strict=False)
    alike = min(len(text), len(prompt))
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), alike)


def suitable_slots(model: GPT, exact: bool, wanted: int | None = None) -> int:
    """How many slots suit a model on its device and leave it memory, or those that are wanted;
    ValueError where they do not fit."""
    size = KVCache(model.config, 1, dtype=model.dtype, device="meta").size
    free = devices.available_memory(model.device)
    if wanted is None:
        suits = MOST_SLOTS if exact or model.device.type == "cuda" else MOST_SLOTS_PLAIN
        return max(1, min(suits, int(SHARE_OF_MEMORY * free / size)))
    if wanted * size > free:
        raise ValueError(
            f"{wanted:,} slots take {wanted * size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are "
            "free: take fewer"
        )
    return wanted
