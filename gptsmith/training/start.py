"""Open a run's folder, so that it is ready to train: new, resumed or fine-tuned.

A new run is a folder with only a config.toml, so all three are opened alike, and a run that was
killed before its first step can be resumed. Every automatic choice is made here.
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

CHANGEABLE = ("machine", "report")  # sections that may change on resume; events.jsonl records it
CPU_MICRO_BATCH = 16_384  # tokens; larger ones exceed the CPU's caches and are slower
MEMORY_SHARE = 0.8  # of the free memory; the estimate is inexact, and others need some


@dataclass(frozen=True)
class Position:
    """The checkpoint that a run goes on from, and its state; None and {} at the start."""

    checkpoint: Path | None
    state: Mapping[str, Any]

    @property
    def done(self) -> int:
        """Number of steps done."""
        return int(self.state.get("step", 0))


def open_run(folder: Path, display: Display, changes: Mapping[str, Any]) -> Run:
    """Open a run from its folder, and make every automatic choice."""
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
    check_evaluation_and_sampling(dataset, tokenizer, settings)
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
    """Return a run's settings with the changes; ValueError for those not allowed on resume."""
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
                    f"{getattr(before, name)}: leave it out, or start another run",
                )
    return new


def find_position(folder: Path) -> Position:
    """Find the newest intact checkpoint of a run, or its start where there is none.

    A warning names newer ones that are damaged; the run will write them again.
    """
    if not on_disk.checkpoints(folder):
        return Position(None, {})
    newest = on_disk.checkpoints(folder)[0].name
    path = on_disk.find_checkpoint(folder, newest, training=True)
    state = saved.load_training(path)[1]
    complete = isinstance(state.get("step"), int) and isinstance(state.get("micro_batch"), int)
    if not complete or not isinstance(state.get("best"), dict):
        raise DamagedError(f"{path / saved.STATE} lacks the state of a run: was it edited?")
    return Position(path, state)


def open_data(
    folder: Path, settings: RunSettings, display: Display
) -> tuple[Dataset, Tokenizer | None]:
    """Open the data and its tokenizer; text is first prepared into the run's folder."""
    source, prepared = settings.data.data, folder / "data"
    if source is None:
        raise ValueError("no data is given: add --data with a source or a prepared folder")
    if Path(source).is_dir() and is_dataset(Path(source)):
        dataset, tokenizer = Dataset.open(Path(source)), wanted_tokenizer(settings)
        if tokenizer is None and (Path(source) / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(Path(source))
        check_match(dataset, tokenizer, settings)
        return dataset, tokenizer
    if rank() == 0 and not is_dataset(prepared):
        tokenizer = wanted_tokenizer(settings)
        kind = settings.data.tokenizer if tokenizer is None else tokenizer
        for progress in prepare([source], kind or "byte", prepared, options=settings.prepare):
            display.preparing(progress.bytes_done, progress.bytes_total, progress.tokens)
        display.close_bar()
    wait_for_processes()
    return Dataset.open(prepared), load_tokenizer(prepared)


def wanted_tokenizer(settings: RunSettings) -> Tokenizer | None:
    """Return the tokenizer that the settings or the model to fine-tune name; None if neither."""
    kind, start_from = settings.data.tokenizer, settings.training.start_from
    own = None
    if start_from is not None and (Path(start_from) / "tokenizer.json").is_file():
        own = load_tokenizer(Path(start_from))
    if kind is None or (kind == "char" and own is None):
        return own
    tokenizer = open_tokenizer(kind)
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"--tokenizer {kind} is not that of {start_from}: leave it out to use the model's"
        )
    return tokenizer


def check_match(dataset: Dataset, tokenizer: Tokenizer | None, settings: RunSettings) -> None:
    """Raise ValueError if the data was made with another tokenizer, or has ids beyond it."""
    source, kind = settings.data.data, settings.data.tokenizer
    if tokenizer is None:
        raise ValueError(f"{source} does not name its tokenizer: add --tokenizer, as gpt2")
    if dataset.fingerprint is None:
        dataset.check_ids(tokenizer.vocab_size)
    elif dataset.fingerprint != tokenizer.fingerprint or (kind == "char" != tokenizer.kind):
        made = dataset.info["tokenizer"]["kind"]
        raise ValueError(
            f"{source} was made with another tokenizer ({made}, {dataset.fingerprint[:12]}) than "
            f"{kind or tokenizer.kind}: prepare the text again, or name its --tokenizer"
        )


def open_model(
    settings: RunSettings,
    dataset: Dataset,
    tokenizer: Tokenizer | None,
    position: Position,
    device: torch.device,
) -> GPT:
    """Load the checkpoint's model or the one to fine-tune, or initialize a new one."""
    source = position.checkpoint or settings.training.start_from
    if source is not None:
        model = saved.load_model(Path(source), device=device, dropout=settings.model.dropout)
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
    dataset: Dataset, tokenizer: Tokenizer | None, settings: RunSettings
) -> None:
    """Raise ValueError now for what would fail only at the first evaluation or sample."""
    if dataset.validation is not None and len(dataset.validation) < 2:
        raise ValueError(
            f"the validation split has {len(dataset.validation)} tokens, too few to evaluate: "
            "raise --validation-fraction, or set it to 0"
        )
    if tokenizer is not None and settings.report.sample_prompt is not None:
        tokenizer.encode(settings.report.sample_prompt)


def batch_rows(settings: TrainingSettings, config: GPTConfig) -> int:
    """Return the rows of the global batch; ValueError where they are not whole or too few."""
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
    """Return the settings with a micro-batch: as set or saved, else the largest that should fit."""
    own_rows = -(-rows // world_size())
    chosen = position.state.get("micro_batch") or machine.micro_batch
    if chosen is None:
        chosen = own_rows
        if device.type == "cpu":
            chosen = min(own_rows, max(1, CPU_MICRO_BATCH // config.context_length))
        room = MEMORY_SHARE * devices.available_memory(device)
        if device.type == "cpu":
            room /= world_size()
        width = number_bytes(machine.dtype)
        while chosen > 1 and cost.training_memory(config, chosen, dtype_bytes=width) > room:
            chosen = -(-chosen // 2)
    return replace(machine, micro_batch=min(chosen, own_rows))


def make_trainer(
    model: GPT, settings: RunSettings, tokens: Tokens, rows: int, device: torch.device
) -> Trainer:
    """Return what the loop trains: a model on its device, with batches of `rows` windows."""
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
    """Open the run's records, and drop those of steps after the one it resumes from."""
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
    changes = {name: str(value) for name, value in changes.items()}
    write_event(folder, event, step=run.done, changes=changes, processes=world_size())


def cut_samples(path: Path, done: int) -> None:
    """Drop the samples of steps after the one that the run resumes from."""
    if path.is_file():
        samples = re.split(r"(?m)^(?=## step \d+$)", path.read_text(encoding="utf-8"))
        heads = [re.match(r"## step (\d+)$", sample, re.MULTILINE) for sample in samples]
        pairs = zip(samples, heads, strict=True)
        kept = [sample for sample, head in pairs if not head or int(head[1]) <= done]
        write_text(path, "".join(kept))
