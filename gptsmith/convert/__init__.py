"""Import GPT-2 weights from other formats and export to them; `formats.py` has the table."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .carry import export_model, import_model, read

__all__ = ["export_model", "import_model", "read"]


def __getattr__(name: str) -> Any:
    if name not in __all__:  # imported lazily, because `--help` should not wait for PyTorch
        raise AttributeError(f"gptsmith.convert has no '{name}'")
    return getattr(import_module(f"{__name__}.carry"), name)
