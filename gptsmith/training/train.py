"""Train a model: start a run in a new folder, or resume one.

Both train the run that a folder describes. How a run is opened is in `start.py`, and what follows
each step in `run.py`.
"""

import re
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from traceback import clear_frames
from typing import Any

from filelock import FileLock, Timeout

from ..checkpoint.finding import find_model
from ..config.recipe import read_toml, run_settings, to_toml, with_overrides
from ..config.settings import RunSettings
from ..machine.devices import find_device
from ..machine.environment import launch, rank
from ..machine.files import write_text, written_whole
from ..machine.processes import (
    LostProcessError,
    any_process,
    from_first_process,
    joined_processes,
    wait_for_processes,
)
from ..machine.terminal import Display
from .advice import after_divergence, resume_command
from .loop import DivergedError, SpikeError
from .records import CONFIG_TOML, METRICS, write_event
from .resume import with_absolute_data, with_absolute_files
from .rollback import MOST_ROLLBACKS, carry_out, plan_rollback
from .run import Run, follow
from .start import open_run
from .task import OpenTask
from .text import open_text

LAUNCH = "launch.txt"  # in a run's folder: which `torchrun` has started the run, and its settings


def train(
    what: RunSettings | str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    show: bool = False,
    **choices: Any,
) -> Path:
    """Train a model as `gptsmith train` does; return the folder of the run.

    `what` is a RunSettings, or the command's first argument: a recipe, a .toml file, or the text to
    train on. Give single settings by name, as in `train("notes/", n_layer=2, steps=100)`. `out` is
    the new folder (default: runs/NAME-N). `resume` is the folder of a run to resume; the settings
    of its [machine] and [report] sections may be changed by name, as may `data` if the same data
    moved, and `steps` where the schedule allows it. Writes to the terminal only with `show`.

    ValueError or FileNotFoundError where the settings or the data cannot be used. On Ctrl-C,
    SIGTERM or SIGHUP the run is saved, and then the signal is raised again.
    """
    display = Display(quiet=not show or rank() != 0)
    if resume is None:
        settings, name = run_settings(what, choices)
        run = train_fresh(settings, out, name, display)
    elif what is None and out is None:
        run = continue_run(Path(resume), display, choices)
    else:
        raise ValueError("resume names the run and its settings: leave out `what` and `out`")
    return folder_unless_stopped(run)


def folder_unless_stopped(run: Run) -> Path:
    """Return the folder of a run; raise the signal that stopped it, if one did, again."""
    if run.signal is not None:
        signal.raise_signal(run.signal)
    return run.folder


def train_fresh(
    settings: RunSettings,
    out: str | Path | None,
    name: str,
    display: Display,
    open_task: OpenTask = open_text,
    stop_after: int | None = None,
) -> Run:
    """Start a run in a new folder, `out` or runs/NAME-N; it leaves none if it fails before its
    first record.

    When `torchrun` starts its processes again, the run that they had begun goes on. `stop_after` is
    a step after which the run is saved and left, to be resumed.
    """
    machine, made = settings.machine, list[Path]()  # what this process made: folder, parents
    try:
        with joined_processes(find_device(machine.device), machine.process_timeout):
            folder = Path(from_first_process(str(out or own_run_folder(name, settings))))
            if rank() == 0:
                new_parents = [parent for parent in folder.parents if not parent.exists()]
                if not was_begun(folder, settings):
                    make_folder(folder, settings)
                made = [folder, *new_parents]
            wait_for_processes()
            return train_folder(folder, display, {}, open_task, stop_after)
    except BaseException as error:  # all processes have left, so that none misses a file
        lost = LostProcessError in (type(error), type(error.__cause__))  # all may start again
        if made and not lost and not (made[0] / METRICS).exists():
            clear_frames(error.__traceback__)  # these hold memory maps, which Windows cannot remove
            shutil.rmtree(made[0], ignore_errors=True)
            with suppress(OSError):
                for parent in made[1:]:
                    parent.rmdir()
        raise


def make_folder(folder: Path, settings: RunSettings) -> None:
    """Make the folder of a new run, with its settings; ValueError if it exists."""
    if folder.exists():
        resumable = (folder / CONFIG_TOML).is_file()
        resume = f", or resume it with `{resume_command(folder)}`" if resumable else ""
        raise ValueError(f"{folder} already exists: give --out another name{resume}")
    text = to_toml(with_lasting_paths(settings))
    with written_whole(folder, manifest=False) as temporary:
        write_text(temporary / CONFIG_TOML, text)
        if launch() is not None:
            write_text(temporary / LAUNCH, f"# {launch()}\n{text}")


def was_begun(folder: Path, settings: RunSettings) -> bool:
    """Whether this launch of `torchrun` has begun this run, before it was started again."""
    path = folder / LAUNCH
    if not path.is_file():
        return False
    text = to_toml(with_lasting_paths(settings))
    return path.read_text(encoding="utf-8") == f"# {launch()}\n{text}"


