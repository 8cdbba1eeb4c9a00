"""The task of learning text: to predict every token from those before it.

Opens the data and the tokenizer, makes the model, evaluates it and lets it write. Knows nothing of
steps, records or checkpoints.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import building
from ..checkpoint.finding import best_of
from ..config import cost
from ..config.classifier import check_writes
from ..config.fields import SettingError
from ..config.settings import RunSettings
from ..data.batches import Batches
from ..data.prepare import prepare
from ..data.shards import Dataset, is_dataset
from ..evaluation.heldout import window_sums
from ..generation.writing import stream
from ..machine import devices
from ..machine.environment import rank, world_size
from ..machine.files import DamagedError
from ..machine.processes import wait_for_processes
from ..machine.terminal import Display, count
from ..model.gpt import GPT
from ..tokenizers import Tokenizer, has_tokenizer, load_tokenizer, open_tokenizer
from .checks import check_run
from .records import METRICS
from .task import CountedTargets, Evaluating, Objective, token_figures
from .trainer import batch_rows

VERIFIED_BYTES = 10**9  # of the data, read in one to three seconds


def open_text(
    folder: Path, settings: RunSettings, checkpoint: Path | None, display: Display, moved: bool
) -> "TextTask":
    """Open the text that a run learns, and its tokenizer."""
    tokenizer = wanted_tokenizer(settings, checkpoint)
    dataset = open_data(folder, settings, tokenizer, display, moved=moved)
    tokenizer = tokenizer or own_tokenizer(dataset.folder)
    return TextTask(settings, tokenizer, dataset, checkpoint, dataset.folder == folder / "data")


@dataclass
class TextTask:
    """One run's text."""

    settings: RunSettings
    tokenizer: Tokenizer | None
    dataset: Dataset
    checkpoint: Path | None  # to resume from
    own_data: bool  # the run prepared it, with its own settings
    objective: Objective = field(default_factory=CountedTargets)

    @property
    def folder(self) -> Path:
        """The folder of the data."""
        return self.dataset.folder

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this data from other data."""
        return self.dataset.identity

    @property
    def held_out(self) -> int:
        """The tokens that an evaluation reads."""
        validation, most = self.dataset.validation, self.settings.report.evaluate_tokens
        tokens = 0 if validation is None else len(validation)
        return tokens if most is None else min(tokens, most)

    @property
    def worst_loss(self) -> float:
        """The loss of a uniform guess, in nats per token."""
        model = self.settings.model
        return math.log(self.tokenizer.vocab_size if self.tokenizer else model.vocab_size)

    def damage(self) -> str:
        """Return what is wrong with a shard that was changed since it was written, or ""."""
        try:
            self.dataset.verify(sample_bytes=VERIFIED_BYTES)
        except DamagedError as error:
            return str(error)
        return ""

    def make_model(self, device: torch.device) -> GPT:
        """Load the checkpoint's model or the one to start from, or initialize a new one.

        ValueError where the data does not suit it.
        """
        settings, tokenizer = self.settings, self.tokenizer
        check_match(self.dataset, tokenizer, settings)
        source = self.checkpoint or settings.training.start_from
        if source is not None:
            model = self.load(Path(source), device)
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

    def load(self, folder: Path, device: torch.device) -> GPT:
        """Load a model to train."""
        return building.load_model(folder, device=device, dropout=self.settings.model.dropout)

    def batches(self, model: GPT) -> Batches:
        """Return windows of the training text."""
        return Batches(
            self.dataset.train,
            model.config.context_length,
            batch_rows(self.settings.training, model.config),
            seed=self.settings.training.seed,
            rank=rank(),
            world_size=world_size(),
        )

    def begin(self, trainer: Evaluating, display: Display) -> None:
        """Text needs nothing more."""

    def check(self, *, fresh: bool) -> None:
        """Raise ValueError for what would fail at an evaluation or a sample; warn of doubts."""
        dataset, prompt = self.dataset, self.settings.report.sample_prompt
        if dataset.validation is not None and len(dataset.validation) < 2:
            again = "" if self.own_data else "prepare the text again and "
            raise ValueError(
                f"the validation split has {count(len(dataset.validation), 'token')}, too few to "
                f"evaluate: {again}use --validation-fraction 0, or more text"
            )
        if self.tokenizer is not None and prompt is not None:
            self.tokenizer.encode(prompt)
        if fresh:
            check_run(self.settings, dataset, own_data=self.own_data)

    def plan(self, done: int) -> dict[str, str]:
        """Return the rows of the plan about the data and the steps."""
        training, held_out = self.settings.training, self.dataset.validation
        tokens, known = training.steps * training.batch_tokens, len(self.dataset.train)
        return {
            "data": f"{known:,} training tokens, "
            + ("none held out" if held_out is None else count(len(held_out), "validation token")),
            "steps": f"{training.steps:,} of {count(training.batch_tokens, 'token')}, "
            f"{tokens:,} in all: {tokens / known:.1f} epochs"
            + (f"; {count(done, 'step')} done" if done else ""),
        }

    def sums(self, trainer: Evaluating) -> Generator[np.ndarray, None, None]:
        """Evaluate on the validation split: nats, targets and bytes, (3,), of each batch."""
        assert self.dataset.validation is not None
        yield np.zeros(3)  # a process may have no window
        yield from window_sums(
            trainer.model,
            self.dataset.validation,
            tokenizer=self.tokenizer,
            first_tokens=self.settings.report.evaluate_tokens,
            precision=devices.autocast(trainer.device, trainer.dtype),
        )

    def figures(self, sums: np.ndarray, device: torch.device) -> dict[str, Any]:
        """Return the fields of an evaluation's record from the sums (3,)."""
        return token_figures(sums, self.tokenizer, device)

    def sample(self, model: GPT, step: int) -> Iterator[str]:
        """Yield the prompt of the samples and the text that the model continues it with."""
        report = self.settings.report
        if self.tokenizer is None or report.sample_tokens == 0:
            return
        text = report.sample_prompt or ""
        yield text
        yield from stream(model, self.tokenizer, text, max_tokens=report.sample_tokens, seed=step)


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
    wait_for_processes(for_hours=True)
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
