"""One run: train it, and evaluate, record, sample and save after the steps that are due.

A run is a folder. Knows nothing of how it is opened (`start.py`) or how a step works (`loop.py`).
"""

import math
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..checkpoint import saving
from ..checkpoint.finding import checkpoints
from ..config import cost
from ..config.settings import RunSettings
from ..generation.sampling import NotFiniteError
from ..machine.devices import peak_flops
from ..machine.environment import world_size
from ..machine.files import remove_folder, write_text
from ..machine.processes import LostProcessError, any_process
from ..machine.terminal import Display
from .advice import after_divergence, after_spike
from .loop import DivergedError, SpikeError, StepReport, Trainer, steps
from .memory import Sharding
from .optimizers import state_tensors
from .questions import Questions, question_figures, question_sums
from .records import Recorder, cut_samples, write_event, write_sample
from .rollback import Good, with_good
from .sharding import Gather, gather_for_first, in_step
from .stopping import StepGivenUpError, stop_signals
from .task import Task


@dataclass
class Run:
    """A run that is ready to train, and its progress."""

    folder: Path
    settings: RunSettings
    task: Task
    trainer: Trainer
    display: Display
    done: int  # steps
    tokens: int  # learned from in these steps
    seconds: float  # total training time, resumed runs included
    best_step: int | None
    best_loss: float | None
    saved: int  # step of the newest checkpoint; 0 if there is none
    owed: list[str]  # what a stop broke off at this step: "validation", "sample"
    sharding: Sharding = Sharding(False, "")
    good: Sequence[Good] = ()  # the checkpoints that a spike may take the run back to
    questions: Sequence[Questions] = ()  # whose accuracy an evaluation measures as well
    doing: str = ""  # what is done before a stop takes effect
    stop_after: int | None = None  # the last step for now; the schedule stays that of all steps
    recorder: Recorder | None = None  # None in all processes but rank 0
    signal: int | None = None  # number of the signal that stopped the run, if one did

    @property
    def ended_badly(self) -> bool:
        """Whether the last evaluation's loss is not finite, or that of one who learned nothing."""
        records = [] if self.recorder is None else self.recorder.records
        last = records[-1] if records else {}
        loss = last.get("validation_loss", 0.0)
        return loss is None or loss > self.task.worst_loss


def follow(run: Run) -> None:
    """Train to the last step, or until it is to stop; evaluate, record and save on the way."""
    run.display.open_bar("training", run.settings.training.steps, run.done)
    with stop_signals(run.trainer, run.display, lambda: run.doing) as received:
        try:
            if not make_up(run, received) and run.done < (run.stop_after or math.inf):
                for step in steps(run.trainer, run.done):
                    if after_step(run, step, received):
                        break
        except StepGivenUpError:
            save_if_behind(run)
        except LostProcessError:
            # The weights are those after the step before, but other processes' shards are lost.
            if run.trainer.computing_gradient and not run.trainer.sharded:
                save_if_behind(run)
            raise
        except SpikeError as error:
            run.signal = received[0] if received else None
            if run.settings.training.on_spike == "rollback":
                raise
            save_if_behind(run)
            raise DivergedError(f"{error}; {after_spike(run.folder, run.done)}") from error
        except DivergedError as error:
            records = [] if run.recorder is None else run.recorder.records
            advice = after_divergence(run.folder, run.settings, records)
            raise DivergedError(f"{error}; {advice}") from error
        finally:
            run.display.close_bar()
    run.signal = received[0] if received else None


def after_step(run: Run, step: StepReport, received: list[int]) -> bool:
    """Evaluate, record, sample and save, as is due; return whether the run is to stop."""
    report, total = run.settings.report, run.settings.training.steps
    run.done, run.seconds, run.owed = step.step, run.seconds + step.seconds, []
    run.tokens += step.tokens
    record = describe_step(run, step)
    if run.done % report.evaluate_every == 0 or run.done == total:
        record |= validate(run, received)  # all processes take part
    if run.recorder is not None:
        note_changes(run, step)
        run.recorder.add(record)
        run.display.step(record, total)
        if "validation_loss" in record or run.done == total:
            run.recorder.draw(always=run.done == total)
    if run.done % (report.sample_every or report.evaluate_every) == 0:
        sample(run, received)
    # A skipped step is not saved, so that the newest checkpoint is a good one.
    if worth_saving(run) and not step.skipped:
        if run.settings.training.on_spike == "rollback" and due_to_be_saved(run):
            run.good = with_good(run.good, Good(run.done, run.best_step))
        save_checkpoint(run)
    stopping = any_process(bool(received)) or run.done == run.stop_after
    if stopping:
        save_if_behind(run)
    run.doing = f"step {run.done + 1:,} is finished"
    return stopping


