"""The verb that fine-tunes a model on examples: finetune."""

import json
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config.fields import setting
from ..config.finetune import EXAMPLE_KINDS, ONLY_FOR, FinetuneSettings, listed
from ..config.recipe import read_toml, recipes, sections
from ..config.settings import DataSettings
from ..machine.environment import importing, rank
from ..machine.terminal import Display
from .flags import Parser, UsageError, add_flags, chosen, given
from .train import conclude, opener_of

TITLES = {
    "model": "the model that `finetune fresh` makes, in place of one that exists",
    "training": "the training",
    "machine": "the machine",
    "report": "reports, samples and checkpoints",
    "prepare": "reading the data",
}
# Settings that are chosen by the words of the command, or say nothing of examples.
WITHOUT = {
    "model": ("vocab_size",),
    "training": ("start_from",),
    "prepare": ("workers", "shard_tokens"),
}


@dataclass(frozen=True, kw_only=True)
class ExampleSettings:
    """What to learn from."""

    data: str | None = setting(
        None,
        "examples: a .jsonl, .json (a list), .csv, .tsv or .parquet file, a folder with one folder "
        "for each label, or what is built in: small-tasks, sorting, copying, comedy-or-tragedy; or "
        "text",
        metavar="DATA",
    )


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """The folder of the run."""

    resume: Path | None = setting(None, "run to resume", metavar="RUN")
    out: Path | None = setting(None, "new folder of the run (default: runs/NAME-N)", metavar="RUN")


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """What is shown in place of training."""

    show_batch: bool = setting(
        False, "show the first batch and which of its tokens are learned, and do not train"
    )
    json: bool = setting(False, "with --show-batch: a JSON object for each row")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith finetune`."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL|fresh",
        help="the model to start from, or fresh for random weights",
    )
    add_flags(parser, ExampleSettings)
    add_flags(parser, DataSettings, without=("data",))
    add_flags(parser, FolderSettings)
    add_flags(parser, ShowSettings)
    examples = parser.add_argument_group("the examples, and how they are learned")
    add_flags(examples, FinetuneSettings, defaults=defaults("finetune", "finetune"))
    for section, title in TITLES.items():
        group = parser.add_argument_group(title)
        shown = defaults(section, "fresh" if section == "model" else "finetune")
        add_flags(group, sections()[section], without=WITHOUT.get(section, ()), defaults=shown)


def defaults(section: str, kind: str) -> Namespace:
    """Return the defaults of a section as the help shows them: those of each task, where they
    differ. `kind` is fresh or finetune, the recipes that they are in."""
    of_tasks = {
        task: read_toml(recipes()[f"{kind}-{task}"])
        for task in (*EXAMPLE_KINDS, "text")
        if f"{kind}-{task}" in recipes()
    }
    shown = Namespace(task=None)
    for name in {field.name for field in fields(sections()[section])} - {"task"}:
        found: dict[Any, list[str]] = {}  # the tasks that have each default
        for task, recipe in of_tasks.items():
            if task in ONLY_FOR.get(name, of_tasks):
                found.setdefault(getattr(getattr(recipe, section), name), []).append(task)
        several = "; ".join(f"{value} for {listed(tasks)}" for value, tasks in found.items())
        setattr(shown, name, several if len(found) > 1 else next(iter(found)))
    if section == "training":
        shown.steps = f"as epochs say, or {of_tasks['text'].training.steps} for text"
    elif kind == "fresh":  # the only one of these settings that an existing model can be given
        shown.dropout += f"; in a model that exists {defaults('model', 'finetune').dropout}"
    return shown


def run(options: Namespace) -> int:
    """Fine-tune a model on examples of answers, labels or preferences, or on more text. The fields
    of the data tell the task, and each task has its own defaults."""
    folders, show = chosen(options, FolderSettings), chosen(options, ShowSettings)
    flags = given(options, *sections().values())
    display = Display(quiet=rank() != 0)
    if folders.resume is not None and (options.model or folders.out):
        raise UsageError("--resume names the run: leave out the model and --out")
    if folders.resume is None and options.model is None:
        raise UsageError("a model to start from is needed, or fresh for random weights")
    if show.json and not show.show_batch:
        raise UsageError("--json shows a batch: add --show-batch")
    with importing():
        from ..finetuning.finetune import finetune_settings
        from ..finetuning.tasks import open_task
        from ..training.train import continue_run, train_fresh

    if folders.resume is not None:
        trained = continue_run(folders.resume, display, flags, opener_of(folders.resume))
    else:
        settings, name = finetune_settings(options.model, flags)
        if show.show_batch:
            show_first_batch(settings, display, as_json=show.json)
            return 0
        trained = train_fresh(settings, folders.out, name, display, open_task)
    if rank() == 0:
        conclude(trained, display)
    return 0 if trained.signal is None else 128 + trained.signal


def show_first_batch(settings: Any, display: Display, *, as_json: bool) -> None:
    """Write the rows of the first batch: in colours on a terminal, or as JSON."""
    from ..finetuning.batch import first_batch

    if settings.finetune.task == "text":
        raise ValueError(
            "--show-batch shows examples, but the data is text, all of which is learned"
        )
    for number, row in enumerate(first_batch(settings, display), 1):
        if as_json:
            print(json.dumps(row))
        else:
            display.batch_row(number, row)
