"""From a run's folder to a run that is ready to step: fresh, resumed or fine-tuned.

A fresh run is a folder with a config.toml and nothing else, so all three are opened alike, and a
run that was killed before its first step resumes too. Every automatic choice is made here.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import folder as on_disk
from ..checkpoint import saved
from ..config import cost
from ..config.fields import SettingError
from ..config.model import GPTConfig
from ..config.recipe import read_toml, to_toml, with_overrides
from ..config.settings import MachineSettings, RunSettings, TrainingSettings
from ..data.batches import Batches, Tokens
from ..data.prepare import prepare
from ..data.shards import Dataset, is_dataset
from ..machine import devices
from ..machine.dtypes import number_bytes
from ..machine.environment import rank, world_size
from ..machine.files import DamagedError, write_text
from ..machine.processes import wait_for_processes
from ..machine.terminal import Display
from ..model.gpt import GPT
from ..tokenizers import Tokenizer, load_tokenizer, open_tokenizer
from .float8 import prepare_model
from .loop import Trainer
from .optimizers import load_state_tensors, make_optimizers
from .plan import compile_if_it_pays, show_plan, try_out
from .records import Recorder, Watchers, read_metrics
from .run import CONFIG, METRICS, SAMPLES, Run, point, write_event

CHANGEABLE = ("machine", "report")  # sections that may change in mid-run, as recorded events
CPU_MICRO_BATCH = 16_384  # tokens; more than fit the caches only slow a CPU down
MEMORY_SHARE = 0.8  # of what is free; the estimate is not exact, and others need some


# -- a run, ready to step


@dataclass(frozen=True)
class Position:
    """Where a run stands: a checkpoint and its state, or the beginning (None)."""

    checkpoint: Path | None
    state: Mapping[str, Any]

    @property
    def done(self) -> int:
        """Steps that are finished."""
        return int(self.state.get("step", 0))


def open_run(folder: Path, display: Display, changes: Mapping[str, Any]) -> Run:
    """Everything a run needs to step on, from its folder; every automatic choice is made here."""
    settings = changed(read_toml(folder / CONFIG), changes)
    display.log_every = settings.report.log_every
    machine = devices.choose_to_learn(settings.machine)
    device = devices.prepare_machine(machine)
    position = find_position(folder)
    dataset, tokenizer = open_data(folder, settings, display)
    model = open_model(settings, dataset, tokenizer, position, device)
    rows = batch_rows(settings.training, model.config)
    machine = with_micro_batch(machine, model.config, rows, device, position)
    settings = replace(settings, model=model.config, machine=machine)
    trainer = make_trainer(model, settings, dataset.train, rows, device)
    refuse_what_would_fail_later(dataset, tokenizer, settings)
    trial = try_out(trainer, display)
    if machine.compile == "auto":
        left = settings.training.steps - position.done
        trial = compile_if_it_pays(trainer, display, left, trial)
    if position.checkpoint is not None:
        tensors, _ = saved.load_training(position.checkpoint)
        load_state_tensors(model, trainer.optimizers, tensors)
        if trainer.scaler.is_enabled():
            trainer.scaler.load_state_dict(position.state["scaler"])
    machine = replace(machine, compile=trainer.compiled, micro_batch=trainer.micro_batch)
    settings = replace(settings, machine=machine)
    best = position.state.get("best", {})
    run = Run(
        folder=folder,
        settings=settings,
        tokenizer=tokenizer,
        dataset=dataset,
        trainer=trainer,
        display=display,
        recorder=None,
        watchers=None,
        done=position.done,
        seconds=float(position.state.get("seconds", 0.0)),
        best_step=best.get("step"),
        best_loss=best.get("validation_loss"),
        saved=position.done,
    )
    show_plan(run, trial)
    if rank() == 0:
        open_records(run, changes)
    wait_for_processes()
    return run


def changed(settings: RunSettings, changes: Mapping[str, Any]) -> RunSettings:
    """A run's settings with what may change on resume; ValueError where it would be another run."""
    new = with_overrides(settings, changes)
    for section in vars(settings):
        if section in CHANGEABLE:
            continue
        before, after = getattr(settings, section), getattr(new, section)
        for name in vars(before):
            if getattr(before, name) != getattr(after, name):
                raise SettingError(
                    name,
                    f"{getattr(after, name)} contradicts the run, which has "
                    f"{getattr(before, name)}: leave it out, or begin another run",
                )
    return new


