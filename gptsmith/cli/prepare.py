"""The verb that turns text into token shards: prepare."""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import SettingError, setting
from ..config.recipe import short_name
from ..config.settings import PrepareSettings
from ..machine.shell import typed
from ..machine.terminal import Display, count, duration, size, tell
from .flags import Parser, UsageError, add_flags, chosen, given
from .opening import SOURCE_HELP


@dataclass(frozen=True, kw_only=True)
class TargetSettings:
    """The tokenizer, and where the dataset is written."""

    tokenizer: str = setting(
        "gpt2",
        "tokenizer: gpt2, char, char:ABC (these characters), byte or a folder with a "
        "tokenizer.json",
        metavar="gpt2|char|byte|FOLDER",
    )
    out: Path | None = setting(
        None, "new folder (default: data/NAME-TOKENIZER, and -I-of-N for a part)", metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class PartSettings:
    """How the work is divided among machines."""

    part: str | None = setting(
        None, "prepare only part I of N of the sources, to be joined with the others", metavar="I/N"
    )
    join: bool = setting(
        False, "join parts: each SOURCE is a folder that --part made, and all must be there"
    )
    ray: str | None = setting(
        None,
        "prepare the parts on a Ray cluster and join them; without ADDRESS, on the cluster that "
        "this machine belongs to",
        metavar="ADDRESS",
        alone="auto",
    )

    def __post_init__(self) -> None:
        if self.ray is not None and self.part is not None:
            raise SettingError("part", "cannot go with --ray, which makes all parts: leave it out")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith prepare`."""
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCE_HELP)
    add_flags(parser, TargetSettings)
    add_flags(parser, PartSettings)
    add_flags(parser, PrepareSettings)


def run(options: Namespace) -> None:
    """Turn text into token shards for training."""
    target, settings = chosen(options, TargetSettings), chosen(options, PrepareSettings)
    how = chosen(options, PartSettings)
    from ..checkpoint.finding import best_of
    from ..data.join import join
    from ..data.on_ray import prepare_on_ray
    from ..data.part_folder import Part
    from ..data.parts import prepare_part
    from ..data.prepare import prepare

    if how.join:
        check_join(options)
        assert target.out is not None
        tell_dataset(target.out, shown(join(options.sources, target.out)))
        return
    name = f"{short_name(options.sources[0])}-{short_name(target.tokenizer)}"
    if how.part is None:
        out, tokenizer = target.out or Path("data") / name, best_of(target.tokenizer)
        if how.ray is None:
            steps = prepare(options.sources, tokenizer, out, options=settings)
        else:
            steps = prepare_on_ray(options.sources, tokenizer, out, how.ray, settings)
        tell_dataset(out, shown(steps))
        return
    part = Part.parse(how.part)
    out = target.out or Path("data") / f"{name}-{part.number}-of-{part.of}"
    tokenizer = best_of(target.tokenizer)
    last = shown(prepare_part(options.sources, tokenizer, out, part, options=settings))
    tell(
        f"part {part} has {last.tokens:,} tokens, in {duration(last.seconds)}; join all parts "
        "with: gptsmith prepare --join DIR... --out DIR"
    )
    print(out)


def check_join(options: Namespace) -> None:
    """Raise UsageError unless the options are those of --join alone."""
    other = given(options, TargetSettings, PartSettings, PrepareSettings).keys() - {"join", "out"}
    if other:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in sorted(other))
        raise UsageError(f"{flags} cannot go with --join, which has all that from the parts")
    if "out" not in options:
        raise UsageError("--join needs --out: the new folder for the dataset")


def shown(steps: Iterator[Any]) -> Any:
    """Show the progress of all steps; return the last `Progress`."""
    display = Display()
    try:
        for progress in steps:
            display.preparing(progress.bytes_done, progress.bytes_total, progress.tokens)
    finally:
        display.close_bar()
    return progress


def tell_dataset(out: Path, last: Any) -> None:
    """Say what there is in a dataset that is finished."""
    from ..data.shards import Dataset

    dataset = Dataset.open(out)
    if dropped := dataset.info.get("dropped"):
        lost = f"{count(dropped['documents'], 'document')}, {size(dropped['bytes'])} of text"
        tell(f"dropped exact repeats of earlier documents: {lost}")
    held_out = 0 if dataset.validation is None else len(dataset.validation)
    tell(
        f"{len(dataset.train):,} training tokens and {held_out:,} validation tokens, in "
        f"{duration(last.seconds)}; train with: gptsmith train {typed(out)}"
    )
    print(out)
