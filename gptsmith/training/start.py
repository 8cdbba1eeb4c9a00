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

from ..checkpoint import saved
from ..checkpoint.folder import best_of
from ..config import cost
from ..config.classifier import check_writes
from ..config.fields import SettingError
from ..config.recipe import to_toml
from ..config.settings import RunSettings
from ..data.prepare import prepare
from ..data.shards import Dataset, is_dataset
from ..machine import devices
from ..machine.environment import rank, world_size
from ..machine.files import write_text
from ..machine.processes import wait_for_processes
from ..machine.terminal import Display, count
from ..model.gpt import GPT
from ..tokenizers import Tokenizer, has_tokenizer, load_tokenizer, open_tokenizer
from .checks import check_memory, check_run
from .choices import Measured, choose_ways, possible, ways
from .optimizers import load_state_tensors
from .plan import compile_if_it_pays, show_plan, try_out
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
from .run import Run, point_to_newest
from .trainer import batch_rows, make_trainer


def open_run(folder: Path, display: Display, choices: Mapping[str, Any]) -> Run:
    """Open a run from its folder, and make every automatic choice."""
    checkpoint, state = newest_state(folder)
    settings, changes = resumed_settings(folder, checkpoint, state, choices)
    display.log_every = settings.report.log_every
    machine = devices.choose_to_learn(settings.machine)
    device = devices.prepare_machine(machine)
    tokenizer = wanted_tokenizer(settings, checkpoint)
    dataset = open_data(folder, settings, tokenizer, display, moved="data" in changes)
    check_same_data(folder, dataset, state, moved="data" in changes)
    tokenizer = tokenizer or own_tokenizer(dataset.folder)
    check_match(dataset, tokenizer, settings)
    model = make_model(settings, tokenizer, checkpoint, device)
    rows = batch_rows(settings.training, model.config)
    if checkpoint is not None and machine.fused == "auto":  # a run from before there was a choice
        machine = replace(machine, fused="no")
    machine = possible(machine, model.config, device)
    *_, smallest = ways(machine, model.config, rows, device).values()
    # A checkpoint does not have `init`, which says how the run's weights were first drawn.
    config = model.config if checkpoint is None else replace(model.config, init=settings.model.init)
    settings = replace(settings, model=config, machine=smallest)
    trainer = make_trainer(model, settings, dataset.train, rows, device)
    if checkpoint is not None and model.config.dropout:
        before = state.get("rng", {}).get("dropout", "processes")  # as older versions drew it
        if before != trainer.dropout_from:
            changes["dropout_drawn_by"] = trainer.dropout_from
    own_data = dataset.folder == folder / "data"
    check_evaluation_and_sampling(dataset, tokenizer, settings, own_data=own_data)
    if checkpoint is None:
        check_run(settings, dataset, own_data=own_data)
    check_memory(settings, device)
    left = settings.training.steps - state["step"]
    machine, measured = choose_ways(trainer, machine, left)
    trial = try_out(trainer, display)
    if machine.compile == "auto" and machine.fused == "no":
        trial = compile_if_it_pays(trainer, display, left, trial)
        if trial.choice is not None:
            measured.append(Measured("compile", trial.choice, settings.training.batch_tokens))
    if checkpoint is not None:
        load_state_tensors(model, trainer.optimizers, saved.load_training(checkpoint)[0])
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(state["scaler"])
    machine = replace(machine, compile=trainer.compiled, micro_batch=trainer.micro_batch)
    run = Run(
        folder=folder,
        settings=replace(settings, machine=machine),
        tokenizer=tokenizer,
        dataset=dataset,
        trainer=trainer,
        display=display,
        done=state["step"],
        seconds=state["seconds"],
        best_step=state["best"].get("step"),
        best_loss=state["best"].get("validation_loss"),
        saved=state["step"],
        owed=list(state["owed"]),
    )
    show_plan(run, trial, measured)
    if rank() == 0:
        open_records(run, changes, measured)
    wait_for_processes()
    return run