def make_up(run: Run, received: list[int]) -> bool:
    """Do what an earlier stop broke off at this step; return whether the run is to stop again."""
    owed, run.owed = run.owed, []
    found = validate(run, received) if "validation" in owed else {}
    if run.recorder is not None and found:
        run.recorder.complete_last(found)
        run.recorder.draw(always=run.done == run.settings.training.steps)
        point_to_newest(run)
    if "sample" in owed:
        if run.recorder is not None:
            cut_samples(run.folder, run.done - 1)  # it may have been written by now
        sample(run, received)
    run.doing = f"step {run.done + 1:,} is finished"
    return any_process(bool(received))


def worth_saving(run: Run) -> bool:
    """Whether this step is the last, the best, or due to be saved."""
    return due_to_be_saved(run) or run.done in (run.settings.training.steps, run.best_step)


def due_to_be_saved(run: Run) -> bool:
    """Whether a checkpoint of this step is due, however good the model is."""
    report = run.settings.report
    return run.done % (report.save_every or report.evaluate_every) == 0


# -- recording


def describe_step(run: Run, step: StepReport) -> dict[str, Any]:
    """Return the record of a step, without evaluation."""
    tokens_per_second = step.tokens / step.seconds
    peak = peak_flops(run.trainer.device)
    flops = cost.flops_per_token(run.settings.model, training=True) * tokens_per_second
    record = {
        "step": step.step,
        "loss": step.loss,
        "grad_norm": step.grad_norm,
        "learning_rate": step.learning_rate,
        "tokens": run.tokens,
        "seconds": round(run.seconds, 3),
        "tokens_per_second": round(tokens_per_second, 1),
        "mfu": None if peak is None else flops / (peak * world_size()),
    }
    if step.skipped:
        record["skipped"] = True
    return record


def validate(run: Run, received: list[int]) -> dict[str, Any]:
    """Evaluate on what is held out and on the questions, in the run's precision; note if this step
    is the best.

    Returns the fields to add to the step's record: none if there is nothing to evaluate on, or if a
    signal to stop broke the evaluation off.
    """
    if not (run.task.held_out or run.questions):
        return {}
    device, found = run.trainer.device, dict[str, Any]()
    run.doing = "the validation is broken off"
    with in_step(run.trainer.model, run.trainer.sharded):
        sums = unless_stopped(run.task.sums(run.trainer), received) if run.task.held_out else None
        asked = question_sums(run.questions, run.trainer, run.task.tokenizer)
        answers = unless_stopped(asked, received)
    if any_process(bool(received)):
        run.owed.append("validation")
        return {}
    run.doing = "this step is recorded"
    if sums is not None:
        found = run.task.figures(sums, device)
        if found["validation_loss"] < (math.inf if run.best_loss is None else run.best_loss):
            run.best_step, run.best_loss = run.done, found["validation_loss"]  # NaN is never best
    return found | question_figures(run.questions, answers, device)


def unless_stopped(parts: Generator[np.ndarray, None, None], received: list[int]) -> np.ndarray:
    """Return the sum of parts, (N,) each, up to a signal to stop."""
    sums: Any = 0.0
    with closing(parts):
        for part in parts:
            sums = sums + part
            if received:
                break
    return sums


def note_changes(run: Run, step: StepReport) -> None:
    """Report a skipped update, a spike, or a smaller micro-batch, on the terminal and in
    events.jsonl."""
    if step.spike is not None:
        done = "the update was skipped" if step.skipped else "see --on-spike"
        run.display.say(f"step {step.step:,}: {step.spike}; {done}")
        write_event(
            run.folder,
            "spike",
            step=step.step,
            batch=step.batch,
            loss=step.loss,
            grad_norm=step.grad_norm,
            skipped=step.skipped,
        )
    elif step.skipped:
        run.display.say(f"step {step.step:,}: the gradient is not finite; the update was skipped")
        write_event(run.folder, "skipped", step=step.step, loss=str(step.loss))
    machine, after = run.settings.machine, step.micro_batch
    if (before := machine.micro_batch) != after:  # a resumed run starts with the smaller one
        machine = replace(machine, micro_batch=after)
        run.settings = replace(run.settings, machine=machine)
        run.display.say(f"out of GPU memory: micro-batch reduced from {before} to {after} rows")
        write_event(run.folder, "micro_batch", step=step.step, before=before, after=after)


