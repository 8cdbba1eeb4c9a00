"""From prompts to tokens, or to text, by an engine of their own.

Knows nothing of files, terminals or HTTP.

Shapes:  B batch    T prompt tokens    V vocabulary
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config.fields import SettingError
from ..config.settings import GREEDY, SamplingSettings
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from .compiled import Decoder
from .drafts import Draft
from .engine import Engine
from .job import Job, News
from .sampling import NotFiniteError
from .slots import Slots
from .text import Text


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
    prompts = checked_rows(tokens, lengths)
    if draft is not None and not (use_cache and len(prompts) == 1):
        raise ValueError(f"a draft needs a cache and one row of tokens, not {len(prompts)}")
    jobs = jobs_of(model, prompts, max_new_tokens, sampling=sampling, seed=seed, draft=draft)
    if max_new_tokens == 0:
        return
    device = model.device
    for news in steps(engine_for(model, jobs, decoder, use_cache=use_cache)):
        new = [item.token.id for item in news if item.token is not None]
        # Each step brings a token to every row, or to the only row one or several.
        for start in range(0, len(new), len(jobs)):
            yield torch.tensor(new[start : start + len(jobs)], device=device)


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
    jobs = jobs_of(
        model,
        [prompt_ids(tokenizer, prompt)],
        max_tokens,
        sampling=replace(sampling, **choices),
        seed=seed,
        ends=ends_of(tokenizer),
        draft=draft,
    )
    return pieces(engine_for(model, jobs, decoder), Text(tokenizer, stop=stop))


def pieces(engine: Engine, text: Text) -> Iterator[str]:
    """The text of an engine's only job as it grows."""
    for news in steps(engine):
        for item in news:
            piece = text.push(item)
            if piece.text:
                yield piece.text
            if piece.finish:
                return


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
    ends = ends_of(tokenizer)
    jobs = jobs_of(model, ids, max_tokens, sampling=sampling, seed=seed, ends=ends)
    engine = engine_for(model, jobs, decoder)
    texts = {job: Text(tokenizer, stop=stop) for job in jobs}
    written = dict.fromkeys(jobs, "")
    for news in steps(engine):
        for item in news:
            piece = texts[item.job].push(item)
            written[item.job] += piece.text
            if piece.finish:
                engine.cancel(item.job)  # a stop string is known here only
    return list(written.values())


complete = generate  # its first name


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """A prompt as the model takes it; an empty one begins a document, or a line."""
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.end_of_text is not None:
        ids = [tokenizer.end_of_text]
    return ids or tokenizer.encode("\n", unknown="skip") or [0]


def ends_of(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that end a text: <|endoftext|>, or none."""
    return frozenset() if tokenizer.end_of_text is None else frozenset({tokenizer.end_of_text})


# -- jobs, and an engine for them


def checked_rows(tokens: Tensor, lengths: Sequence[int] | None) -> list[list[int]]:
    """The rows of tokens (B, T) up to their lengths; ValueError where there is nothing in one."""
    if tokens.ndim != 2 or tokens.numel() == 0:
        got = tuple(tokens.shape)
        raise ValueError(f"the prompt has shape {got}: (batch, tokens) with a token is needed")
    B, T = tokens.shape
    ends = [T] * B if lengths is None else [int(length) for length in lengths]
    if len(ends) != B or not 1 <= min(ends) <= max(ends) <= T:
        raise ValueError(f"lengths is {ends}: for each of {B} rows 1 to {T} is needed")
    return [row[:end] for row, end in zip(tokens.tolist(), ends, strict=True)]


def jobs_of(
    model: GPT,
    prompts: Sequence[list[int]],
    max_tokens: int,
    *,
    sampling: SamplingSettings,
    seed: int,
    **choices: Any,
) -> list[Job]:
    """A job for each prompt, number i with seed + i; ValueError for what cannot be generated."""
    if not prompts:
        raise ValueError("there is no prompt: at least one with a token is needed")
    if max_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_tokens}: at least 0 is needed")
    V = model.config.vocab_size
    if sampling.top_k is not None and sampling.top_k > V:
        raise SettingError("top_k", f"is {sampling.top_k}: at most the vocabulary, {V}, is needed")
    if not all(0 <= min(prompt) <= max(prompt) < V for prompt in prompts):
        raise ValueError(f"the prompt has ids outside the vocabulary: 0 to {V - 1} are needed")
    return [
        Job(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=sampling,
            seed=seed + number,
            beyond_context=True,
            **choices,
        )
        for number, prompt in enumerate(prompts)
    ]


def engine_for(
    model: GPT, jobs: Sequence[Job], decoder: Decoder | None, *, use_cache: bool = True
) -> Engine:
    """An engine with a slot for each of some jobs, which have it to themselves."""
    limit = model.config.context_length
    longest = [len(job.prompt) + job.max_tokens for job in jobs if len(job.prompt) <= limit]
    # A text that is longer than a slot is read whole for each token, so one place is no cache.
    capacity = min(limit, max(longest, default=1)) if use_cache else 1
    engine = Engine(Slots(model, len(jobs), decoder, capacity=capacity))
    for job in jobs:
        engine.submit(job)
    return engine


def steps(engine: Engine) -> Iterator[list[News]]:
    """The news of each step until all jobs have finished; NotFiniteError where one failed."""
    while not engine.idle:
        news = engine.step(0.0)  # no job has a deadline
        for item in news:
            if item.finish == "failed":
                raise NotFiniteError(item.reason)
        yield news
