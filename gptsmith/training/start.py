"""Open a run's folder, so that it is ready to train: new, resumed or fine-tuned.

A new run is a folder with only a config.toml, so all three are opened alike, and a run that was
killed before its first step can be resumed. Every automatic choice is made here, and recorded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.training_state import load_training
from ..config.classifier import without_labels
from ..config.finetune import ONLY_FOR
from ..config.recipe import to_toml
from ..config.settings import MachineSettings, RunSettings
from ..machine import devices
from ..machine.environment import rank, world_size
from ..machine.files import write_text
from ..machine.processes import wait_for_processes
from ..machine.terminal import Display
from .checks import check_memory
from .choices import Measured, choose_ways, possible, ways
from .loop import Trainer
from .memory import Sharding, all_learn, choose_recompute, choose_sharding, learned_in
from .optimizers import load_state_tensors
from .plan import compile_if_it_pays, run_seconds, show_plan, try_out
from .questions import open_questions
from .records import (
    CONFIG_TOML,
    METRICS,
    Recorder,
    Watchers,
    cut_samples,
    read_metrics,
    write_event,
)
from .resume import check_same_data, newest_state, resumed_settings
from .rollback import Good, read_rollbacks
from .run import Run, point_to_newest
from .spikes import Recent
from .task import OpenTask
from .text import open_text
from .trainer import make_trainer


def open_run(
    folder: Path, display: Display, choices: Mapping[str, Any], open_task: OpenTask = open_text
) -> Run:
    """Open a run from its folder, and make every automatic choice."""
    checkpoint, state = newest_state(folder)
    settings, changes = resumed_settings(folder, checkpoint, state, choices)
    display.log_every = settings.report.log_every
    machine = devices.choose_to_learn(settings.machine)
    device = devices.prepare_machine(machine)
    task = open_task(folder, settings, checkpoint, display, "data" in changes)
    check_same_data(folder, task, state, moved="data" in changes)
    model = task.make_model(loading_device(settings, device))
    batches = task.batches(model)
    if checkpoint is not None and machine.fused == "auto":  # a run from before there was a choice
        machine = replace(machine, fused="no")
    of_rows = replace(model.config, context_length=batches.row_tokens)
    given, frozen = choices if checkpoint else None, not all_learn(model)
    sharding = choose_sharding(settings.machine, of_rows, device, given, frozen=frozen)
    machine = possible(with_sharding(machine, sharding, changes), model.config, device)
    machine = choose_recompute(machine, of_rows, device, learned_in(model))
    *_, smallest = ways(machine, of_rows, batches.rows, device, learned_in(model)).values()
    # A checkpoint does not have `init`, which says how the run's weights were first drawn.
    config = without_labels(model.config)
    config = config if checkpoint is None else replace(config, init=settings.model.init)
    settings = replace(task.settings, model=config, machine=smallest)
    trainer = make_trainer(model, settings, batches, task.objective, device)
    trainer.rollbacks = read_rollbacks(folder)
    if (settings.finetune.task or "text") in ONLY_FOR["on_spike"]:
        trainer.recent = Recent(state.get("recent", {}))
    if checkpoint is not None and model.config.dropout:
        before = state.get("rng", {}).get("dropout", "processes")  # as older versions drew it
        if before != trainer.dropout_from:
            changes["dropout_drawn_by"] = trainer.dropout_from
    task.check(fresh=checkpoint is None)
    check_memory(settings, device)
    left = settings.training.steps - state["step"]
    machine, measured = choose_ways(trainer, machine, left)
    trial = try_out(trainer, display)
    if machine.compile == "auto" and machine.fused == "no":
        trial = compile_if_it_pays(trainer, display, left, trial)
        if trial.choice is not None:
            measured.append(Measured("compile", trial.choice, batches.rows * batches.row_tokens))
    task.begin(trainer, display)
    if checkpoint is not None:
        load_progress(trainer, checkpoint, state)
    machine = replace(machine, compile=trainer.compiled, micro_batch=trainer.micro_batch)
    # Whether to shard depends on the number of processes, so that it is chosen at each start.
    machine = replace(machine, shard=task.settings.machine.shard)
    run = Run(
        folder=folder,
        settings=replace(settings, machine=machine),
        task=task,
        trainer=trainer,
        display=display,
        done=state["step"],
        tokens=state.get("tokens", state["step"] * settings.training.batch_tokens),
        seconds=state["seconds"],
        best_step=state["best"].get("step"),
        best_loss=state["best"].get("validation_loss"),
        saved=state["step"],
        owed=list(state["owed"]),
        sharding=sharding,
        good=known_good(settings, state),
        questions=open_questions(settings.report.evaluate_tasks, model, task.tokenizer),
    )
    show_plan(run, trial, measured)
    if rank() == 0:
        open_records(run, changes, measured, run_seconds(run, trial))
    wait_for_processes()
    return run


def loading_device(settings: RunSettings, device: torch.device) -> torch.device:
    """Return where a model is loaded: if it may be sharded, not on a GPU, which it might fill."""
    whole = settings.machine.shard == "no" or settings.finetune.lora is not None
    return device if whole or world_size() == 1 else torch.device("cpu")


def load_progress(trainer: Trainer, checkpoint: Path, state: Mapping[str, Any]) -> None:
    """Load the state of the optimizers and of the gradient scaler."""
    load_state_tensors(trainer.model, trainer.optimizers, load_training(checkpoint)[0])
    if trainer.scaler.is_enabled():
        trainer.scaler.load_state_dict(state["scaler"])


def with_sharding(
    machine: MachineSettings, sharding: Sharding, changes: dict[str, str]
) -> MachineSettings:
    """Return the settings with `shard` decided, and without what a sharded model cannot go with.

    Adds to `changes` what other processes had chosen.
    """
    if not sharding.on:
        return replace(machine, shard="no")
    before = {"fused": machine.fused, "compile": machine.compile}
    changes |= {name: "no" for name, way in before.items() if way not in ("auto", "no")}
    return replace(machine, shard="yes", fused="no", compile="no")


def known_good(settings: RunSettings, state: Mapping[str, Any]) -> list[Good]:
    """Return the checkpoints that a spike may take a run back to, if it is to do so."""
    if settings.training.on_spike != "rollback":
        return []
    good = [Good(**each) for each in state.get("good", ())]
    if state["step"] and not good:  # a rollback was not asked for so far
        good = [Good(state["step"], state["best"].get("step"))]
    return good


def open_records(
    run: Run, changes: Mapping[str, str], measured: Sequence[Measured], seconds: float
) -> None:
    """Open the run's records, and drop those of steps after the one it resumes from.

    `seconds` is the estimate of what the rest of the run will take.
    """
    folder, path = run.folder, run.folder / METRICS
    kept = []
    if path.exists():
        kept = [record for record in read_metrics(path) if record["step"] <= run.done]
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        cut_samples(folder, run.done)
    write_text(folder / CONFIG_TOML, to_toml(run.settings))
    if run.done:
        point_to_newest(run)
    run.recorder = Recorder(folder, kept, Watchers(folder, run.settings))
    event = "resumed" if run.done or kept else "started"
    figures = {
        each.what: {
            "choice": each.choice.name,
            "tokens_per_second": each.speeds,
            "remembered": each.choice.remembered,
        }
        for each in measured
    }
    details = {
        "changes": changes,
        "processes": world_size(),
        "sharded": run.sharding.on,
        "measured": figures,
    }
    write_event(folder, event, step=run.done, **details, seconds_left=round(seconds, 3))
