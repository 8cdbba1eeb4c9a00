"""Carry out a sweep: one process for each run, one after another or several at a time.

The plan of a sweep with a budget is explained in `halving.py`.
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..config.fields import SettingError
from ..config.recipe import read_toml
from ..config.settings import RunSettings
from ..data.shards import is_dataset
from ..machine.environment import cores
from ..machine.shell import typed
from ..machine.terminal import Display, count, duration
from .halving import (
    Speed,
    affordable,
    best_configurations,
    choose_halvings,
    counts,
    fractions,
    last_step,
    most_halvings,
    seconds_of,
)
from .records import CONFIG_TOML
from .run_process import RunProcess, launch, recorded_steps, stop_requests
from .stopping import stopping_signals
from .summary import is_training, last_event, summarize
from .sweep import BASE, Sweep, losses, read_sweep, settings_of, speeds
from .train import locked

PAUSE = 0.1  # seconds between looks at the processes


def carry_out(folder: Path, display: Display, processes: int, budget: float | None) -> int | None:
    """Train the runs of a sweep, from where it is; return the signal that stopped it, if one did.

    A `budget` in seconds replaces that of the sweep. SettingError where no plan fits the budget, or
    where it is divided already.
    """
    read_sweep(folder)  # before the lock makes a file in a folder that is no sweep
    with locked(folder):
        sweep = read_sweep(folder)
        if budget is not None and budget != sweep.budget:
            if sweep.halvings is not None:
                raise SettingError(
                    "budget", "cannot change: it is divided already, so leave it out"
                )
            sweep.budget = budget
            sweep.save(folder)
        with stop_requests() as received:
            sweeping = Sweeping(folder, sweep, display, processes, received)
            try:
                sweeping.follow()
            finally:
                display.close_bar()
        return received[0] if received else None


class Sweeping:
    """A sweep that is going on."""

    def __init__(
        self, folder: Path, sweep: Sweep, display: Display, processes: int, received: list[int]
    ) -> None:
        self.folder, self.sweep, self.display = folder, sweep, display
        self.processes, self.received = processes, received
        self.passed_on = 0  # of the signals received, those that the runs have been sent
        self.estimated = False  # whether the time has been shown
        self.shown = 0.0  # when the bar was moved, by time.monotonic

    def follow(self) -> None:
        """Train every run as far as the plan says, rung by rung, unless a signal stops it."""
        sweep = self.sweep
        if sweep.budget is None:
            sweep.halvings = 0
        elif sweep.halvings is None:
            self.divide_budget()
        for rung, fraction in enumerate(fractions(sweep.halvings or 0)):
            if self.received:
                return
            if len(sweep.kept) == rung:
                sweep.kept.append(self.runs_of(rung))
                sweep.save(self.folder)
            self.work(sweep.kept[rung], fraction)

    # -- what is trained, and how far

    def divide_budget(self) -> None:
        """Measure a run, and choose the fewest halvings that fit the budget.

        The run is trained to the end of the shortest first rung, which is a part of every plan.
        """
        sweep = self.sweep
        settings = settings_of(self.folder, sweep)
        configurations = len(sweep.configurations([*settings]))
        most = most_halvings([*settings.values()], configurations)
        measured: dict[str, Speed] = {}
        for name in settings:
            self.work([name], fractions(most)[0])
            if self.received:
                return
            if measured := speeds(self.folder, sweep):
                break
        if not measured:  # no run can be opened, as the end will show
            sweep.halvings = 0
            return
        runs, own_speeds = [*settings.values()], [*measured.values()]
        assert sweep.budget is not None
        sweep.halvings, seconds = choose_halvings(
            runs, own_speeds, configurations, sweep.budget, self.processes
        )
        if sweep.halvings is None:
            few = most < math.ceil(math.log2(configurations))
            raise too_short(self.folder, sweep.budget, seconds, few_evaluations=few)
        self.show_plan(configurations, runs[0], seconds)

    def show_plan(self, configurations: int, settings: RunSettings, seconds: float) -> None:
        """Show the rungs, and the time that they will take."""
        halvings = self.sweep.halvings or 0
        numbers = zip(counts(configurations, halvings), fractions(halvings), strict=True)
        parts = [f"{number} to step {last_step(settings, part):,}" for number, part in numbers]
        self.display.say(
            f"Configurations: {', then '.join(parts)}; about {duration(seconds)} in all."
        )

    def runs_of(self, rung: int) -> list[str]:
        """Return the runs of a rung: all, or those of the better half of the rung before."""
        sweep, halvings = self.sweep, self.sweep.halvings or 0
        if rung == 0:
            return [*sweep.runs]
        assert sweep.budget is not None
        found = losses(self.folder, sweep, sweep.kept[-1], fractions(halvings)[rung - 1])
        settings = [*settings_of(self.folder, sweep).values()]
        measured = [*speeds(self.folder, sweep).values()]
        configurations = len(sweep.configurations([*sweep.runs]))
        left = sweep.budget * self.processes - sweep.spent
        most = affordable(settings, measured, configurations, halvings, rung, left)
        chosen = best_configurations(found, most)
        before = sweep.configurations(sweep.kept[-1])
        names = sorted(name for key in chosen for name in before[key])
        self.display.say(
            f"Going on: {len(chosen)} of {count(len(before), 'configuration')}, "
            f"runs {', '.join(names)}"
            if names
            else "No configuration goes on, as none has a validation loss."
        )
        return names

    # -- time

    def estimate(self, child: RunProcess) -> None:
        """When the first run has been measured, show how long all will take."""
        if self.estimated:
            return
        event = last_event(child.run, "started", "resumed")
        if event.get("time", 0.0) < child.started:
            return
        self.estimated = True
        if self.sweep.overhead is None:
            self.sweep.overhead = event["time"] - child.started
            self.sweep.save(self.folder)
        measured = speeds(self.folder, self.sweep)
        left = [name for name in self.sweep.runs if name not in self.sweep.done]
        if self.sweep.budget is None and measured:
            settings = settings_of(self.folder, self.sweep)
            runs, speed = [settings[name] for name in left], [measured[name] for name in left]
            seconds = seconds_of(runs, speed, [1.0]) / min(self.processes, len(left))
            self.display.say(f"{count(len(left), 'run')} will take about {duration(seconds)}.")

    def correct_overhead(self, child: RunProcess, seconds: float) -> None:
        """After the first run, count what its process took to save and end as well."""
        measured = speeds(self.folder, self.sweep).get(child.name)
        if measured is not None and not self.sweep.done:
            steps = read_toml(child.run / CONFIG_TOML).training.steps
            begun = last_event(child.run, "started", "resumed")["step"]
            rest = seconds - measured.whole * (recorded_steps(child.run) - begun) / steps
            self.sweep.overhead = max(measured.overhead, rest)

    # -- processes

    def work(self, names: Sequence[str], fraction: float) -> None:
        """Train runs to a fraction of their steps, several at a time, or until a signal."""
        waiting = deque(name for name in names if self.sweep.done.get(name, 0.0) < fraction)
        going: list[RunProcess] = []
        settings = settings_of(self.folder, self.sweep)
        goals = {name: last_step(settings[name], fraction) for name in names}
        if waiting:
            self.display.open_bar("sweep", sum(goals.values()))
        while waiting or going:
            while waiting and len(going) < self.processes:
                name = waiting.popleft()
                going.append(self.start(name, fraction, goals[name]))
            for child in [each for each in going if each.has_ended()]:
                going.remove(child)
                if child.process is None:  # how it ended is not known
                    waiting.appendleft(child.name)
                else:
                    self.conclude(child, child.process.returncode)
            if self.received:
                waiting.clear()
                going = [child for child in going if child.process is not None]
                self.stop(going)
            elif going:
                self.estimate(going[0])
            self.show(goals, going)
            time.sleep(PAUSE)

    def stop(self, going: Sequence[RunProcess]) -> None:
        """Send the processes the signals that were received since the last time."""
        if not self.passed_on:
            self.display.say("Stopping: the runs finish their steps and are saved.")
        for number in self.received[self.passed_on :]:
            self.passed_on += 1
            for child in going:
                child.send_signal(number)

    def start(self, name: str, fraction: float, until: int) -> RunProcess:
        """Start a run's process, or wait for the one that trains it."""
        run = self.folder / name
        if is_training(run):
            self.display.say(f"run {name} is being trained by an earlier process: waiting for it")
            return RunProcess(name, run, fraction, time.time(), None)
        values = "  ".join(f"{key} {value}" for key, value in self.sweep.runs[name].items())
        self.display.say(f"run {name} of {len(self.sweep.runs)}: {values}")
        words = ["train", "--resume", str(run), *self.flags(run)]
        words += ["--stop-after", str(until)] if fraction < 1 else []
        return RunProcess(name, run, fraction, time.time(), launch(words, run))

    def flags(self, run: Path) -> list[str]:
        """Return flags for where the data is now, and a share of the cores."""
        words = []
        if is_dataset(self.folder / "data"):
            words += ["--data", str(self.folder / "data")]
        threads = max(1, cores() // self.processes)
        recorded = read_toml(run / CONFIG_TOML).machine.threads
        if read_toml(self.folder / BASE).machine.threads is None:
            words += ["--threads", str(threads)] if threads != (recorded or cores()) else []
        return words

    def conclude(self, child: RunProcess, code: int) -> None:
        """Record what became of a run, and show it."""
        self.estimate(child)  # of a run that ended at once
        seconds = time.time() - child.started
        self.sweep.spent += seconds
        if code == 0:
            self.correct_overhead(child, seconds)
            self.sweep.done[child.name] = child.fraction
        elif code not in (128 + number for number in stopping_signals()):
            child.record_failure(code)
        self.sweep.save(self.folder)
        found = summarize(child.run)
        loss = f", validation loss {found.last_loss:.4f}" if found.last_loss and not code else ""
        self.display.say(f"run {child.name} {found.outcome}{loss}")

    def show(self, goals: Mapping[str, int], going: Sequence[RunProcess]) -> None:
        """Move the bar, on a terminal, once a second: the steps of all runs of a rung."""
        if self.display.bar is not None and time.monotonic() > self.shown + 1:
            steps = [min(goal, recorded_steps(self.folder / name)) for name, goal in goals.items()]
            self.display.move_bar(sum(steps), f"run {', '.join(each.name for each in going)}")
            self.shown = time.monotonic()


def too_short(
    folder: Path, budget: float, seconds: float, *, few_evaluations: bool
) -> SettingError:
    """Return the error for a budget that not even the cheapest plan fits."""
    less = "fewer values or steps" + (", or more evaluations" if few_evaluations else "")
    more = f"gptsmith sweep --resume {typed(folder)} --budget {math.ceil(1.1 * seconds)}s"
    return SettingError(
        "budget",
        f"is {duration(budget)}, but these runs need at least {duration(seconds)}: try "
        f"{less}, or go on with `{more}`",
    )
