"""Which weights of a model learn: all, the last blocks, or adapters beside frozen ones.

Knows nothing of tasks.
"""

from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint import building, opening
from ..checkpoint.adapter_json import is_adapter
from ..config.fields import SettingError
from ..config.lora import lora_settings
from ..config.settings import RunSettings
from ..machine.shell import typed
from ..model.gpt import GPT
from ..model.lora import add_lora
from ..tokenizers import Tokenizer


def load_to_learn(folder: Path, settings: RunSettings, device: torch.device) -> GPT:
    """Load a model or a checkpoint to go on learning; an adapter stays beside its base."""
    load = building.load_adapted if is_adapter(folder) else building.load_model
    return load(folder, device=device, dropout=settings.model.dropout)


def choose_weights(
    model: GPT, settings: RunSettings, tokenizer: Tokenizer, checkpoint: Path | None
) -> None:
    """Let only those weights of a model learn that the settings say.

    With adapters, the rows of tokens that the base lacks learn too. A checkpoint has its adapters.
    """
    finetune, start_from = settings.finetune, settings.training.start_from
    if finetune.freeze is not None:
        if finetune.lora is not None:
            raise ValueError("--lora freezes the whole model: leave --freeze out")
        if model.lora is not None:
            problem = "cannot go with an adapter, whose base is frozen: leave it out"
            raise SettingError("freeze", problem)
        freeze_all_but(model, int(finetune.freeze.rpartition("-")[2]))
    if finetune.lora is None or checkpoint is not None:
        return
    if start_from is None:
        raise ValueError("--lora adapts a model that has learned: name one in place of fresh")
    if model.lora is not None:
        if replace(model.lora, tokens=()) == lora_settings(finetune, model.lora.base):
            return  # it learns further
        raise ValueError(
            f"{start_from} is an adapter, which cannot have another: `gptsmith merge "
            f"{typed(start_from)} OUT` makes it a whole model; without --lora, it learns further"
        )
    before = opening.open_folder(Path(start_from)).tokenizer
    known = tokenizer.vocab_size if before is None else before.vocab_size
    lora = lora_settings(finetune, str(Path(start_from).resolve()))
    added = tuple(range(known, tokenizer.vocab_size))
    add_lora(model, replace(lora, tokens=added), seed=settings.training.seed)


def freeze_all_but(model: GPT, last: int) -> None:
    """Let only the last blocks, the final norm and the head of a model learn.

    A head that is the embedding learns with it, as both are the same weights.
    """
    if last > len(model.h):
        raise ValueError(f"--freeze all-but-last-{last}: the model has only {len(model.h)} blocks")
    model.requires_grad_(False)
    for part in (*model.h[len(model.h) - last :], model.ln_f, model.lm_head):
        part.requires_grad_(True)
