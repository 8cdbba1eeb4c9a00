"""The table of tasks, and how the task of a run is opened.

A new task is a file, a row here, and a choice and a row in `config/finetune.py`.

Knows nothing of what a task does.
"""

from pathlib import Path

import torch

from ..checkpoint.finding import find_model
from ..checkpoint.folder import read_config
from ..config.settings import RunSettings
from ..data.encoded import Examples, is_examples, prepare_examples
from ..machine.environment import rank
from ..machine.files import DamagedError
from ..machine.processes import wait_for_processes
from ..machine.terminal import Display
from ..model.gpt import GPT
from ..tokenizers import Tokenizer, has_tokenizer, load_tokenizer, open_tokenizer
from ..training.task import Task
from ..training.text import TextTask, open_text
from .chat import ChatTask
from .classify import ClassifyTask
from .preference import PreferenceTask
from .task import ExampleTask
from .weights import choose_weights, load_to_learn

TASKS: dict[str, type[ExampleTask]] = {
    "chat": ChatTask,
    "classify": ClassifyTask,
    "preference": PreferenceTask,
}


def open_task(
    folder: Path, settings: RunSettings, checkpoint: Path | None, display: Display, moved: bool
) -> Task:
    """Open the task of a run by its settings, as an `OpenTask`."""
    if settings.finetune.task == "text":
        text = open_text(folder, settings, checkpoint, display, moved)
        parts = (text.settings, text.tokenizer, text.dataset, text.checkpoint, text.own_data)
        return FurtherText(*parts)
    assert settings.finetune.task is not None
    task = TASKS[settings.finetune.task]
    return task(folder, settings, open_examples(folder, settings, display), checkpoint)


class FurtherText(TextTask):
    """More text for a model, of which only a part may learn."""

    def make_model(self, device: torch.device) -> GPT:
        """Load the model and choose the weights that learn."""
        model = super().make_model(device)
        assert self.tokenizer is not None
        choose_weights(model, self.settings, self.tokenizer, self.checkpoint)
        return model

    def load(self, folder: Path, device: torch.device) -> GPT:
        """Load a model, or an adapter beside its base."""
        return load_to_learn(folder, self.settings, device)


def open_examples(folder: Path, settings: RunSettings, display: Display) -> Examples:
    """Open the examples of a run; rows are first made into tokens in the run's folder."""
    source, prepared = settings.data.data, folder / "data"
    if source is None:
        raise ValueError("no data is given: add --data with rows of examples")
    own = not is_examples(Path(source))  # of the run, in its folder
    if not own:
        prepared = Path(source)
    elif rank() == 0 and not is_examples(prepared):
        for progress in prepare_examples(
            [source],
            first_tokenizer(settings),
            prepared,
            settings.prepare,
            settings.finetune,
            context_length=first_context(settings),
            seed=settings.training.seed,
        ):
            display.preparing(progress.bytes_done, progress.bytes_total, progress.tokens)
        display.close_bar()
    wait_for_processes(for_hours=True)
    try:
        examples = Examples.open(prepared)
    except DamagedError as error:
        cure = f"remove {prepared}, and the examples are read again"
        raise DamagedError(f"{error}: {cure if own else 'make it again'}") from error
    if not own:
        check_examples(examples, settings)
    if examples.task != settings.finetune.example_kind:
        raise ValueError(
            f"{prepared} has examples for the task {examples.task}, not {settings.finetune.task}: "
            "leave out --task"
        )
    return examples


def check_examples(examples: Examples, settings: RunSettings) -> None:
    """Raise ValueError if examples that were prepared for another model do not suit this one."""
    made, context_length = examples.info["base"], first_context(settings)
    if made["fingerprint"] != first_tokenizer(settings).fingerprint:
        raise ValueError(
            f"{examples.folder} was made with another tokenizer than the model's: name the file "
            f"that it was made from, {examples.info['sources'][0]['path']}"
        )
    if (longest := examples.info["settings"]["context_length"]) > context_length:
        raise ValueError(
            f"{examples.folder} has rows of up to {longest} tokens, but the model a context of "
            f"{context_length}: name the file that it was made from, "
            f"{examples.info['sources'][0]['path']}"
        )


def first_tokenizer(settings: RunSettings) -> Tokenizer:
    """Return the tokenizer of the model to start from, or for fresh weights the one named."""
    start_from, kind = settings.training.start_from, settings.data.tokenizer
    if start_from is None:
        if kind == "char":
            raise ValueError(
                "--tokenizer char learns its characters from a text, not from examples: use byte"
            )
        return open_tokenizer(kind or "byte")
    read_config(Path(start_from))  # a folder that is no model is refused as one
    if not has_tokenizer(Path(start_from)):
        raise ValueError(f"{start_from} has no tokenizer.json, which examples need: add one")
    tokenizer = load_tokenizer(Path(start_from))
    if kind is not None and open_tokenizer(kind).fingerprint != tokenizer.fingerprint:
        raise ValueError(f"--tokenizer {kind} is not that of {start_from}: leave it out")
    return tokenizer


def first_context(settings: RunSettings) -> int:
    """Return the context_length of the model to start from, or of the one to make."""
    if settings.training.start_from is None:
        return settings.model.context_length
    return read_config(find_model(settings.training.start_from)).context_length
