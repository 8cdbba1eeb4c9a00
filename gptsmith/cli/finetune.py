"""The verb that fine-tunes a model on examples: finetune."""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import setting
from ..config.finetune import FinetuneSettings
from ..config.recipe import sections
from ..config.settings import DataSettings
from ..machine.environment import importing, rank
from ..machine.terminal import Display
from .flags import Parser, UsageError, add_flags, chosen, given
from .train import conclude, opener_of

TITLES = {
    "model": "the model, in place of one that exists (`finetune fresh`)",
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
class FolderSettings:
    """The folder of the run."""

    resume: Path | None = setting(None, "run to resume", metavar="RUN")
    out: Path | None = setting(None, "new folder of the run (default: runs/NAME-N)", metavar="RUN")


@dataclass(frozen=True, kw_only=True)
class ShowSettings:
    """What is shown in place of training."""

    show_batch: bool = setting(
        False, "show the first batch, with what is learned of it, and do not train"
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
    add_flags(parser, DataSettings)
    add_flags(parser, FolderSettings)
    add_flags(parser, ShowSettings)
    add_flags(parser.add_argument_group("the examples"), FinetuneSettings)
    for section, title in TITLES.items():
        group = parser.add_argument_group(title)
        add_flags(group, sections()[section], without=WITHOUT.get(section, ()))


def run(options: Namespace) -> int:
    """Fine-tune a model: on examples of answers, labels or preferences, or on more text. What the
    data holds says which. The defaults shown are general; a task's recipe has its own."""
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
        from ..training.train import continue_run, next_run_folder, train_fresh

    if folders.resume is not None:
        trained = continue_run(folders.resume, display, flags, opener_of(folders.resume))
    else:
        settings, name = finetune_settings(options.model, flags)
        if show.show_batch:
            show_first_batch(settings, display, as_json=show.json)
            return 0
        trained = train_fresh(settings, folders.out or next_run_folder(name), display, open_task)
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
