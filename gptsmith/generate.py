"""From a prompt to a stream of tokens, or of text: prefill, decode, stop.

Knows nothing of files, terminals or HTTP.

Shapes:  B batch    T prompt tokens    V vocabulary
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache
from .decode import Decoder
from .drafts import Draft
from .model import GPT
from .sampling import next_token
from .settings import GREEDY, SamplingSettings
from .tokenizers import Tokenizer

MOST_GUESSED = 8  # tokens of a draft that are read at once


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    sampling: SamplingSettings = GREEDY,
    seed: int = 0,
    use_cache: bool = True,
    draft: Draft | None = None,
    decoder: Decoder | None = None,
) -> Iterator[Tensor]:
    """Continue each row of tokens, one new token per row at a time.  (B, T) -> (B,), (B,), ...

    A `decoder` is the same model's step, compiled; it is used for a row on its own.

    With a `draft`, which needs a single row, tokens that are guessed right cost no pass of their
    own; the tokens are the same, since each is chosen from the model's own logits.

    Row i draws from a generator of its own, seeded `seed + i`: it gives what it would give alone.
    Past the context limit the model sees the last context_length tokens. Every position then
    shifts, so nothing cached holds any more, and each token costs a whole forward pass.
    """
    check_request(model, tokens, max_new_tokens, sampling)
    if draft is not None and not (use_cache and len(tokens) == 1):
        raise ValueError(f"a draft needs a cache and one row of tokens, not {len(tokens)}")
    device, limit = tokens.device, model.config.context_length
    generators = [torch.Generator().manual_seed(seed + row) for row in range(tokens.shape[0])]
    cache = None
    if use_cache and max_new_tokens > 0 and tokens.shape[1] <= limit:
        capacity = min(limit, tokens.shape[1] + max_new_tokens)
        rows, dtype = tokens.shape[0], model.dtype
        cache = KVCache(model.config, rows, capacity=capacity, dtype=dtype, device=device)
    end = tokens.shape[1] + max_new_tokens
    while tokens.shape[1] < end:
        length = tokens.shape[1]
        if length > limit:
            cache = None
        most = min(MOST_GUESSED, end - length - 1, limit - length)
        guessed = tokens[:, :0]  # (B, K)
        if draft is not None and most > 0:
            guessed = draft.guess(tokens[0], most).unsqueeze(0)
        K = guessed.shape[1]
        text = torch.cat([tokens, guessed], dim=1)[:, -limit:]
        if decoder is not None and cache is not None and decoder.takes(text, cache):
            logits = decoder.next_logits(text[:, -1], cache).unsqueeze(1)  # (1, 1, V)
        else:
            logits = next_logits(model, text, cache, K + 1)
        for place in range(K + 1):
            chosen = next_token(logits[:, place], tokens, sampling, generators)  # (B,)
            tokens = torch.cat([tokens, chosen.unsqueeze(1)], dim=1)
            yield chosen
            if place < K and chosen[0] != guessed[0, place]:
                break
        if cache is not None:
            cache.rewind(tokens.shape[1] - 1)  # what was read of wrong guesses


@torch.inference_mode()
def next_logits(model: GPT, tokens: Tensor, cache: KVCache | None, places: int) -> Tensor:
    """Logits after each of the last `places` tokens.  (B, T) -> (B, places, V)

    A cache is given only what it lacks.
    """
    unread = tokens if cache is None else tokens[:, cache.length :]
    return model.lm_head(model.features(unread, cache)[:, -places:])


def check_request(
    model: GPT, tokens: Tensor, max_new_tokens: int, sampling: SamplingSettings
) -> None:
    """Raise ValueError for what cannot be generated from tokens (B, T)."""
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        got = tuple(tokens.shape)
        raise ValueError(f"the prompt has shape {got}: (batch, tokens) with a token is needed")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 0 is needed")
    V = model.config.vocab_size
    if sampling.top_k is not None and sampling.top_k > V:
        raise ValueError(f"top_k is {sampling.top_k}: at most the vocabulary, {V}, is needed")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < V:
        raise ValueError(f"the prompt has ids outside the vocabulary: 0 to {V - 1} are needed")


def generate_greedy(model: GPT, tokens: Tensor, max_new_tokens: int) -> Tensor:
    """The prompt and its likeliest continuation.  (B, T) -> (B, T + max_new_tokens)

    As the book's `generate_text_simple`: dropout is off only if the caller called `model.eval()`.
    """
    new = list(generate(model, tokens, max_new_tokens))
    return torch.cat([tokens, *(chosen.unsqueeze(1) for chosen in new)], dim=1)


# -- text


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 200,
    seed: int = 0,
    stop: Sequence[str] = (),
    sampling: SamplingSettings = SamplingSettings(),  # noqa: B008 (frozen)
    draft: Draft | None = None,
    decoder: Decoder | None = None,
    **choices: Any,
) -> Iterator[str]:
    """Continue a text, piece by piece: whole characters only, ended by a stop string, by
    <|endoftext|> or by `max_tokens`. The prompt itself is not repeated.

    Sampling settings may be given by name: `stream(..., temperature=0.8, top_k=50)`.
    """
    tokens = prompt_tokens(model, tokenizer, prompt)
    sampling = replace(sampling, **choices)
    how: dict[str, Any] = {"draft": draft, "decoder": decoder}
    new = generate(model, tokens, max_tokens, sampling=sampling, seed=seed, **how)
    return until(decoded((int(row[0]) for row in new), tokenizer), stop)


def complete(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    num_samples: int = 1,
    max_tokens: int = 200,
    seed: int = 0,
    stop: Sequence[str] = (),
    sampling: SamplingSettings = SamplingSettings(),  # noqa: B008 (frozen)
) -> list[str]:
    """Several continuations at once, in one batch; number i is `stream`'s with seed + i."""
    tokens = prompt_tokens(model, tokenizer, prompt).expand(num_samples, -1)
    steps = list(generate(model, tokens, max_tokens, sampling=sampling, seed=seed))
    rows = torch.stack(steps, dim=1).tolist() if steps else [[]] * num_samples
    return ["".join(until(decoded(row, tokenizer), stop)) for row in rows]


def prompt_tokens(model: GPT, tokenizer: Tokenizer, prompt: str) -> Tensor:
    """A prompt as the model takes it; an empty one begins a document, or a line.  -> (1, T)"""
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.end_of_text is not None:
        ids = [tokenizer.end_of_text]
    if not ids:
        ids = tokenizer.encode("\n", unknown="skip") or [0]
    return torch.tensor([ids], device=model.device)


def decoded(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Text as soon as its characters are whole, up to <|endoftext|>."""
    decoder = tokenizer.decoder()
    for id in ids:
        if id == tokenizer.end_of_text:
            break
        if piece := decoder.push(id):
            yield piece
    if rest := decoder.flush():
        yield rest


def until(pieces: Iterable[str], stop: Sequence[str]) -> Iterator[str]:
    """The same text, ended before the first stop string, which may span pieces."""
    if "" in stop:
        raise ValueError("a stop string is empty: it would stop before the first character")
    held = ""
    for piece in pieces:
        held += piece
        if found := [at for at in (held.find(word) for word in stop) if at >= 0]:
            if min(found) > 0:
                yield held[: min(found)]
            return
        # What may yet grow into a stop string waits.
        waits = max((overlap(held, word) for word in stop), default=0)
        if ready := held[: len(held) - waits]:
            yield ready
        held = held[len(held) - waits :]
    if held:
        yield held


def overlap(text: str, word: str) -> int:
    """How many last characters of `text` are a beginning of `word`, short of the whole."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
