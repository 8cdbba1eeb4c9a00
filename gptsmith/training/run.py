"""One run: train it, and evaluate, record, sample and save after the steps that are due.

A run is a folder. Knows nothing of how it is opened (`start.py`) or how a step works (`loop.py`).
"""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint import folder as on_disk
from ..checkpoint import saved
from ..config import cost
from ..config.settings import RunSettings
from ..data.shards import Dataset
from ..evaluation.heldout import Evaluation, evaluate_tokens
from ..generation.sampling import NotFiniteError
from ..generation.writing import generate
from ..machine.devices import autocast, peak_flops
from ..machine.environment import rank, world_size
from ..machine.files import write_text
from ..machine.processes import any_process
from ..machine.terminal import Display
from ..tokenizers import Tokenizer
from .loop import DivergedError, StepReport, Trainer, steps
from .optimizers import state_tensors
from .records import Recorder, Watchers, draw_curves

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SAMPLES = "samples.md"
LOSS_PLOT = "loss.png"
STATE_VERSION = 1
PLOT_INTERVAL = 50  # times the time that a plot took, at least, from one to the next


@dataclass
class Run:
    """A run that is ready to train, and its progress."""

    folder: Path
    settings: RunSettings
    tokenizer: Tokenizer | None
    dataset: Dataset
    trainer: Trainer
    display: Display
    recorder: Recorder | None  # None in all processes but rank 0
    watchers: Watchers | None
    done: int  # steps
    seconds: float  # total training time, resumed runs included
    best_step: int | None
    best_loss: float | None
    saved: int  # step of the newest checkpoint; 0 if there is none
    plot_after: float = 0.0  # by time.monotonic; no plot is drawn before it

    def path(self, name: str) -> Path:
        """Return the path of a file in the run's folder."""
        return self.folder / name


@dataclass(frozen=True)
class Outcome:
    """How training ended: at the last step, or stopped by a signal."""

    folder: Path
    done: int
    steps: int
    best_step: int | None
    best_loss: float | None
    signal: int | None  # the number of the signal, if one asked to stop


def follow(run: Run) -> Outcome:
    """Train to the last step, or until a signal asks to stop; evaluate, record and save."""
    settings, main = run.settings, rank() == 0
    total, report = settings.training.steps, settings.report
    run.display.open_bar("training", total, run.done)
    with stop_signals() as received:
        try:
            for step in steps(run.trainer, run.done):
                run.done, run.seconds = step.step, run.seconds + step.seconds
                record = describe_step(run, step)
                stopping = any_process(bool(received))
                if due(step.step, report.evaluate_every) or step.step == total:
                    record |= describe_evaluation(run, validate(run))  # all processes take part
                note_best(run, record)
                if main:
                    note_changes(run, step)
                    write_record(run, record)
                    if due(step.step, report.sample_every or report.evaluate_every):
                        write_sample(run)
                    # A skipped step is not saved, so that the newest checkpoint is a good one.
                    if stopping or (worth_saving(run) and not step.skipped):
                        save(run)
                if stopping:
                    break
        except DivergedError as error:
            raise DivergedError(f"{error}; {advice(run)}") from error
        finally:
            run.display.close_bar()
    signal_number = received[0] if received else None
    return Outcome(run.folder, run.done, total, run.best_step, run.best_loss, signal_number)


def worth_saving(run: Run) -> bool:
    """Whether this step is the last, the best, or due to be saved."""
    report = run.settings.report
    every = report.save_every or report.evaluate_every
    return run.done in (run.settings.training.steps, run.best_step) or due(run.done, every)


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps happens after this one."""
    return step % every == 0


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list; a second Ctrl-C interrupts at once.

    The list stays empty outside the main thread, as Python delivers no signals to other threads.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        "tokens": step.step * step.tokens,
        "seconds": round(run.seconds, 3),
        "tokens_per_second": round(tokens_per_second, 1),
        "mfu": None if peak is None else flops / (peak * world_size()),
    }
    return record | ({"skipped": True} if step.skipped else {})


def validate(run: Run) -> Evaluation | None:
    """Evaluate on the validation split, in the run's precision; None if nothing is held out."""
    if run.dataset.validation is None:
        return None
    return evaluate_tokens(
        run.trainer.model,
        run.dataset.validation,
        tokenizer=run.tokenizer,
        first_tokens=run.settings.report.evaluate_tokens,
        precision=autocast(run.trainer.device, run.trainer.dtype),
    )


