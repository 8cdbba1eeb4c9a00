"""From a request to the engine's jobs, checked against the model.

Knows nothing of tokenizers, routes or responses.
"""

import secrets
from collections.abc import Iterable, Sequence

from ..config.model import GPTConfig
from ..generation.job import Job
from .errors import ApiError, refused, shown
from .requests import GenerationRequest


def jobs(
    request: GenerationRequest,
    prompts: Sequence[list[int]],
    config: GPTConfig,
    *,
    beginning: list[int],
    ends: frozenset[int],
    deadline: float,
) -> list[Job]:
    """Return the engine's jobs: `candidates` texts for each prompt, prompt by prompt.

    The model reads `beginning` where a prompt is empty. `ends` are the tokens that end a text;
    `deadline` is by time.monotonic. Raises ApiError if the request does not fit the model.
    """
    check_sizes(request, prompts, config)
    limit = config.context_length  # ends every text, whatever max_tokens says
    seed = secrets.randbits(32) if request.seed is None else request.seed
    alternatives = request.alternatives
    if request.candidates > request.n and alternatives is None:
        alternatives = 0  # best_of compares log-probabilities
    return [
        Job(
            prompt=ids or beginning,
            max_tokens=limit if request.most_tokens is None else min(request.most_tokens, limit),
            sampling=request.sampling(),
            seed=seed + number * request.candidates + candidate,
            min_tokens=request.min_tokens,
            ends=(frozenset() if request.ignore_eos else ends) | {*request.stop_token_ids},
            bias=request.logit_bias,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            alternatives=alternatives,
            score_prompt=request.scores_prompt and bool(ids),
            deadline=deadline,
        )
        for number, ids in enumerate(prompts)
        for candidate in range(request.candidates)
    ]


def check_sizes(
    request: GenerationRequest, prompts: Sequence[list[int]], config: GPTConfig
) -> None:
    """Raise ApiError if the prompts, logit_bias or stop_token_ids do not fit the model."""
    check_prompts(prompts, config)
    check_ids("logit_bias", request.logit_bias, config.vocab_size)
    check_ids("stop_token_ids", request.stop_token_ids, config.vocab_size)


def check_prompts(prompts: Sequence[list[int]], config: GPTConfig) -> None:
    """Raise ApiError if the tokens of a prompt do not fit the model."""
    V, limit = config.vocab_size, config.context_length
    for ids in prompts:
        if len(ids) > limit:
            raise too_long(f"{len(ids):,} tokens", limit)
        if ids and not 0 <= min(ids) <= max(ids) < V:
            raise refused(
                f"the prompt has token ids outside the vocabulary: 0 to {V - 1} are needed"
            )


def check_ids(name: str, ids: Iterable[int], vocab_size: int) -> None:
    """Raise ApiError if a field has token ids beyond the vocabulary."""
    if (largest := max(ids, default=0)) >= vocab_size:
        raise refused(f"{name} has token {shown(largest)}: 0 to {vocab_size - 1} are needed", name)


def too_long(size: str, limit: int) -> ApiError:
    """Return the error for a prompt that is longer than the context."""
    return refused(
        f"the prompt has {size}, but the model's context_length is {limit:,}: shorten it",
        code="context_length_exceeded",
    )