def sample(run: Run, received: list[int]) -> None:
    """Append what the task shows to samples.md, unless a signal to stop breaks it off.

    The first process writes; the others take part where the model is sharded.
    """
    text, run.doing = "", "the sample is broken off"
    with in_step(run.trainer.model, run.trainer.sharded):
        pieces = () if run.recorder is None else run.task.sample(run.trainer.model, run.done)
        try:
            for piece in pieces:
                text += piece
                if received:
                    run.owed.append("sample")
                    break
        except NotFiniteError as error:
            text += f"({error})"
    if text and "sample" not in run.owed:
        write_sample(run.folder, run.done, text)


# -- saving


def save_if_behind(run: Run) -> None:
    """Write a checkpoint unless the newest one is of this step."""
    if run.saved < run.done:
        save_checkpoint(run)


def save_checkpoint(run: Run) -> None:
    """Let the first process write a checkpoint, for which all gather what is sharded."""
    trainer = run.trainer
    tensors = state_tensors(trainer.model, trainer.optimizers)
    if trainer.sharded:
        of_all = [*trainer.model.parameters(), *tensors.values()]
        gather_for_first(of_all, lambda gather: write_checkpoint(run, tensors, gather))
    elif run.recorder is not None:
        write_checkpoint(run, tensors, Tensor.detach)
    run.saved = run.done


def write_checkpoint(run: Run, optimizer: Mapping[str, Tensor], gather: Gather) -> None:
    """Write a checkpoint, point `last` and `best` to theirs, and remove older ones.

    `optimizer` has tensors of any shapes; `gather` returns one of them, or a parameter, whole.
    """
    assert run.recorder is not None
    run.doing = "the checkpoint is written"
    run.recorder.flush()  # so no checkpoint is ahead of the records on disk
    target = checkpoint_of(run, run.done)
    if target.exists():  # it is damaged, since the run would have resumed from it
        shutil.rmtree(target)
    trainer = run.trainer
    state = {
        "format": "gptsmith-training",
        "version": 1,
        "step": run.done,
        "tokens": run.tokens,
        "seconds": run.seconds,
        # Each step derives its random numbers from these, so no generator's state is needed.
        "rng": {
            "seed": run.settings.training.seed,
            "step": run.done,
            "processes": world_size(),
            "dropout": trainer.dropout_from,
        },
        "best": {"step": run.best_step, "validation_loss": run.best_loss},
        "micro_batch": trainer.micro_batch,
        "scaler": trainer.scaler.state_dict(),
        "settings": asdict(run.settings),
        "data": run.task.identity,
        "owed": run.owed,
        "recent": {} if trainer.recent is None else trainer.recent.state(),
        "good": [asdict(good) for good in run.good],
    }
    saving.save_gathered(
        trainer.model,
        run.task.tokenizer,
        target,
        optimizer=optimizer,
        state=state,
        gather=gather,
    )
    point_to_newest(run)


def point_to_newest(run: Run) -> None:
    """Point `last` to this step's checkpoint and `best` to the best; remove those not kept."""
    run.saved = run.done
    newest = checkpoint_of(run, run.done)
    best = newest if run.best_step is None else checkpoint_of(run, run.best_step)
    write_text(run.folder / "last", f"{newest.name}\n")
    if best.is_dir():
        write_text(run.folder / "best", f"{best.name}\n")
    keep = run.settings.report.keep
    needed = {best} | {
        checkpoint_of(run, step)
        for good in run.good
        for step in (good.step, good.best)
        if step is not None
    }
    for old in [] if keep == "all" else checkpoints(run.folder)[keep:]:
        if old not in needed:
            remove_folder(old)


def checkpoint_of(run: Run, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run.folder / "checkpoints" / f"step-{step:08}"
