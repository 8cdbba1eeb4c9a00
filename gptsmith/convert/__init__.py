"""Every GPT-2 weight in, every ecosystem out: `formats.py` has the table, one file for each."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .carry import export_model, import_model, read

__all__ = ["export_model", "import_model", "read"]


def __getattr__(name: str) -> Any:
    if name not in __all__:  # these import PyTorch, for which help does not wait
        raise AttributeError(f"gptsmith.convert has no '{name}'")
    return getattr(import_module(f"{__name__}.carry"), name)
