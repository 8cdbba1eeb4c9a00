"""The verb that measures models, on a text or a task, and against one another: evaluate."""

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import REQUIRED, SettingError, at_least, setting
from ..config.settings import InferenceSettings, PrepareSettings, Split
from .evaluate_memorization import (
    add_memorization_flags,
    evaluate_memorization,
    wants_memorization,
)
from .evaluate_tasks import TaskSettings, evaluate_tasks
from .flags import Parser, add_flags, changed, chosen
from .opening import DATA_HELP, MODEL_HELP, open_model, verified

ROW_ENDINGS = (".jsonl", ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What to evaluate on."""

    data: str = setting(REQUIRED, f"what to evaluate on: {DATA_HELP}", metavar="DATA")
    against: str | None = setting(
        None,
        "compare each MODEL with this one, document by document: better, worse or undecided",
        metavar="MODEL",
    )
    split: Split | None = setting(
        None, "split of prepared data (default: validation); a text is evaluated whole"
    )
    tokens: int | None = setting(None, "evaluate on the first N tokens only")
    context_length: int | None = setting(None, "tokens per window (default: the model's context)")
    stride: int | None = setting(
        None,
        "tokens by which the window moves; fewer than it holds give every token more context, and "
        "take longer (default: windows side by side)",
    )
    per_document: Path | None = setting(
        None,
        "write the figures of each document to a file: .jsonl, .csv or .parquet",
        metavar="FILE",
    )
    by_position: Path | None = setting(
        None, "draw the loss against the number of tokens before", metavar="PNG"
    )
    plot: Path | None = setting(
        None,
        "draw, with --against, both models by document and the sorted differences",
        metavar="PNG",
    )
    json: bool = setting(False, "write a JSON object on a line for each MODEL")

    def __post_init__(self) -> None:
        at_least(self, 2, "tokens")
        at_least(self, 1, "context_length", "stride")
        if self.per_document is not None and self.per_document.suffix not in ROW_ENDINGS:
            wanted = "a file that ends in .jsonl, .csv or .parquet is needed"
            raise SettingError("per_document", f"is {self.per_document}: {wanted}")
        for name in ("per_document", "by_position", "plot"):
            path = getattr(self, name)
            if path is not None and not path.parent.is_dir():
                raise SettingError(name, f"is {path}: create the folder {path.parent} first")
            if path is not None and path.is_dir():
                raise SettingError(name, f"is {path}, a folder: name a file")
        if self.plot is not None and self.against is None:
            raise SettingError("plot", "draws a comparison: add --against MODEL, or leave it out")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith evaluate`."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    add_flags(parser, EvaluateSettings)
    add_flags(parser, TaskSettings)
    add_memorization_flags(parser)
    add_flags(parser, PrepareSettings, without=("deduplicate", "shard_tokens"))
    add_flags(parser, InferenceSettings, without=("compile",))


def run(options: Namespace) -> None:
    """Measure the loss of models on a text, their answers, or what one remembers."""
    settings = chosen(options, EvaluateSettings)
    if wants_memorization(options, EvaluateSettings, TaskSettings):
        model, *others = options.models
        if others:
            raise ValueError(f"--memorization is of one model: leave out {' '.join(others)}")
        evaluate_memorization(options, model, settings.data, settings.json)
    elif chosen(options, TaskSettings).task is None:
        evaluate_text(options, settings)
    else:
        for name in changed(options, EvaluateSettings) - {"data", "against", "json"}:
            raise SettingError(name, "is for the loss on a text: leave it out, or --task")
        evaluate_tasks(options, settings.data, settings.against, as_json=settings.json)


def evaluate_text(options: Namespace, settings: EvaluateSettings) -> None:
    """Measure models on a text, one after another, and write what was found."""
    from ..evaluation.result import Comparison, table

    found, comparisons = {}, []
    for name, evaluation in evaluations(options, settings):
        found[name], row = evaluation, {"model": name, **evaluation.to_json()}
        if settings.against and name in options.models:
            other = found[settings.against]
            comparisons.append(Comparison(name, evaluation, settings.against, other))
            row["against"] = comparisons[-1].to_json()
        if settings.json and name in options.models:
            print(json.dumps(row), flush=True)
    if not settings.json:
        lines = table(found) if len(found) > 1 else map(str, found.values())
        print(*lines, *(f"\n{comparison}" for comparison in comparisons), sep="\n")
    draw(settings, found, comparisons)


def evaluations(options: Namespace, settings: EvaluateSettings) -> Iterator[tuple[str, Any]]:
    """Load and evaluate one model after another, the one to compare with first."""
    from ..evaluation.by_document import document_rows, rows_written
    from ..evaluation.documents import opened_documents
    from ..evaluation.heldout import evaluate_documents

    names = list(dict.fromkeys([settings.against or options.models[0], *options.models]))
    vocabularies = [vocabulary(options, name, settings) for name in names]
    path = settings.per_document
    with (
        opened_documents(
            settings.data,
            vocabularies,
            split=settings.split,
            first_tokens=settings.tokens,
            options=chosen(options, PrepareSettings),
        ) as texts,
        nullcontext() if path is None else rows_written(path) as write,
    ):
        if settings.against and len(texts[0][1]) < 2:
            raise ValueError(
                f"{settings.data} is too short to compare models: 2 or more documents, or more "
                "than 256 bytes, are needed"
            )
        for name, (tokenizer, _), text in zip(names, vocabularies, texts, strict=True):
            _, model, _ = open_model(Namespace(**{**vars(options), "model": name}), name)
            length, stride = settings.context_length, settings.stride
            found = evaluate_documents(model, *text, context_length=length, stride=stride)
            del model  # before the next one is loaded
            if write is not None:
                write(document_rows(name, found, text[0], tokenizer))
            yield name, found


def vocabulary(options: Namespace, name: str, settings: EvaluateSettings) -> tuple[Any, int]:
    """Return a model's tokenizer and the size of its vocabulary, without loading the model.

    ValueError if it cannot be evaluated as the settings say.
    """
    from ..checkpoint.folder import read_config
    from ..evaluation.heldout import check_window

    base = chosen(options, InferenceSettings).base
    folder, tokenizer = verified(name, labels=False, base=base)
    config = read_config(folder, base)
    check_window(config, settings.context_length, settings.stride)
    if tokenizer is None and settings.against is not None:
        raise ValueError(
            f"{name} has no tokenizer.json, which bits per byte need: add one, or leave out "
            "--against"
        )
    return tokenizer, config.vocab_size


def draw(settings: EvaluateSettings, found: dict[str, Any], comparisons: list[Any]) -> None:
    """Draw what the settings ask for."""
    from ..evaluation.drawing import draw_differences, draw_positions

    if settings.by_position is not None:
        draw_positions(found, settings.by_position)
    if settings.plot is not None:
        draw_differences(comparisons, settings.plot)
