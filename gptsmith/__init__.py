"""gptsmith: GPT-2, whole. From a folder of text to a trained model, and back to text.

Importing it imports nothing else: each name below is fetched from its module when first used, so
that a command that needs no PyTorch does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.saved import load, save
    from .config.model import PRESETS, GPTConfig
    from .config.settings import SamplingSettings
    from .generation.writing import complete, generate, generate_greedy, stream
    from .model.gpt import GPT
    from .tokenizers import Tokenizer

__version__ = "0.1.0"

_HOMES = {
    "GPT": "model.gpt",
    "GPTConfig": "config.model",
    "PRESETS": "config.model",
    "SamplingSettings": "config.settings",
    "Tokenizer": "tokenizers",
    "complete": "generation.writing",
    "generate": "generation.writing",
    "generate_greedy": "generation.writing",
    "load": "checkpoint.saved",
    "save": "checkpoint.saved",
    "stream": "generation.writing",
}

__all__ = [
    "GPT",
    "PRESETS",
    "GPTConfig",
    "SamplingSettings",
    "Tokenizer",
    "complete",
    "generate",
    "generate_greedy",
    "load",
    "save",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name == "convert":
        return import_module(f"{__name__}.convert")
    if name not in _HOMES:
        raise AttributeError(f"gptsmith has no '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
