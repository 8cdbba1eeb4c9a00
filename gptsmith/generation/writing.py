"""From a prompt to a stream of tokens, or of text: prefill, decode, stop.

Knows nothing of files, terminals or HTTP.

Shapes:  B batch    T prompt tokens    K tokens guessed    V vocabulary
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config.settings import GREEDY, SamplingSettings
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from .compiled import Decoder
from .drafts import Draft
from .rows import Rows
from .sampling import next_token

MOST_GUESSED = 8  # tokens of a draft that are read at once


def generate_tokens(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    lengths: Sequence[int] | None = None,
    sampling: SamplingSettings = GREEDY,
    seed: int = 0,
    use_cache: bool = True,
    draft: Draft | None = None,
    decoder: Decoder | None = None,
) -> Iterator[Tensor]:
    """Continue each row of tokens, one new token per row at a time.  (B, T) -> (B,), (B,), ...

    Row i draws from a generator of its own, seeded `seed + i`: it gives what it would give alone.
    Of prompts of different `lengths`, each is a row's first tokens; what follows is never looked
    at. Past the context limit a row sees its last context_length tokens. Every position then
    shifts, so nothing cached holds any more, and each token costs a whole forward pass.

    With a `draft`, which needs a single row, tokens that are guessed right cost no pass of their
    own; the tokens are the same, since each is chosen from the model's own logits. A `decoder` is
    the same model's step, compiled: it reads where tokens are few.
    """
    rows = checked_rows(model, tokens, lengths, decoder)
    check_request(model, rows.text, max_new_tokens, sampling)
    if draft is not None and not (use_cache and len(tokens) == 1):
        raise ValueError(f"a draft needs a cache and one row of tokens, not {len(tokens)}")
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(tokens))]
    if use_cache and max_new_tokens > 0:
        rows.make_cache(max_new_tokens)
    left = max_new_tokens
    while left > 0:
        guessed = guesses(draft, rows, min(MOST_GUESSED, left - 1))  # (B, K)
        K = guessed.shape[1]
        logits = rows.next_logits(guessed)  # (B, K + 1, V)
        for place in range(K + 1):
            chosen = next_token(logits[:, place], rows.text, sampling, generators)  # (B,)
            rows.append(chosen)
            left -= 1
            yield chosen
            if place < K and chosen[0] != guessed[0, place]:
                break
        rows.settle()


def guesses(draft: Draft | None, rows: Rows, most: int) -> Tensor:
    """What a draft guesses of the only row, no further than the context limit.  -> (B, K)"""
    most = min(most, rows.limit - rows.lengths[0])
    if draft is None or most <= 0:
        return rows.text[:, :0]
    return draft.guess(rows.text[0], most).unsqueeze(0)


def checked_rows(
    model: GPT, tokens: Tensor, lengths: Sequence[int] | None, decoder: Decoder | None
) -> Rows:
    """The rows of tokens (B, T) up to their lengths; ValueError where there is nothing in one."""
    if tokens.ndim != 2 or tokens.numel() == 0:
        got = tuple(tokens.shape)
        raise ValueError(f"the prompt has shape {got}: (batch, tokens) with a token is needed")
    B, T = tokens.shape
    ends = [T] * B if lengths is None else [int(length) for length in lengths]
    if len(ends) != B or not 1 <= min(ends) <= max(ends) <= T:
        raise ValueError(f"lengths is {ends}: for each of {B} rows 1 to {T} is needed")
    return Rows(model, tokens, ends, decoder)


def check_request(
    model: GPT, tokens: Tensor, max_new_tokens: int, sampling: SamplingSettings
) -> None:
    """Raise ValueError for what cannot be generated from tokens (B, T)."""
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
    new = list(generate_tokens(model, tokens, max_new_tokens))
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
    tokens, _ = prompt_tokens(model, [prompt_ids(tokenizer, prompt)])
    sampling = replace(sampling, **choices)
    how: dict[str, Any] = {"draft": draft, "decoder": decoder}
    new = generate_tokens(model, tokens, max_tokens, sampling=sampling, seed=seed, **how)
    return until(decoded((int(row[0]) for row in new), tokenizer), stop)


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str | Sequence[str] = "",
    *,
    num_samples: int = 1,
    max_tokens: int = 200,
    seed: int = 0,
    stop: Sequence[str] = (),
    sampling: SamplingSettings = SamplingSettings(),  # noqa: B008 (frozen)
    decoder: Decoder | None = None,
) -> list[str]:
    """Several continuations at once, in one batch: of each prompt `num_samples`, in the order of
    the prompts. Number i of them all is `stream`'s with seed + i.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    ids = [row for text in prompts for row in [prompt_ids(tokenizer, text)] * num_samples]
    tokens, lengths = prompt_tokens(model, ids)
    how: dict[str, Any] = {"lengths": lengths, "sampling": sampling, "seed": seed}
    rows: list[list[int]] = [[] for _ in ids]
    unended = set(range(len(ids)))
    for step in generate_tokens(model, tokens, max_tokens, decoder=decoder, **how):
        for number, id in enumerate(step.tolist()):
            rows[number].append(id)
            if id == tokenizer.end_of_text:
                unended.discard(number)
        if not unended:
            break
    return ["".join(until(decoded(row, tokenizer), stop)) for row in rows]


complete = generate  # its first name


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as the model takes it; an empty one begins a document, or a line."""
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.end_of_text is not None:
        ids = [tokenizer.end_of_text]
    return ids or tokenizer.encode("\n", unknown="skip") or [0]


def prompt_tokens(model: GPT, ids: Sequence[list[int]]) -> tuple[Tensor, list[int]]:
    """Prompts as rows, filled up on the right, and their lengths.  -> (B, T)"""
    lengths = [len(row) for row in ids]
    padded = [row + [0] * (max(lengths) - len(row)) for row in ids]
    return torch.tensor(padded, device=model.device), lengths


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
    ending = StopStrings(stop)
    for piece in pieces:
        if ready := ending.push(piece):
            yield ready
        if ending.found:
            return
    if rest := ending.flush():
        yield rest


class StopStrings:
    """Text that comes in pieces, up to the first of some stop strings, which may span pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty: it would stop before the first character")
        self.stop = stop
        self.held = ""  # what may yet grow into a stop string
        self.found = False

    def push(self, piece: str) -> str:
        """What of the text, this piece included, is now certain to come before a stop string."""
        text = self.held + piece
        if places := [at for at in (text.find(word) for word in self.stop) if at >= 0]:
            self.held, self.found = "", True
            return text[: min(places)]
        waits = max((overlap(text, word) for word in self.stop), default=0)
        self.held = text[len(text) - waits :]
        return text[: len(text) - waits]

    def flush(self) -> str:
        """What was held back, when no more comes."""
        rest, self.held = self.held, ""
        return rest


def overlap(text: str, word: str) -> int:
    """How many last characters of `text` are a beginning of `word`, short of the whole."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
