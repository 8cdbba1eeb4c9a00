"""The verb that trains a model: train."""

from argparse import SUPPRESS, BooleanOptionalAction, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.fields import at_least, setting
from ..config.model import FORMER_SWITCHES
from ..config.recipe import OWN_DATA, read_toml, recipes, run_settings, sections
from ..config.settings import RunSettings
from ..machine.environment import importing, rank
from ..machine.shell import typed
from ..machine.terminal import Display, count
from .flags import Parser, UsageError, add_flags, chosen, given

# Above the flags of each section, in the order of the help.
TITLES = {
    "data": "the data",
    "model": "the model",
    "training": "the training",
    "machine": "the machine",
    "report": "reports, samples and checkpoints",
    "prepare": "preparing text, if the data is not yet prepared",
}


@dataclass(frozen=True, kw_only=True)
class FolderSettings:
    """The folder of the run, and how far it is trained now."""

    resume: Path | None = setting(None, "run to resume", metavar="RUN")
    out: Path | None = setting(None, "new folder of the run (default: runs/NAME-N)", metavar="RUN")
    stop_after: int | None = setting(
        None, "stop and save after this step, as Ctrl-C does, and keep the schedule of --steps"
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "stop_after")


WHAT = f"a recipe ({', '.join(recipes())}), a settings file, or the training data"


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith train`."""
    parser.add_argument("what", nargs="?", metavar="RECIPE|FILE.toml|DATA", help=WHAT)
    add_flags(parser, FolderSettings)
    add_run_flags(parser)
    add_former_switches(parser)


def add_run_flags(parser: Parser) -> None:
    """Add a flag for each setting of a run; the defaults shown are those for data of one's own."""
    defaults = read_toml(recipes()[OWN_DATA])
    for section, title in TITLES.items():
        kind, values = sections()[section], getattr(defaults, section)
        group = parser.add_argument_group(title)
        add_flags(group, kind, without=("vocab_size",), defaults=values)


def add_former_switches(parser: Parser) -> None:
    """Add the flags that `--block` replaced; they still work, but the help does not show them."""
    for name in FORMER_SWITCHES:
        kind: dict[str, Any] = {"action": BooleanOptionalAction} if name == "qk_norm" else {}
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, dest=name, default=SUPPRESS, help=SUPPRESS, **kind)


def run(options: Namespace) -> int:
    """Train a model: start a run, or resume one. The defaults shown are those of `gptsmith train
    DATA`; a recipe or a settings file has its own, and flags override both."""
    folders, flags = chosen(options, FolderSettings), given(options, *sections().values())
    flags |= {name: value for name, value in vars(options).items() if name in FORMER_SWITCHES}
    if folders.resume is None:
        settings, name = run_settings(options.what, flags)
    elif options.what or folders.out:
        raise UsageError("--resume names the run: leave out the recipe, the data and --out")

    with importing():
        from ..training.train import continue_run, train_fresh

    display = Display(quiet=rank() != 0)
    if folders.resume is not None:
        task = opener_of(folders.resume)
        trained = continue_run(folders.resume, display, flags, task, folders.stop_after)
    else:
        task = opener(settings)
        trained = train_fresh(settings, folders.out, name, display, task, folders.stop_after)
    if rank() == 0:
        conclude(trained, display)
    return 0 if trained.signal is None else 128 + trained.signal


def opener(settings: RunSettings) -> Any:
    """Return the function that opens the task of a run: text, or what examples are for."""
    if settings.finetune.task is None:
        from ..training.text import open_text

        return open_text
    from ..finetuning.tasks import open_task

    return open_task


def opener_of(folder: Path) -> Any:
    """Return the `opener` of a run in a folder."""
    path = folder / "config.toml"
    return opener(read_toml(path) if path.is_file() else RunSettings())


def conclude(trained: Any, display: Display) -> None:
    """Report how a run ended, where its files are, and what to type next."""
    from ..training import advice
    from ..training.records import last_sample

    stopped = trained.signal is not None or trained.done < trained.settings.training.steps
    if not stopped and trained.settings.finetune.task is not None:
        from ..finetuning.report import summary, test_run

        try:
            found = test_run(trained.folder, display)
        except KeyboardInterrupt:
            display.say("The run is finished and saved, but not tested.")
            display.say(f"To test it:  {advice.resume_command(trained.folder)}")
            raise
        for line in summary(found):
            display.say(line)
    folder, training = trained.folder, trained.settings.training
    steps = training.steps
    if stopped:
        display.say(f"Stopped and saved after {trained.done:,} of {count(steps, 'step')}.")
        display.say(f"To resume:  {advice.resume_command(folder)}")
        return
    sample = last_sample(folder)
    if sample:
        display.say("A sample from the model:\n")
        display.say(sample + "\n")
    best = ""
    if trained.best_loss is not None:
        best = f": validation loss {trained.best_loss:.4f} at step {trained.best_step:,}"
    display.say(f"Finished {count(steps, 'step')}{best}.", "bold")
    if trained.ended_badly:
        display.say(
            "At its end the model predicts worse than a uniform guess, whose loss is "
            f"{trained.task.worst_loss:.4f}. Lower learning rates may help:\n  "
            + advice.train_command(folder, advice.lower_rates(training))
        )
    contents = {
        "loss.png": "the loss curve",
        "samples.md": "samples of its text during training",
        "best": f"names the best of {folder / 'checkpoints'}",
    }
    there = {name: what for name, what in contents.items() if (folder / name).exists()}
    display.table(f"Everything is in {folder}", there)
    longer = advice.more_steps(folder, training, steps)
    if advice.may_become_longer(training, 2 * steps, steps):
        longer = f"{advice.resume_command(folder)} --steps {2 * steps}"
    quoted = typed(folder)
    inside, compare = f"gptsmith inspect {quoted} --prompt TEXT", {}
    match trained.settings.finetune.example_kind:
        case "classify":
            use = {"label": f"gptsmith classify {quoted} --text 'some text'"}
            inside = f"gptsmith describe {quoted}"
        case "chat" | "preference" if trained.settings.finetune.template == "fixed-length":
            words = f"--max-tokens {trained.settings.report.sample_tokens or 1} --temperature 0"
            use = {"ask": f"gptsmith sample {quoted} --prompt TEXT {words}"}
        case "chat" | "preference":
            use = {"talk": f"gptsmith chat {quoted}"}
        case None:
            use = {"write": f"gptsmith sample {quoted} --temperature 0.8"}
            compare = {"compare": advice.compare_command(folder, trained.settings)}
    display.table(
        "Try",
        {
            **use,
            "look inside": inside,
            "longer": longer,
            **compare,
        },
    )