def continue_run(
    folder: Path,
    display: Display,
    changes: Mapping[str, Any],
    open_task: OpenTask = open_text,
    stop_after: int | None = None,
) -> Run:
    """Resume a run from its newest intact checkpoint, or from the start if it has none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no run at {folder}")
    if not (folder / CONFIG_TOML).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_TOML}, so it is not the folder of a run")
    machine = with_overrides(read_toml(folder / CONFIG_TOML), changes).machine
    with joined_processes(find_device(machine.device), machine.process_timeout):
        return train_folder(folder, display, changes, open_task, stop_after)


def with_lasting_paths(settings: RunSettings) -> RunSettings:
    """Return settings that mean the same in any folder, and after other runs."""
    start_from = settings.training.start_from
    if start_from is not None:  # a checkpoint, since `best` may name another one on resume
        start_from = str(find_model(start_from).resolve())
    return replace(
        settings,
        training=replace(settings.training, start_from=start_from),
        data=with_absolute_data(settings.data),
        report=with_absolute_files(settings.report),
    )


def own_run_folder(name: str, settings: RunSettings) -> Path:
    """Return the `runs/NAME-N` that this launch of `torchrun` has begun, or else the next one."""
    begun = (path for path in Path("runs").glob(f"{name}-*") if was_begun(path, settings))
    return next(begun, None) or next_run_folder(name)


def next_run_folder(name: str) -> Path:
    """Return `runs/NAME-N` in the current folder, N one more than the largest in use."""
    taken = [
        int(match[1])
        for path in Path("runs").glob(f"{name}-*")
        if (match := re.fullmatch(rf"{re.escape(name)}-(\d+)", path.name))
    ]
    return Path("runs") / f"{name}-{max(taken, default=0) + 1}"


def train_folder(
    folder: Path,
    display: Display,
    changes: Mapping[str, Any],
    open_task: OpenTask,
    stop_after: int | None,
) -> Run:
    """Train a run from its current step to its last, or to `stop_after`.

    A rollback changes the run's folder, and then the run is resumed as after a stop.
    """
    with locked(folder):
        run = None
        while run is None:
            run = train_until_taken_back(folder, display, changes, open_task, stop_after)
            changes = {}  # they are in config.toml by now
        return run


def train_until_taken_back(
    folder: Path,
    display: Display,
    changes: Mapping[str, Any],
    open_task: OpenTask,
    stop_after: int | None,
) -> Run | None:
    """Open a run and train it; return None where a spike took its folder back to an earlier step,
    unless the run is to stop."""
    run = open_run(folder, display, changes, open_task)
    run.stop_after = stop_after
    try:
        with failure_recorded(run):
            try:
                follow(run)
                return run
            except SpikeError as spike:
                roll_back(run, spike)
            return run if any_process(run.signal is not None) else None
    finally:
        if run.recorder is not None:
            run.recorder.close()


def roll_back(run: Run, spike: SpikeError) -> None:
    """Take the folder back to a checkpoint from before a spike; DivergedError if that was done
    MOST_ROLLBACKS times in vain."""
    trainer = run.trainer
    rollback = plan_rollback(
        spike.step, run.good, trainer.rollbacks, run.settings.training.rollback_rate
    )
    if rollback is None:
        records = [] if run.recorder is None else run.recorder.records
        advice = after_divergence(run.folder, run.settings, records)
        raise DivergedError(
            f"{spike}; {MOST_ROLLBACKS} rollbacks to the same step have not helped; {advice}"
        )
    numbers = rollback.batches
    batches = f"{len(numbers)} batches ({numbers[0]:,} to {numbers[-1]:,})"
    run.display.say(f"{spike}; back to step {rollback.to:,}, and on without {batches}")
    if run.recorder is not None:
        details = {"to": rollback.to, "batches": numbers, "rate": rollback.rate}
        write_event(run.folder, "rollback", step=spike.step, reason=str(spike), **details)
        carry_out(run.folder, rollback, trainer.rollbacks)
    run.done = rollback.to
    wait_for_processes()


@contextmanager
def failure_recorded(run: Run) -> Iterator[None]:
    """Record an error that ends a run as its last event, so that it is not taken for stopped."""
    try:
        yield
    except Exception as error:
        if run.recorder is not None:
            reason = " ".join(str(error).split()) or type(error).__name__
            with suppress(OSError):  # a full disk, which may be the error
                write_event(run.folder, "failed", step=run.done, error=reason)
        raise


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the run against other processes; rank 0 holds the lock, which ends with its process."""
    if rank() != 0:
        yield
        return
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(
            f"{folder} is being trained by another process: wait, or stop it"
        ) from None
