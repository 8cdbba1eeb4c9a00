"""The command that trains: a fresh run, or one continued."""

from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..config.fields import suggestion
from ..config.model import FORMER_SWITCHES, GPTConfig
from ..config.recipe import read_toml, recipes, with_overrides
from ..config.settings import (
    DataSettings,
    MachineSettings,
    PrepareSettings,
    ReportSettings,
    RunSettings,
    TrainingSettings,
)
from ..machine.environment import rank
from .flags import Parser, UsageError, add_flags, given
from .opening import short_name

OWN_DATA = "default"  # the recipe for `train DATA`, where no recipe is named


def add_train(parser: Parser) -> None:
    parser.add_argument(
        "what",
        nargs="?",
        metavar="RECIPE|FILE.toml|DATA",
        help=f"a recipe ({', '.join(recipes())}), a settings file, or what to learn from",
    )
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped")
    parser.add_argument("--out", metavar="RUN", help="the run's folder (default: runs/NAME-N)")
    group = parser.add_argument_group
    add_flags(group("the data"), DataSettings)
    add_flags(group("the model"), GPTConfig, without=("vocab_size",))
    add_former_switches(parser)
    add_flags(group("the training"), TrainingSettings)
    add_flags(group("the machine"), MachineSettings)
    add_flags(group("what is shown and kept"), ReportSettings)
    add_flags(group("the text"), PrepareSettings)


def add_former_switches(parser: Parser) -> None:
    """Flags that `--block` took the place of: understood, though help does not show them."""
    for name in FORMER_SWITCHES:
        kind: dict[str, Any] = {"action": BooleanOptionalAction} if name == "qk_norm" else {}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, default=SUPPRESS, help=SUPPRESS, **kind)


def train(options: Namespace) -> int:
    """Train a model: a fresh run, or one continued."""
    flags = given(
        options,
        *(GPTConfig, DataSettings, PrepareSettings),
        *(TrainingSettings, MachineSettings, ReportSettings),
    )
    flags |= {name: value for name, value in vars(options).items() if name in FORMER_SWITCHES}
    if options.resume:
        if options.what or options.out:
            raise UsageError("--resume names the run: leave out the recipe, the data and --out")
        folder = Path(options.resume)
        if not folder.is_dir():
            raise FileNotFoundError(f"no run at {folder}")
    else:
        settings, name = starting_settings(options.what)
        settings = with_overrides(settings, flags)
        refuse_other_model(settings, flags)

    from ..machine.terminal import Display
    from ..training.start import next_run_folder, resume, train_fresh

    display = Display(quiet=rank() != 0)
    if options.resume:
        outcome = resume(folder, display, flags)
    else:
        folder = Path(options.out) if options.out else next_run_folder(name)
        outcome = train_fresh(settings, folder, display)
    if rank() == 0:
        conclude(outcome, display)
    return 0 if outcome.signal is None else 128 + outcome.signal


def starting_settings(what: str | None) -> tuple[RunSettings, str]:
    """The settings that the first word of `train` stands for, and a name for the run."""
    known = recipes()
    if not what:
        raise UsageError(f"train what? A recipe ({', '.join(known)}), a .toml file, or data")
    if what in known:
        return read_toml(known[what]), what
    if what.endswith(".toml"):
        if not Path(what).is_file():
            raise FileNotFoundError(f"no settings file at {what}")
        return read_toml(Path(what)), Path(what).stem
    if what != "-" and not Path(what).exists():
        hint = suggestion(what, [*known, "shakespeare"])
        raise ValueError(f"'{what}' is no recipe, file or folder{hint}")
    settings = read_toml(known[OWN_DATA])
    return replace(settings, data=replace(settings.data, data=what)), short_name(what)


def refuse_other_model(settings: RunSettings, flags: dict[str, Any]) -> None:
    """The model's shape comes with `--from`; flags that would change it are refused."""
    if settings.training.start_from is None:
        return
    for field in fields(GPTConfig):
        if field.name in flags and field.name != "dropout":
            flag = "--" + field.name.replace("_", "-")
            raise UsageError(f"{flag} cannot go with --from, which brings its own model")


def conclude(outcome: Any, display: Any) -> None:
    """Say how a run ended, where everything is, and what to type next."""
    folder = outcome.folder
    if outcome.signal is not None:
        display.say(f"Stopped and saved after {outcome.done:,} of {outcome.steps:,} steps.")
        display.say(f"Go on with:  gptsmith train --resume {folder}")
        return
    sample = last_sample(folder)
    if sample:
        display.say("A sample of what it writes now:\n")
        display.say(sample + "\n")
    best = ""
    if outcome.best_loss is not None:
        best = f": validation loss {outcome.best_loss:.4f} at step {outcome.best_step:,}"
    display.say(f"Finished {outcome.steps:,} steps{best}.", "bold")
    display.table(
        "Everything is in " + str(folder),
        {
            "loss.png": "the loss curve",
            "samples.md": "what it wrote on the way",
            "best": f"names the best of {folder / 'checkpoints'}",
        },
    )
    display.table(
        "Try",
        {
            "write": f"gptsmith sample {folder} --temperature 0.8",
            "look inside": f"gptsmith describe {folder}",
            "longer": f"gptsmith train {folder / 'config.toml'} --steps {2 * outcome.steps}",
        },
    )


def last_sample(folder: Path) -> str:
    """The newest text in a run's samples.md, unquoted; empty where there is none."""
    path = folder / "samples.md"
    if not path.is_file():
        return ""
    newest = path.read_text(encoding="utf-8").rpartition("\n## step ")[2].partition("\n")[2]
    lines = [line.removeprefix(">").removeprefix(" ") for line in newest.strip().splitlines()]
    return "\n".join("  " + line for line in lines)
