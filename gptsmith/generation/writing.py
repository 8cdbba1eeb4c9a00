"""Generate tokens or text from prompts, each call with its own engine.

Knows nothing of files, terminals or HTTP.

Shapes:  B batch    T prompt tokens    N new tokens    V vocabulary
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config.classifier import check_writes
from ..config.fields import SettingError
from ..config.settings import GREEDY, SamplingSettings
from ..machine.devices import synchronize
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

    Row i has its own generator, seeded with `seed + i`, and its output does not depend on the other
    rows. `lengths` gives the number of prompt tokens of each row; the rest of the row is ignored.
    Past the context limit a row sees its last context_length tokens, and each token costs a full
    forward pass, as all positions shift. A `draft`, for a single row only, guesses tokens to save
    forward passes; the output stays the same. A `decoder` is the model's compiled step, which reads
    the tokens where they are few. ValueError for prompts or settings that do not fit the model,
    NotFiniteError for logits that are not finite.
    """
    prompts = checked_rows(tokens, lengths)
    if draft is not None and not (use_cache and len(prompts) == 1):
        raise ValueError(f"a draft needs a cache and one row of tokens, not {len(prompts)}")
    jobs = jobs_of(model, prompts, max_new_tokens, sampling=sampling, seed=seed, draft=draft)
    if max_new_tokens == 0:
        return
    device = model.device
    for news in news_of(engine_for(model, jobs, decoder, use_cache=use_cache)):
        new = [item.token.id for item in news if item.token is not None]
        # A step gives one token to every row, or several to the only row of a draft.
        for start in range(0, len(new), len(jobs)):
            yield torch.tensor(new[start : start + len(jobs)], device=device)


def generate_greedy(model: GPT, tokens: Tensor, max_new_tokens: int) -> Tensor:
    """Return the prompt with its greedy continuation.  (B, T) -> (B, T + max_new_tokens)

    Like the book's `generate_text_simple`: call `model.eval()` first to turn off dropout.
    """
    new = list(generate_tokens(model, tokens, max_new_tokens))
    return torch.cat([tokens, *(chosen.unsqueeze(1) for chosen in new)], dim=1)


def timed_tokens(
    model: GPT, tokens: Tensor, max_new_tokens: int, *, decoder: Decoder | None = None
) -> tuple[list[float], Tensor]:
    """Continue each row greedily; return the times, and the new tokens.  (B, T) -> (B, N)

    The N + 1 times are those of the start and of each token, in seconds by time.perf_counter.
    """
    times, new = [time.perf_counter()], []
    for chosen in generate_tokens(model, tokens, max_new_tokens, decoder=decoder):
        synchronize(model.device)
        times.append(time.perf_counter())
        new.append(chosen)
    return times, torch.stack(new, dim=1)


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
    """Continue a prompt, yielding the new text in pieces of whole characters.

    It ends before a stop string or <|endoftext|>, or after `max_tokens`. Sampling settings can be
    given by name: `stream(..., temperature=0.8, top_k=50)`.
    """
    sampling = replace(sampling, **choices)
    jobs = text_jobs(
        model, tokenizer, [prompt], max_tokens, sampling=sampling, seed=seed, draft=draft
    )
    return pieces(engine_for(model, jobs, decoder), Text(tokenizer, stop=stop))


def pieces(engine: Engine, text: Text) -> Iterator[str]:
    """Yield the text of an engine's only job as it grows."""
    for news in news_of(engine):
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
    """Return `num_samples` continuations of each prompt, in order, generated in one batch.

    Continuation i of the list is what `stream` yields with seed + i.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    # Multiplied as a list, an impossible number fails before it fills the memory.
    repeated = [text for each in prompts for text in [each] * num_samples]
    jobs = text_jobs(model, tokenizer, repeated, max_tokens, sampling=sampling, seed=seed)
    engine = engine_for(model, jobs, decoder)
    texts = {job: Text(tokenizer, stop=stop) for job in jobs}
    written = dict.fromkeys(jobs, "")
    for news in news_of(engine):
        for item in news:
            piece = texts[item.job].push(item)
            written[item.job] += piece.text
            if piece.finish:
                engine.cancel(item.job)  # a stop string ended it, which the engine does not know
    return list(written.values())


complete = generate  # the former name of `generate`


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Encode a prompt; an empty one becomes <|endoftext|> or, where there is none, a newline."""
    ids = tokenizer.encode(prompt)
    if not ids and tokenizer.end_of_text is not None:
        ids = [tokenizer.end_of_text]
    return ids or tokenizer.encode("\n", unknown="skip") or [0]


# -- jobs, and an engine for them


def checked_rows(tokens: Tensor, lengths: Sequence[int] | None) -> list[list[int]]:
    """Return the rows of tokens (B, T) up to their lengths; ValueError if one is empty."""
    if tokens.ndim != 2 or tokens.numel() == 0:
        raise ValueError(
            f"the prompt has shape {tuple(tokens.shape)}: (batch, tokens) with a token is needed"
        )
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
    """Return a job for each prompt, number i with seed + i; ValueError for invalid input."""
    check_writes(model.config, "the model")
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


def text_jobs(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int, **choices: Any
) -> list[Job]:
    """Return a job for each prompt, which ends with one of the tokenizer's `ends`."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    return jobs_of(model, ids, max_tokens, ends=tokenizer.ends, **choices)


def engine_for(
    model: GPT, jobs: Sequence[Job], decoder: Decoder | None, *, use_cache: bool = True
) -> Engine:
    """Return an engine that has a slot for each of the jobs, and runs only them."""
    limit = model.config.context_length
    longest = [len(job.prompt) + job.max_tokens for job in jobs if len(job.prompt) <= limit]
    # With a capacity of 1, every text exceeds its slot and is read whole for each token.
    capacity = min(limit, max(longest, default=1)) if use_cache else 1
    engine = Engine(Slots(model, len(jobs), decoder, capacity=capacity))
    for job in jobs:
        engine.submit(job)
    return engine


def news_of(engine: Engine) -> Iterator[list[News]]:
    """Yield the news of each step until all jobs have finished; NotFiniteError if one fails."""
    while not engine.idle:
        news = engine.step(0.0)  # no job has a deadline
        for item in news:
            if item.finish == "failed":
                raise NotFiniteError(item.reason)
        yield news
