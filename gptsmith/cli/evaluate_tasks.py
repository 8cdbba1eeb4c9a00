"""How `gptsmith evaluate --task` measures models on tasks with right answers."""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config.fields import SettingError, setting, suggestion
from ..config.settings import PrepareSettings
from ..config.tables import columns
from ..evaluation.task_forms import TASKS, Item, PromptStyle, read_items
from ..machine.terminal import Display, count, tell
from .flags import chosen
from .opening import open_model


@dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """Which task the data are for."""

    task: str | None = setting(
        None,
        "measure answers, not the loss: DATA is a file of rows with the fields of this task",
        metavar="|".join(TASKS),
    )
    prompt: PromptStyle | None = setting(
        None, "form of the prompts of hellaswag: that of lm-evaluation-harness, or llm.c's"
    )

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            known, close = ", ".join(TASKS), suggestion(self.task, TASKS)
            problem = f"is '{self.task}': one of {known} is needed{close}"
            raise SettingError("task", problem)
        if self.prompt is not None and self.task != "hellaswag":
            raise SettingError("prompt", "is for --task hellaswag: leave it out")


def evaluate_tasks(options: Namespace, data: str, against: str | None, *, as_json: bool) -> None:
    """Measure models, one in memory at a time, on the items of a file; compare them with another.

    The file is read, and refused if it is of another form, before any model is.
    """
    settings, reading = chosen(options, TaskSettings), chosen(options, PrepareSettings)
    task, items = read_items(
        data, settings.task, style=settings.prompt or "lm-eval", options=reading
    )
    if against is not None and len(items) < 2:
        raise ValueError(f"{data} has one item: a comparison needs 2 or more")
    found = dict[str, Any]()
    for name in dict.fromkeys([against or options.models[0], *options.models]):
        found[name] = measured(options, name, task, items, reading.unknown)
        if as_json and name in options.models:
            figures = {"model": name, "task": task, **found[name].to_json()}
            if against is not None:
                figures["against"] = against_json(found, name, against)
            print(json.dumps(figures), flush=True)
    if as_json:
        return
    print(f"{task}: {count(len(items), 'item')} of {data}, ± one standard error")
    print(table(found))
    for name in options.models if against is not None else ():
        for each in compared(found, name, str(against)):
            print(f"\n{each.sentence(name, str(against))}")


def measured(options: Namespace, name: str, task: str, items: Sequence[Item], unknown: Any) -> Any:
    """Open a model and measure it on all items."""
    labels = TASKS[task].measure == "label"
    as_only = Namespace(**{**vars(options), "model": name})
    _, model, tokenizer = open_model(as_only, name, labels=labels)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer.json, which reading text needs: add one")
    from ..evaluation.accuracy import Measured
    from ..evaluation.task_requests import Judged
    from ..evaluation.tasks import measure

    outcomes, display = dict[int, Any](), Display()
    display.open_bar(f"evaluating {name}", len(items), 0)
    try:
        for number, outcome in measure(Judged(model, tokenizer, unknown), task, items):
            outcomes[number] = outcome
            display.move_bar(len(outcomes), f"{len(outcomes):,} of {count(len(items), 'item')}")
    finally:
        display.close_bar()
    result = Measured([outcomes[number] for number in range(len(items))])
    if result.cut:
        limit = model.config.context_length
        tell(
            f"{name}: {count(result.cut, 'item')} longer than the context of {limit:,} tokens, "
            "which lost the beginning of their prompts"
        )
    return result


def compared(found: Any, name: str, against: str) -> Any:
    """Return how a model differs from the one that it is measured against, by each accuracy."""
    from ..evaluation.accuracy import compare

    return compare(found[name], found[against])


def against_json(found: Any, name: str, against: str) -> dict[str, Any]:
    """Return a comparison as plain values."""
    figures = {"model": against, **found[against].to_json()}
    for each in compared(found, name, against):
        figures |= each.to_json()
    return figures


def table(found: Any) -> str:
    """Return the figures of models, with a line for each model."""
    each = {name: result.to_json() for name, result in found.items()}
    known = ("accuracy", "accuracy_norm", "perplexity")
    heads = [head for head in known if any(head in figures for figures in each.values())]
    rows = [("model", *heads)]
    for name, figures in each.items():
        rows.append((name, *(with_error(figures[h], figures[f"{h}_stderr"]) for h in heads)))
    return "\n".join(columns(rows, "<" + ">" * len(heads)))


def with_error(value: float, error: float | None) -> str:
    """Return a figure and its standard error."""
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