def find_position(folder: Path) -> Position:
    """The newest whole checkpoint of a run, or its beginning where it has none.

    Newer damaged ones are passed over, and said; the run will write them again.
    """
    if not on_disk.checkpoints(folder):
        return Position(None, {})
    newest = on_disk.checkpoints(folder)[0].name
    path = on_disk.find_checkpoint(folder, newest, training=True)
    state = saved.load_training(path)[1]
    whole = isinstance(state.get("step"), int) and isinstance(state.get("micro_batch"), int)
    if not whole or not isinstance(state.get("best"), dict):
        raise DamagedError(f"{path / saved.STATE} lacks what a run needs: was it edited?")
    return Position(path, state)


def open_data(
    folder: Path, settings: RunSettings, display: Display
) -> tuple[Dataset, Tokenizer | None]:
    """The tokens to learn from, prepared into the run's folder where they are still text."""
    named, place = settings.data.data, folder / "data"
    if named is None:
        raise ValueError("no data was named: add --data with a source or a prepared folder")
    if Path(named).is_dir() and is_dataset(Path(named)):
        dataset, tokenizer = Dataset.open(Path(named)), wanted_tokenizer(settings)
        if tokenizer is None and (Path(named) / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(Path(named))
        check_match(dataset, tokenizer, settings)
        return dataset, tokenizer
    if rank() == 0 and not is_dataset(place):
        tokenizer = wanted_tokenizer(settings)
        kind = settings.data.tokenizer if tokenizer is None else tokenizer
        for progress in prepare([named], kind or "byte", place, options=settings.prepare):
            display.preparing(progress.bytes_done, progress.bytes_total, progress.tokens)
        display.close_bar()
    wait_for_processes()
    return Dataset.open(place), load_tokenizer(place)


def wanted_tokenizer(settings: RunSettings) -> Tokenizer | None:
    """The tokenizer that the settings call for: the model's own when fine-tuning; None if open."""
    named, start_from = settings.data.tokenizer, settings.training.start_from
    own = None
    if start_from is not None and (Path(start_from) / "tokenizer.json").is_file():
        own = load_tokenizer(Path(start_from))
    if named is None or (named == "char" and own is None):
        return own
    tokenizer = open_tokenizer(named)
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"--tokenizer {named} is not the one of {start_from}: leave it out to use the model's"
        )
    return tokenizer


def check_match(dataset: Dataset, tokenizer: Tokenizer | None, settings: RunSettings) -> None:
    """Refuse data that another tokenizer made; check the ids of data that does not say."""
    named, kind = settings.data.data, settings.data.tokenizer
    if tokenizer is None:
        raise ValueError(f"{named} does not say which tokenizer made it: add --tokenizer, as gpt2")
    if dataset.fingerprint is None:
        dataset.check_ids(tokenizer.vocab_size)
    elif dataset.fingerprint != tokenizer.fingerprint or (kind == "char" != tokenizer.kind):
        made = dataset.info["tokenizer"]["kind"]
        raise ValueError(
            f"{named} was made with another tokenizer, {made} of {dataset.fingerprint[:12]}, than "
            f"the {kind or tokenizer.kind} wanted: prepare the text again, or name its --tokenizer"
        )


def open_model(
    settings: RunSettings,
    dataset: Dataset,
    tokenizer: Tokenizer | None,
    position: Position,
    device: torch.device,
) -> GPT:
    """The model where the run stands: a checkpoint's, the one it starts from, or a fresh one."""
    source = position.checkpoint or settings.training.start_from
    if source is not None:
        model = saved.load_model(Path(source), device=device, dropout=settings.model.dropout)
        if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the data's tokenizer has {tokenizer.vocab_size:,} tokens, "
                f"but {source} knows only {model.config.vocab_size:,}"
            )
        return model
    vocab_size = settings.model.vocab_size if tokenizer is None else tokenizer.vocab_size
    config = replace(settings.model, vocab_size=vocab_size)
    if cost.weight_bytes(config) > devices.available_memory(torch.device("cpu")):
        raise MemoryError
    torch.manual_seed(settings.training.seed)
    return GPT(config).to(device)


