"""Find out what a model remembers of its training text.

It continues places of the text (`extraction.py`), and writes samples, whose longest matches with
the text are found here. Knows nothing of how the result is shown.

Shapes:  P places    N tokens of a sample    S samples
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..config.settings import MemorizationSettings, SamplingSettings
from ..data.batches import Tokens
from ..data.longest_match import Match, longest_matches
from ..data.overlap import Grams
from ..data.shards import Dataset, TokenStream
from ..generation.compiled import Decoder
from ..generation.writing import prompt_ids
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from .contamination import Contamination, contamination, places_of
from .extraction import (
    CONTINUED,
    PROMPTS,
    Extraction,
    Passage,
    continued,
    extraction,
    generated,
    passages,
    prompt_lengths,
    sample_places,
)

SAMPLE_TOKENS = 200
AROUND = 40  # tokens shown on both sides of a match
NO_TOKEN = -3  # in place of a sample's ends of documents, which match nothing


@dataclass(frozen=True)
class Sample:
    """A text that the model wrote, and its longest match in the training text, if any."""

    tokens: list[int]
    match: Match
    shard: str  # file of the match, and its token there
    shard_token: int
    document: int | None  # from 0; None if nothing marks documents
    before: list[int]  # training tokens around the match
    after: list[int]
    occurrences: int | None  # of the first 32 tokens of the match; None if it is shorter


@dataclass(frozen=True)
class Memorization:
    """What a model remembers of its training text."""

    train_tokens: int
    train: list[Extraction]
    held_out: list[Extraction]  # empty if no text is held out, or too little
    too_long: list[int]  # prompt lengths that the context does not hold
    passages: list[Passage]  # each place of the training text
    samples: list[Sample]  # the one with the longest match first
    reference: list[int]  # lengths of the longest matches of held-out texts as long as the samples
    contamination: Contamination | None  # None if nothing is held out


def memorization(
    model: GPT,
    tokenizer: Tokenizer,
    dataset: Dataset,
    settings: MemorizationSettings | None = None,
    *,
    decoder: Decoder | None = None,
) -> Memorization:
    """Find out what a model remembers of the train split of a dataset, and compare with the rest.

    ValueError where the data or the model does not suit.
    """
    settings = settings or MemorizationSettings()
    train = dataset.tokens_for(tokenizer, model.config.vocab_size, "train")
    held_out, end = dataset.validation, tokenizer.document_end
    lengths = prompt_lengths(model)
    places, rows = sample_places(train, settings, end)
    if not len(rows):
        raise ValueError(
            f"no training document of {dataset.folder} has the {PROMPTS[-1]} + {CONTINUED} tokens "
            "of a prompt and its continuation: use longer texts"
        )
    others = rows[:0] if held_out is None else sample_places(held_out, settings, end)[1]
    written = [continued(model, rows, k, decoder) for k in lengths]
    drawn = write_samples(model, tokenizer, settings, decoder)
    matches, reference = matches_of(drawn, train, held_out, end)
    nothing = np.full(CONTINUED, NO_TOKEN)
    heads = [
        each[match.start :][:CONTINUED] if match.length >= CONTINUED else nothing
        for each, match in zip(drawn, matches, strict=True)
    ]
    counts = Grams(np.stack([*rows[:, -CONTINUED:], *heads]), CONTINUED).counts(train).tolist()
    found = [
        sample(each, match, count or None, train)
        for each, match, count in zip(drawn, matches, counts[len(rows) :], strict=True)
    ]
    return Memorization(
        train_tokens=len(train),
        train=[extraction(k, rows, new) for k, new in zip(lengths, written, strict=True)],
        held_out=[
            extraction(k, others, continued(model, others, k, decoder))
            for k in (lengths if len(others) else ())
        ],
        too_long=[k for k in PROMPTS if k not in lengths],
        passages=passages(places, rows, written[-1], counts),
        samples=sorted(with_documents(found, train, end), key=lambda each: -each.match.length),
        reference=reference,
        contamination=None if held_out is None else contamination(train, held_out, end),
    )


def write_samples(
    model: GPT, tokenizer: Tokenizer, settings: MemorizationSettings, decoder: Decoder | None
) -> np.ndarray:
    """Draw samples from the model's own distribution, from an empty prompt: (S, N)."""
    prompt = torch.tensor(prompt_ids(tokenizer, ""), device=model.device)
    count = settings.sample_tokens or min(SAMPLE_TOKENS, model.config.context_length)
    sampling = SamplingSettings(temperature=1.0)
    return generated(
        model, prompt.repeat(settings.samples, 1), count, sampling, settings.seed, decoder
    )


def matches_of(
    drawn: np.ndarray, train: Tokens, held_out: Tokens | None, end: int | None
) -> tuple[list[Match], list[int]]:
    """Return the longest match of each sample (S, N) in the training text.

    And, for comparison, the lengths of those of as many held-out texts of that length.
    """
    count, length = drawn.shape
    texts = list(drawn)
    if held_out is not None and len(held_out) >= length:
        starts = np.linspace(0, len(held_out) - length, count).astype(np.int64)
        texts += [held_out.read(start, start + length) for start in starts.tolist()]
    sought = [text if end is None else np.where(text == end, NO_TOKEN, text) for text in texts]
    matches = longest_matches(sought, train)
    return matches[:count], [match.length for match in matches[count:]]


def sample(tokens: np.ndarray, match: Match, occurrences: int | None, train: TokenStream) -> Sample:
    """Return a sample (N,) with the place of its match."""
    if not match.length:
        return Sample(tokens.tolist(), match, "", 0, None, [], [], None)
    shard, shard_token = train.place_of(match.place)
    stop = match.place + match.length
    return Sample(
        tokens=tokens.tolist(),
        match=match,
        shard=train.paths[shard].name,
        shard_token=shard_token,
        document=None,
        before=train.read(max(0, match.place - AROUND), match.place).tolist(),
        after=train.read(stop, min(stop + AROUND, len(train))).tolist(),
        occurrences=occurrences,
    )


def with_documents(samples: list[Sample], train: Tokens, end: int | None) -> list[Sample]:
    """Add the number of the document of each match, which takes one pass over the stream."""
    if end is None:
        return samples
    documents = np.zeros(len(samples), np.int64)
    places = np.array([each.match.place for each in samples])
    for ends in places_of(train, end):
        documents += np.searchsorted(ends, places)
    return [
        replace(each, document=document if each.match.length else None)
        for each, document in zip(samples, documents.tolist(), strict=True)
    ]
