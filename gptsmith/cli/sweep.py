"""The verb that trains a run for each of several settings: sweep."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ..config.fields import Seconds, at_least, setting
from ..config.recipe import sections
from ..machine.environment import importing
from ..machine.shell import typed
from ..machine.terminal import Display, count, duration
from .flags import Parser, UsageError, add_flags, chosen, given
from .train import WHAT, add_run_flags


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What is tried, and where."""

    set: tuple[str, ...] = setting(
        (),
        "values of a setting to try, as learning_rate=1e-3,3e-3; repeatable: every combination of "
        "the values is trained",
        metavar="NAME=V,V",
    )
    seeds: int = setting(1, "runs of each combination, whose seeds count up from --seed")
    budget: Seconds | None = setting(
        None,
        "time for the whole sweep, as 90s, 20m or 1h30m: successive halving leaves the worse half "
        "of the configurations at a half of the steps, a quarter, and so on, as often as needed",
        metavar="TIME",
    )
    processes: int = setting(1, "runs at a time, which share the cores")
    out: Path | None = setting(
        None, "new folder of the sweep (default: runs/NAME-sweep-N)", metavar="FOLDER"
    )
    resume: Path | None = setting(None, "sweep to resume", metavar="FOLDER")

    def __post_init__(self) -> None:
        at_least(self, 1, "seeds", "processes")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith sweep`."""
    parser.add_argument("what", nargs="?", metavar="RECIPE|FILE.toml|DATA", help=WHAT)
    add_flags(parser, SweepSettings)
    add_run_flags(parser)


def run(options: Namespace) -> int:
    """Train a run for each combination of settings, one after another, and compare them. Each is an
    ordinary run, with a folder of its own in that of the sweep; the flags of `gptsmith train` are
    for all of them."""
    settings, flags = chosen(options, SweepSettings), given(options, *sections().values())
    if settings.resume is not None:
        if options.what or settings.out or settings.set or settings.seeds > 1 or flags:
            raise UsageError("--resume names the sweep: leave out all but --budget and --processes")
    elif not settings.set and settings.seeds == 1:
        raise UsageError("what is to differ? Add --set NAME=VALUE,VALUE or --seeds N")
    with importing():
        from ..training.compare import compare_runs
        from ..training.comparison_page import to_text
        from ..training.sweeping import carry_out

    folder = settings.resume or made(options, settings, flags)
    display = Display()
    stopped = carry_out(folder, display, settings.processes, settings.budget)
    quoted = typed(folder)
    again = f"gptsmith sweep --resume {quoted}"
    if stopped is not None:
        display.say(f"The sweep is stopped, and its runs are saved. To go on:  {again}")
        return 128 + stopped
    found = compare_runs([folder])
    print(to_text(found))
    failed = sum(row.run.state == "failed" for row in found.rows)
    if failed:
        display.say(f"{count(failed, 'run')} failed. To try again:  {again}")
    display.say(f"To see this table again:  gptsmith compare {quoted}")
    return 0


def made(options: Namespace, settings: SweepSettings, flags: dict[str, object]) -> Path:
    """Return the folder of a sweep, which is new, or has the sweep of the same command; show what
    it consists of."""
    from ..training.sweep import SWEEP, make_sweep, parse_sets, plan_sweep, same_sweep
    from ..training.train import next_run_folder

    sets = parse_sets(settings.set)
    plan, base, runs, name = plan_sweep(options.what, flags, sets, settings.seeds, settings.budget)
    folder = settings.out or next_run_folder(f"{name}-sweep")
    if not folder.exists():
        make_sweep(folder, plan, base, runs, Display())
    elif not (folder / SWEEP).is_file():
        raise ValueError(f"{folder} already exists: give --out another name")
    elif not same_sweep(folder, plan, base):
        raise ValueError(
            f"{folder} has the sweep of another command: give --out another name, or resume it "
            f"with `gptsmith sweep --resume {typed(folder)}`"
        )
    factors = [f"{len(values)} of {name}" for name, values in sets.items()]
    factors += [count(settings.seeds, "seed")] if settings.seeds > 1 else []
    rows = {"runs": f"{len(runs)}: {' x '.join(factors)}", "folder": str(folder)}
    if settings.budget is not None:
        rows["budget"] = duration(settings.budget)
    if settings.processes > 1:
        rows["processes"] = str(settings.processes)
    Display().table("Sweep", rows)
    return folder
