"""Let a model answer prompts that are tokens, many at once. Knows nothing of examples."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..config.settings import GREEDY
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from .text import Text
from .writing import engine_for, jobs_of, news_of

AT_ONCE = 16  # prompts


class Answer(NamedTuple):
    """What a model answered."""

    text: str
    ended: bool  # by itself, with an end token or a stop string


def answers(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
) -> Iterator[Answer]:
    """Yield the greedy answer to each prompt, in order, of at most `max_tokens` tokens.

    It ends before an end token or a stop string. The model must be in evaluation mode.
    NotFiniteError where its logits are not finite.
    """
    for first in range(0, len(prompts), AT_ONCE):
        some = [list(prompt) for prompt in prompts[first : first + AT_ONCE]]
        jobs = jobs_of(model, some, max_tokens, sampling=GREEDY, seed=0, ends=tokenizer.ends)
        engine = engine_for(model, jobs, None)
        texts = {job: Text(tokenizer, stop=stop) for job in jobs}
        written, ended = dict.fromkeys(jobs, ""), dict.fromkeys(jobs, False)
        for news in news_of(engine):
            for item in news:
                piece = texts[item.job].push(item)
                written[item.job] += piece.text
                ended[item.job] |= piece.finish == "stop"
                if piece.finish:
                    engine.cancel(item.job)  # the engine knows nothing of stop strings
        yield from (Answer(written[job], ended[job]) for job in jobs)
