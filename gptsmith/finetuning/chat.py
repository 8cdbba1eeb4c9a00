"""The task of answering: only the answers are learned, and their ends.

Shapes:  R rows    T tokens
"""

import math
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ..data.encoded import Examples
from ..generation.answers import answers
from ..machine.devices import autocast
from ..model.gpt import GPT
from ..model.loss import NOT_LEARNED
from ..model.preference import target_logprobs
from ..tokenizers.chat import FIXED_LENGTH
from ..training.task import Evaluating, token_figures
from .task import ExampleTask

SHOWN = 3  # held-out prompts that samples.md shows the answers to


class Wanted(NamedTuple):
    """A held-out prompt, the answer in the data, and what the model answered."""

    prompt: str
    wanted: str
    answer: str
    ended: bool  # by itself, with an end token; at its length where no end was learned

    @property
    def exact(self) -> bool:
        """Whether the answer is the one wanted, but for spaces around it."""
        return self.ended and self.answer.strip() == self.wanted.strip()


class ChatTask(ExampleTask):
    """Answers to prompts and in conversations."""

    unit: ClassVar[str] = "example"

    @property
    def worst_loss(self) -> float:
        """The loss of a uniform guess, in nats per token."""
        assert self.tokenizer is not None
        return math.log(self.tokenizer.vocab_size)

    def describe(self) -> str:
        """Return what is learned, in a line of the plan."""
        info = self.examples.info
        share = info["splits"]["train"]["learned"] / max(1, info["splits"]["train"]["tokens"])
        ends = ", with their ends" if has_ends(self.examples) else ""
        return f"chat: the answers are learned, {share:.0%} of the tokens{ends}"

    def batch_sums(self, trainer: Evaluating, split: str, numbers: np.ndarray) -> np.ndarray:
        """Return nats, learned targets and their bytes.  (R,) -> (3,)"""
        tokens, targets = self.read(split, numbers, trainer.device)
        nats = -answer_logprobs(trainer, tokens, targets).sum()
        learned = targets[targets != NOT_LEARNED].cpu().numpy()
        return np.array([float(nats), len(learned), self.byte_lengths[learned].sum()])

    @property
    def byte_lengths(self) -> np.ndarray:
        """The bytes of each token, (V,)."""
        assert self.tokenizer is not None
        return self.tokenizer.byte_lengths()

    def figures(self, sums: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Return the fields of an evaluation's record from the sums (3,)."""
        return token_figures(sums, self.tokenizer, device)

    def sample(self, model: GPT, step: int) -> Iterator[str]:
        """Yield held-out prompts with the answers in the data and the model's."""
        if not self.settings.report.sample_tokens:
            return
        limit = self.settings.report.sample_tokens
        yield from map(shown, answered(self, model, "validation", SHOWN, max_tokens=limit))


def answered(
    task: ExampleTask, model: GPT, split: str, most: int | None = None, *, max_tokens: int
) -> Iterator[Wanted]:
    """Let a model in evaluation mode answer the prompts of a split, or the first ones, greedily."""
    tokenizer, rows = task.examples.tokenizer, task.splits[split]
    numbers = range(len(rows) if most is None else min(most, len(rows)))
    pairs = [prompt_and_answer(*rows.read(number)[0]) for number in numbers]
    ends = has_ends(task.examples)
    if not ends:
        max_tokens = min(max_tokens, max(len(wanted) for _, wanted in pairs))
    told = answers(model, tokenizer, [prompt for prompt, _ in pairs], max_tokens=max_tokens)
    for (prompt, wanted), answer in zip(pairs, told, strict=True):
        right = tokenizer.decode(id for id in wanted if id not in tokenizer.ends)
        yield Wanted(tokenizer.decode(prompt), right, answer.text, answer.ended or not ends)


def has_ends(examples: Examples) -> bool:
    """Return whether the answers have an end, which is learned too."""
    return examples.info["template"] != FIXED_LENGTH


@torch.inference_mode()
def answer_logprobs(
    trainer: Evaluating, tokens: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the summed log-probability of each row's targets.  (R, T), (R, T) -> (R,)"""
    model = trainer.model
    with autocast(trainer.device, trainer.dtype):
        return target_logprobs(model.features(tokens), model.lm_head.weight, targets)


def prompt_and_answer(tokens: np.ndarray, targets: np.ndarray) -> tuple[list[int], list[int]]:
    """Return the ids before a row's last answer, and that answer's.  (T,), (T,)"""
    ids = [*tokens.tolist(), int(targets[-1])]
    wanted = [NOT_LEARNED, *targets.tolist()]
    end = len(ids)
    while wanted[end - 1] == NOT_LEARNED:  # what follows the answer
        end -= 1
    start = end
    while wanted[start - 1] != NOT_LEARNED:
        start -= 1
    return ids[:start], ids[start:end]


def shown(each: Wanted) -> str:
    """Return an answer as samples.md shows it."""
    end = "" if each.ended else " (it did not end)"
    return (
        f"{each.prompt.strip()}\n\nwanted: {each.wanted.strip()}\n"
        f"answer: {each.answer.strip()}{end}\n\n----\n\n"
    )
