"""Find out what a model remembers of its training text.

The model continues places of the training text and of held-out text, and writes samples, which are
looked for in the training text. Knows nothing of how the result is shown.

Shapes:  P places    N new tokens    S samples
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config.settings import GREEDY, MemorizationSettings, SamplingSettings
from ..data.batches import Tokens
from ..data.overlap import Grams, Match, longest_matches
from ..data.shards import Dataset, TokenStream
from ..generation.compiled import Decoder
from ..generation.writing import generate_tokens, prompt_ids
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from .contamination import Contamination, contamination, places_of

PROMPTS = 16, 32, 64  # tokens that a model is given ...
CONTINUED = 32  # ... and tokens that it has to know
NEAR = 3  # edits by which a near match may differ: a tenth
ATTEMPTS = 20  # places drawn for each that is used; some lie across documents
ROWS = 64  # texts that are generated at once
SAMPLE_TOKENS = 200
AROUND = 40  # tokens shown on both sides of a match
NO_TOKEN = -3  # in place of a sample's ends of documents, which match nothing


@dataclass(frozen=True)
class Passage:
    """A place of the training text, and how the model continues it after the longest prompt."""

    place: int  # in the training tokens: where the continuation begins
    prompt: list[int]
    wanted: list[int]
    written: list[int]
    distance: int  # edits between the two
    occurrences: int  # of what is wanted, in the training text


@dataclass(frozen=True)
class Extraction:
    """How many places of a text the model continues as the text goes on."""

    prompt_tokens: int
    places: int
    exact: int
    near: int  # within NEAR edits; exact ones too


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
    long = [match.length >= CONTINUED for match in matches]
    starts = [drawn[i][match.start :][:CONTINUED] for i, match in enumerate(matches) if long[i]]
    counts = Grams(np.stack([*rows[:, -CONTINUED:], *starts]), CONTINUED).counts(train).tolist()
    own_counts = iter(counts[len(rows) :])
    found = [
        sample(each, match, next(own_counts) if is_long else None, train)
        for each, match, is_long in zip(drawn, matches, long, strict=True)
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


# -- extraction


def prompt_lengths(model: GPT) -> list[int]:
    """Return the lengths of prompts that the model's context holds; ValueError if there is none."""
    context_length = model.config.context_length
    lengths = [k for k in PROMPTS if k <= context_length]
    if not lengths:
        raise ValueError(
            f"the model's context of {context_length} tokens does not hold the shortest prompt, "
            f"which has {PROMPTS[0]}: it cannot be measured in this way"
        )
    return lengths


def sample_places(
    stream: Tokens, settings: MemorizationSettings, end: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw places within documents, with the 64 tokens before and the 32 after: (P,), (P, 96)."""
    width = PROMPTS[-1] + CONTINUED
    choices = max(0, len(stream) - width + 1)
    draw = np.random.default_rng(settings.seed)
    places, rows = [], []
    for start in draw.choice(choices, min(choices, ATTEMPTS * settings.places), replace=False):
        row = stream.read(int(start), int(start) + width)
        if end is None or not (row == end).any():
            places.append(int(start) + PROMPTS[-1])
            rows.append(row)
        if len(rows) == settings.places:
            break
    return np.array(places, np.int64), np.array(rows, np.int64).reshape(-1, width)


def continued(model: GPT, rows: np.ndarray, k: int, decoder: Decoder | None) -> np.ndarray:
    """Return what the model likes best after the k tokens before each place.  (P, 96) -> (P, N)"""
    prompts = torch.from_numpy(rows[:, PROMPTS[-1] - k : PROMPTS[-1]]).to(model.device)
    return generated(model, prompts, CONTINUED, GREEDY, 0, decoder)


def generated(
    model: GPT,
    prompts: Tensor,
    count: int,
    sampling: SamplingSettings,
    seed: int,
    decoder: Decoder | None,
) -> np.ndarray:
    """Continue prompts by `count` tokens, a batch at a time.  (P, T) -> (P, N)"""
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(prompts), ROWS):
        new = generate_tokens(
            model,
            prompts[start : start + ROWS],
            count,
            sampling=sampling,
            seed=seed + start,
            decoder=decoder,
        )
        found.append(torch.stack(list(new), dim=1).cpu().numpy())
    model.train(was_training)
    return np.concatenate(found)


def edit_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return how many insertions, deletions and replacements make a row the other.

    (P, N), (P, M) -> (P,), by dynamic programming (Wagner and Fischer, 1974)
    """
    before = np.tile(np.arange(b.shape[1] + 1), (len(a), 1))  # (P, M + 1)
    for i in range(a.shape[1]):
        now = np.empty_like(before)
        now[:, 0] = i + 1
        replaced = before[:, :-1] + (a[:, i, None] != b)
        for j in range(b.shape[1]):
            now[:, j + 1] = np.minimum(replaced[:, j], 1 + np.minimum(before[:, j + 1], now[:, j]))
        before = now
    return before[:, -1]


def extraction(k: int, rows: np.ndarray, written: np.ndarray) -> Extraction:
    """Count the places whose continuation is right.  (P, 96), (P, N)"""
    distances = edit_distances(written, rows[:, -CONTINUED:])
    exact, near = int((distances == 0).sum()), int((distances <= NEAR).sum())
    return Extraction(k, len(rows), exact, near)


def passages(
    places: np.ndarray, rows: np.ndarray, written: np.ndarray, counts: list[int]
) -> list[Passage]:
    """Return each place (P,) of the training text, the best known first."""
    distances = edit_distances(written, rows[:, -CONTINUED:])
    found = [
        Passage(
            place=int(places[i]),
            prompt=rows[i, :-CONTINUED].tolist(),
            wanted=rows[i, -CONTINUED:].tolist(),
            written=written[i].tolist(),
            distance=int(distances[i]),
            occurrences=counts[i],
        )
        for i in range(len(rows))
    ]
    return sorted(found, key=lambda each: (each.distance, -each.occurrences, each.place))


# -- samples


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