def refuse_what_would_fail_later(
    dataset: Dataset, tokenizer: Tokenizer | None, settings: RunSettings
) -> None:
    """ValueError for what only the first evaluation or sample would stumble over."""
    if dataset.validation is not None and len(dataset.validation) < 2:
        raise ValueError(
            f"a text of {len(dataset.validation)} tokens cannot be evaluated: "
            "raise --validation-fraction, or set it to 0"
        )
    if tokenizer is not None and settings.report.sample_prompt is not None:
        tokenizer.encode(settings.report.sample_prompt)


def batch_rows(settings: TrainingSettings, config: GPTConfig) -> int:
    """Rows of the global batch: batch_tokens in windows of the context length."""
    T, tokens = config.context_length, settings.batch_tokens
    if tokens % T:
        near = max(1, round(tokens / T)) * T
        raise SettingError(
            "batch_tokens", f"{tokens:,} is not a multiple of context_length {T}: try {near}"
        )
    rows = tokens // T
    if rows < world_size():
        raise SettingError(
            "batch_tokens",
            f"{tokens:,} is {rows} rows of {T} tokens, fewer than the {world_size()} processes: "
            f"raise it to at least {world_size() * T}",
        )
    return rows


def with_micro_batch(
    machine: MachineSettings,
    config: GPTConfig,
    rows: int,
    device: torch.device,
    position: Position,
) -> MachineSettings:
    """The settings with a micro-batch: as set or recorded, else the largest that should fit."""
    mine = -(-rows // world_size())
    chosen = position.state.get("micro_batch") or machine.micro_batch
    if chosen is None:
        chosen = mine
        if device.type == "cpu":
            chosen = min(mine, max(1, CPU_MICRO_BATCH // config.context_length))
        room = MEMORY_SHARE * devices.available_memory(device)
        if device.type == "cpu":
            room /= world_size()
        each = number_bytes(machine.dtype)
        while chosen > 1 and cost.training_memory(config, chosen, dtype_bytes=each) > room:
            chosen = -(-chosen // 2)
    return replace(machine, micro_batch=min(chosen, mine))


def make_trainer(
    model: GPT, settings: RunSettings, tokens: Tokens, rows: int, device: torch.device
) -> Trainer:
    """What the loop works on: a model on its device, to learn from batches of `rows` windows."""
    machine = settings.machine
    assert machine.micro_batch is not None
    prepare_model(model, machine)
    batches = Batches(
        tokens,
        model.config.context_length,
        rows,
        seed=settings.training.seed,
        rank=rank(),
        world_size=world_size(),
    )
    return Trainer(
        model=model,
        optimizers=make_optimizers(model, settings.training),
        batches=batches,
        settings=settings.training,
        device=device,
        dtype=machine.dtype,
        micro_batch=machine.micro_batch,
        scaler=torch.amp.GradScaler(device.type, enabled=machine.dtype == "fp16"),
        compiled="no" if machine.compile == "auto" else machine.compile,
    )


def open_records(run: Run, changes: Mapping[str, Any]) -> None:
    """Open what is recorded, cut back to the step that the run goes on from."""
    folder, path = run.folder, run.path(METRICS)
    kept = [r for r in read_metrics(path) if r["step"] <= run.done] if path.exists() else []
    if path.exists():
        write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        cut_samples(run.path(SAMPLES), run.done)
    write_text(folder / CONFIG, to_toml(run.settings))
    if run.done:
        point(run, f"step-{run.done:08}")
    report = run.settings.report
    run.watchers = Watchers(
        folder, tensorboard=report.tensorboard, wandb=report.wandb, settings=asdict(run.settings)
    )
    run.recorder = Recorder(path, kept)
    event = "resumed" if run.done or kept else "started"
    changes = {name: str(value) for name, value in changes.items()}  # as they are typed
    write_event(folder, event, step=run.done, changes=changes, processes=world_size())


def cut_samples(path: Path, done: int) -> None:
    """Leave out of samples.md what was written after the step that the run goes on from."""
    if path.is_file():
        parts = re.split(r"(?m)^(?=## step \d+$)", path.read_text(encoding="utf-8"))
        heads = [re.match(r"## step (\d+)$", part, re.MULTILINE) for part in parts]
        kept = [p for p, head in zip(parts, heads, strict=True) if not head or int(head[1]) <= done]
        write_text(path, "".join(kept))
