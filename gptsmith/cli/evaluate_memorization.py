"""`gptsmith evaluate MODEL --memorization`: what a model remembers of its training text."""

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ..config.fields import SettingError, setting
from ..config.settings import MemorizationSettings, PrepareSettings
from ..machine.terminal import tell
from .flags import Parser, add_flags, changed, chosen
from .opening import open_writer


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """Whether memorization is measured, and where the report goes."""

    memorization: bool = setting(
        False,
        "measure what the model remembers of DATA, its training data: what it continues word for "
        "word, and where its samples and the validation text are in the training text",
    )
    report: Path | None = setting(
        None, "write the report with all matches to an HTML page", metavar="FILE.html"
    )

    def __post_init__(self) -> None:
        path = self.report
        if path is not None and not path.parent.is_dir():
            raise SettingError("report", f"is {path}: create the folder {path.parent} first")
        if path is not None and path.is_dir():
            raise SettingError("report", f"is {path}, a folder: name a file")


def add_memorization_flags(parser: Parser) -> None:
    """Add the flags of `--memorization`."""
    add_flags(parser, ReportSettings)
    add_flags(parser, MemorizationSettings)


def wants_memorization(options: Namespace, *others: type) -> bool:
    """Return whether `--memorization` is given.

    SettingError for flags that only it has, or with it for those of `others`, which are dataclasses
    of what else can be evaluated.
    """
    wanted = chosen(options, ReportSettings).memorization
    if wanted:
        names, advice = changed(options, *others) - {"data", "json"}, "with --memorization"
    else:
        names = changed(options, ReportSettings, MemorizationSettings)
        names |= {"validation_fraction"} & changed(options, PrepareSettings)
        advice = "without --memorization"
    for name in sorted(names):
        raise SettingError(name, f"has no effect {advice}: leave it out")
    return wanted


def evaluate_memorization(options: Namespace, name: str, data: str, as_json: bool) -> None:
    """Measure what a model remembers, and write the report."""
    from ..data.for_evaluation import opened_splits
    from ..data.shards import is_dataset
    from ..machine.files import write_text

    place, settings = chosen(options, ReportSettings), chosen(options, MemorizationSettings)
    here = Namespace(**{**vars(options), "model": name})
    _, model, tokenizer, decoder = open_writer(here, name)
    from ..evaluation.memorization import memorization
    from ..evaluation.memorization_page import report_page
    from ..evaluation.memorization_text import report_json, report_text

    text = chosen(options, PrepareSettings)
    if not is_dataset(Path(data)):
        tell(
            f"{data} is text: it is split as `gptsmith train` splits it with --validation-fraction "
            f"{text.validation_fraction:g}; if the run did otherwise, name the folder of its data"
        )
    with opened_splits(data, tokenizer, options=text) as dataset:
        found = memorization(model, tokenizer, dataset, settings, decoder=decoder)
        if place.report is not None:
            write_text(place.report, report_page(found, tokenizer, dataset, name))
    report = report_json(found, tokenizer) if as_json else report_text(found, tokenizer)
    print(json.dumps(report) if as_json else report)
