"""Measure a model on the items of a task: which of them it has right.

The definitions are those of lm-evaluation-harness, so that the numbers can be compared. Knows
nothing of files.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..generation.answers import AT_ONCE, answers
from ..generation.writing import prompt_ids
from ..model.classifier import Classifier
from ..tokenizers import Tokenizer
from ..tokenizers.chat import ChatTemplate, open_template
from .accuracy import Outcome
from .labels import predict
from .task_forms import TASKS, Item
from .task_requests import Judged, scored

SPACES = 8  # tokens of an answer that may be white space around it


Outcomes = Iterator[tuple[int, Outcome]]  # by the number of the item, in any order


def measure(judged: Judged, task: str, items: Sequence[Item]) -> Outcomes:
    """Yield the number and the outcome of each item, as they become known.

    The model is in evaluation mode meanwhile. ValueError in one line for an item that it cannot be
    asked.
    """
    was_training = judged.model.training
    judged.model.eval()
    try:
        yield from MEASURES[TASKS[task].measure](judged, items)
    finally:
        judged.model.train(was_training)


# -- one function for each way to measure


def choose(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Choose the likeliest continuation, and the likeliest for its length.

    The length is in characters without the delimiter or, in llm.c's form, in tokens.
    """
    for each in scored(judged, items):
        item, nats = items[each.number], [choice.logprob for choice in each.choices]
        lengths = each.tokens if item.by_tokens else [*map(len, item.choices)]
        # A choice may lose all its characters with the marks of WikiHow.
        per = [n / length if length else -math.inf for n, length in zip(nats, lengths, strict=True)]
        right = best(nats) == item.answer, best(per) == item.answer
        yield each.number, Outcome(*right, cut=each.cut)


def prefer(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Choose the likelier sentence, whatever its length."""
    for number, outcome in choose(judged, items):
        yield number, outcome._replace(right_norm=None)


def best(values: Sequence[float]) -> int:
    """Return the number of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def continues(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Compare the only continuation with the likeliest tokens."""
    for number, (found,), _, cut in scored(judged, items):
        yield number, Outcome(found.greedy, logprob=found.logprob, cut=cut)


def label(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Compare labels with those that a classifier gives."""
    model: Classifier = judged.model
    for item in items:
        if item.answer not in model.labels:
            known = ", ".join(model.labels[:8]) + (", ..." if len(model.labels) > 8 else "")
            raise ValueError(
                f"{item.place} has the label '{item.answer}', which the model does not know: one "
                f"of {known} is needed"
            )
    texts = (item.prompt for item in items)
    given = predict(model, judged.tokenizer, texts, unknown=judged.unknown)
    for number, (item, each) in enumerate(zip(items, given, strict=True)):
        yield number, Outcome(each.label == item.answer, cut=each.left_out > 0)


def write(judged: Judged, items: Sequence[Item]) -> Outcomes:
    """Compare answers with those that the model writes greedily.

    The model's answer ends at an end token or, unless the right one has several lines, with its
    line; white space around it does not count. A model with a chat template is asked by it.
    """
    model, tokenizer = judged.model, judged.tokenizer
    template = open_template(Path("the model"), tokenizer)
    order = sorted(range(len(items)), key=lambda number: -len(str(items[number].answer)))
    for start in range(0, len(order), AT_ONCE):
        numbers = order[start : start + AT_ONCE]
        prompts = [prompt_of(items[number], tokenizer, template) for number in numbers]
        wanted = [str(items[number].answer) for number in numbers]
        # Every token but those of white space has at least a byte of the answer.
        limit = max(len(text.encode()) for text in wanted)
        if template is None or template.ends:
            limit += SPACES
        stop = () if any("\n" in text for text in wanted) else ("\n",)
        given = answers(model, tokenizer, prompts, max_tokens=limit, stop=stop)
        for number, prompt, text, each in zip(numbers, prompts, wanted, given, strict=True):
            answer = each.text if "\n" in text else each.text.split("\n")[0]
            cut = len(prompt) > model.config.context_length
            yield number, Outcome(answer.strip() == text, cut=cut)


def prompt_of(item: Item, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:
    """Return the ids of a prompt, by the chat template if there is one."""
    try:
        if template is None:
            return prompt_ids(tokenizer, item.prompt)
        return template.ids([{"role": "user", "content": item.prompt}])
    except ValueError as error:
        raise ValueError(f"{item.place}: {error}") from error


MEASURES: dict[str, Callable[[Judged, Sequence[Item]], Outcomes]] = {
    "choose": choose,
    "prefer": prefer,
    "continue": continues,
    "label": label,
    "write": write,
}