def describe_evaluation(run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
    """Return the fields that an evaluation adds to a record."""
    if evaluation is None:
        return {}
    return {
        "validation_loss": evaluation.loss,
        "validation_tokens": evaluation.tokens,
        "perplexity": evaluation.perplexity,
        "bits_per_byte": evaluation.bits_per_byte,
    }


def note_best(run: Run, record: dict[str, Any]) -> None:
    """Remember this step as the best if its validation loss is the lowest so far."""
    loss = record.get("validation_loss", math.nan)
    if loss < (math.inf if run.best_loss is None else run.best_loss):
        run.best_step, run.best_loss = run.done, loss


def note_changes(run: Run, step: StepReport) -> None:
    """Report a skipped update, or a smaller micro-batch, on the terminal and in events.jsonl."""
    if step.skipped:
        run.display.say(f"step {step.step:,}: the gradient is not finite; the update was skipped")
        write_event(run.folder, "skipped", step=step.step, loss=str(step.loss))
    if step.micro_batch != run.settings.machine.micro_batch:
        remember_micro_batch(run, step.micro_batch)


def remember_micro_batch(run: Run, micro_batch: int) -> None:
    """Keep the smaller micro-batch in the settings, so that a resumed run starts with it."""
    before = run.settings.machine.micro_batch
    machine = replace(run.settings.machine, micro_batch=micro_batch)
    run.settings = replace(run.settings, machine=machine)
    run.display.say(f"out of GPU memory: micro-batch reduced from {before} to {micro_batch} rows")
    write_event(run.folder, "micro_batch", step=run.done, before=before, after=micro_batch)


def write_event(folder: Path, event: str, **details: Any) -> None:
    """Append a line to events.jsonl, which has everything but the steps."""
    line = json.dumps({"event": event, "time": round(time.time(), 3), **details})
    with (folder / EVENTS).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_record(run: Run, record: dict[str, Any]) -> None:
    """Record and show a step; redraw the loss curves after an evaluation."""
    assert run.recorder is not None
    run.recorder.add(record)
    if run.watchers is not None:
        run.watchers.add(record)
    run.display.step(record, run.settings.training.steps)
    finished = run.done == run.settings.training.steps
    if finished or ("validation_loss" in record and time.monotonic() >= run.plot_after):
        started = time.monotonic()
        if any(record["loss"] is not None for record in run.recorder.records):
            draw_curves({run.folder.name: run.recorder.records}, run.path(LOSS_PLOT))
        run.plot_after = started + PLOT_INTERVAL * (time.monotonic() - started)


def write_sample(run: Run) -> None:
    """Append a sample of generated text to samples.md."""
    settings, model = run.settings.report, run.trainer.model
    if run.tokenizer is None or settings.sample_tokens == 0:
        return
    prompt = settings.sample_prompt or ""
    model.eval()
    try:
        tokens = settings.sample_tokens
        text = generate(model, run.tokenizer, prompt, max_tokens=tokens, seed=run.done)[0]
    except NotFiniteError as error:
        text = f"({error})"
    model.train()
    quoted = "\n".join(f"> {line}" for line in (prompt + text).splitlines())
    with run.path(SAMPLES).open("a", encoding="utf-8") as file:
        file.write(f"## step {run.done}\n\n{quoted}\n\n")


# -- saving


def save(run: Run) -> None:
    """Write a checkpoint, point `last` and `best` to theirs, and remove older ones."""
    assert run.recorder is not None
    run.recorder.flush()  # so no checkpoint is ahead of the records on disk
    name = checkpoint_name(run.done)
    target = run.folder / "checkpoints" / name
    if target.exists():  # it is damaged, since the run would have resumed from it
        shutil.rmtree(target)
    trainer = run.trainer
    state = {
        "format": "gptsmith-training",
        "version": STATE_VERSION,
        "step": run.done,
        "seconds": run.seconds,
        # Each step derives its random numbers from these, so no generator's state is needed.
        "rng": {"seed": run.settings.training.seed, "step": run.done, "processes": world_size()},
        "best": {"step": run.best_step, "validation_loss": run.best_loss},
        "micro_batch": trainer.micro_batch,
        "scaler": trainer.scaler.state_dict(),
        "settings": asdict(run.settings),
    }
    tensors = state_tensors(trainer.model, trainer.optimizers)
    saved.save(trainer.model, run.tokenizer, target, optimizer=tensors, state=state)
    point(run, name)


def point(run: Run, newest: str) -> None:
    """Write the names of the last and the best checkpoint, then remove those not kept."""
    run.saved = int(newest.removeprefix("step-"))
    best = newest if run.best_step is None else checkpoint_name(run.best_step)
    write_text(run.path("last"), f"{newest}\n")
    if (run.folder / "checkpoints" / best).is_dir():
        write_text(run.path("best"), f"{best}\n")
    for old in on_disk.checkpoints(run.folder)[run.settings.report.keep :]:
        if old.name != best:
            shutil.rmtree(old)


def checkpoint_name(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08}"


def advice(run: Run) -> str:
    """Return what to do after a run has diverged."""
    lower = run.settings.training.learning_rate / 3
    if not run.saved:
        return f"there is no checkpoint yet: start again with --learning-rate {lower:.2g}"
    good = run.folder / "checkpoints" / checkpoint_name(run.saved)
    return (
        f"the last good checkpoint is {good}: start a run from it with "
        f"--from {good} --learning-rate {lower:.2g}"
    )
