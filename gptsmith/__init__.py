"""gptsmith: GPT-2, whole. From a folder of text to a trained model, and back to text.

Importing it imports nothing else: each name below is fetched from its module when first used, so
that a command that needs no PyTorch does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.described import describe
    from .checkpoint.loading import load
    from .checkpoint.saving import save
    from .config.model import PRESETS, GPTConfig
    from .config.settings import (
        DataSettings,
        MachineSettings,
        PrepareSettings,
        ReportSettings,
        RunSettings,
        SamplingSettings,
        TrainingSettings,
    )
    from .evaluation.heldout import evaluate
    from .generation.writing import complete, generate, generate_greedy, stream
    from .model.gpt import GPT
    from .tokenizers import Tokenizer
    from .training.train import train

__version__ = "0.1.0"

# The module of each name.
_HOMES = {
    "GPT": "model.gpt",
    "PRESETS": "config.model",
    "DataSettings": "config.settings",
    "FinetuneSettings": "config.finetune",
    "GPTConfig": "config.model",
    "MachineSettings": "config.settings",
    "PrepareSettings": "config.settings",
    "ReportSettings": "config.settings",
    "RunSettings": "config.settings",
    "SamplingSettings": "config.settings",
    "Tokenizer": "tokenizers",
    "TrainingSettings": "config.settings",
    "complete": "generation.writing",
    "describe": "checkpoint.described",
    "evaluate": "evaluation.heldout",
    "finetune": "finetuning.finetune",
    "generate": "generation.writing",
    "generate_greedy": "generation.writing",
    "load": "checkpoint.loading",
    "save": "checkpoint.saving",
    "stream": "generation.writing",
    "train": "training.train",
}

__all__ = [
    "GPT",
    "PRESETS",
    "DataSettings",
    "FinetuneSettings",
    "GPTConfig",
    "MachineSettings",
    "PrepareSettings",
    "ReportSettings",
    "RunSettings",
    "SamplingSettings",
    "Tokenizer",
    "TrainingSettings",
    "complete",
    "describe",
    "evaluate",
    "finetune",
    "generate",
    "generate_greedy",
    "load",
    "save",
    "stream",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "convert":
        return import_module(f"{__name__}.convert")
    if name not in _HOMES:
        raise AttributeError(f"gptsmith has no '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