def open_data(
    folder: Path,
    settings: RunSettings,
    tokenizer: Tokenizer | None,
    display: Display,
    *,
    moved: bool,
) -> Dataset:
    """Open the data; text is first prepared into the run's folder.

    `moved` says that a resumed run is given another place of its data.
    """
    source, prepared = settings.data.data, folder / "data"
    if source is None:
        raise ValueError("no data is given: add --data with a source or a prepared folder")
    if is_dataset(Path(source)):
        return Dataset.open(Path(source))
    if moved and is_dataset(prepared):
        raise SettingError(
            "data",
            f"{source} contradicts the run, which has its own copy of its text in {prepared}: "
            "leave it out",
        )
    if rank() == 0 and not is_dataset(prepared):
        gone = Path(source).is_absolute() and not Path(source).exists()
        if gone and (folder / METRICS).exists():
            raise FileNotFoundError(
                f"the run's data is no longer at {source}: name its new place with --data"
            )
        kind = settings.data.tokenizer if tokenizer is None else tokenizer
        for progress in prepare([source], kind or "byte", prepared, options=settings.prepare):
            display.preparing(progress.bytes_done, progress.bytes_total, progress.tokens)
        display.close_bar()
    wait_for_processes()
    return Dataset.open(prepared)


def own_tokenizer(folder: Path | None) -> Tokenizer | None:
    """Return the tokenizer in a folder of data or of a model; None if there is none."""
    return load_tokenizer(folder) if folder is not None and has_tokenizer(folder) else None


def wanted_tokenizer(settings: RunSettings, checkpoint: Path | None) -> Tokenizer | None:
    """Return the tokenizer of the checkpoint to resume from, or that the settings or the model to
    fine-tune name; None if there is none."""
    if (resumed := own_tokenizer(checkpoint)) is not None:
        return resumed
    kind, start_from = settings.data.tokenizer, settings.training.start_from
    own = own_tokenizer(None if start_from is None else Path(start_from))
    if kind is None or (kind == "char" and (own is None or own.kind == "char")):
        return own
    tokenizer = open_tokenizer(best_of(kind))
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"--tokenizer {kind} is not that of {start_from}: leave it out to use the model's"
        )
    return own or tokenizer


def check_match(dataset: Dataset, tokenizer: Tokenizer | None, settings: RunSettings) -> None:
    """Raise ValueError if the data was made with another tokenizer, or has ids beyond it."""
    source, kind = settings.data.data, settings.data.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{source} does not name its tokenizer: add --tokenizer with gpt2, byte, or a "
            "folder with a tokenizer.json or nanoGPT's meta.pkl"
        )
    if dataset.fingerprint is None:
        dataset.check_ids(tokenizer.vocab_size)
    elif dataset.fingerprint != tokenizer.fingerprint or (kind == "char" != tokenizer.kind):
        made = dataset.info["tokenizer"]["kind"]
        raise ValueError(
            f"{source} was made with another tokenizer ({made}, {dataset.fingerprint[:12]}) than "
            f"{kind or tokenizer.kind}: prepare the text again, or name its --tokenizer"
        )


def make_model(
    settings: RunSettings,
    tokenizer: Tokenizer | None,
    checkpoint: Path | None,
    device: torch.device,
) -> GPT:
    """Load the checkpoint's model or the one to fine-tune, or initialize a new one."""
    source = checkpoint or settings.training.start_from
    if source is not None:
        model = saved.load_model(Path(source), device=device, dropout=settings.model.dropout)
        check_writes(model.config, source)
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the data's tokenizer has {tokenizer.vocab_size:,} tokens, "
                f"but the vocabulary of {source} has only {model.config.vocab_size:,}"
            )
        return model
    vocab_size = settings.model.vocab_size if tokenizer is None else tokenizer.vocab_size
    config = replace(settings.model, vocab_size=vocab_size)
    if cost.weight_bytes(config) > devices.available_memory(torch.device("cpu")):
        raise MemoryError
    torch.manual_seed(settings.training.seed)
    return GPT(config).to(device)


def check_evaluation_and_sampling(
    dataset: Dataset, tokenizer: Tokenizer | None, settings: RunSettings, *, own_data: bool
) -> None:
    """Raise ValueError now for what would fail only at the first evaluation or sample."""
    if dataset.validation is not None and len(dataset.validation) < 2:
        again = "" if own_data else "prepare the text again and "
        raise ValueError(
            f"the validation split has {count(len(dataset.validation), 'token')}, too few to "
            f"evaluate: {again}use --validation-fraction 0, or more text"
        )
    if tokenizer is not None and settings.report.sample_prompt is not None:
        tokenizer.encode(settings.report.sample_prompt)


def open_records(run: Run, changes: Mapping[str, str], measured: Sequence[Measured]) -> None:
    """Open the run's records, and drop those of steps after the one it resumes from."""
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
    details = {"changes": changes, "processes": world_size(), "measured": figures}
    write_event(folder, event, step=run.done, **details)
