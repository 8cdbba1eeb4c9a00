"""Every GPT-2 weight in, every ecosystem out: `formats.py` has the table, one file for each."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint import saved
from ..checkpoint.folder import find_model
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from .carry import carry, stored_at, without_padding
from .formats import WRITABLE, Place, check_name, find_source
from .report import Report


def read(path: str | Path, *, format: str | None = None) -> tuple[GPT, Tokenizer | None]:
    """The model and tokenizer of a file or folder in any readable format, in evaluation mode."""
    source = find_source(Path(path), format)
    stored, _ = without_padding(stored_at(source), source.path)
    return saved.build(stored), stored.tokenizer


def import_model(
    path: Path,
    out: Path,
    *,
    format: str | None = None,
    tokenizer: str | None = None,
    **choices: Any,
) -> Report:
    """Carry a model from any readable format to a new folder of our own; `carry` has the choices.

    `tokenizer` replaces the source's: "gpt2", "byte", a folder, a `meta.pkl`, or "none".
    """
    source = find_source(path, format)
    stored, padding = without_padding(stored_at(source, tokenizer), path)
    target = Place(out, "huggingface")
    return carry(stored, source, target, padding=padding, run_original=True, **choices)


def export_model(model: str | Path, out: Path, *, to: str, **choices: Any) -> Report:
    """Carry a MODEL to a new file or folder of another format; `carry` has the choices."""
    target = Place(out, check_name(to, WRITABLE, "written"))
    source = Place(find_model(model), "huggingface")
    stored = saved.open_folder(source.path)
    if stored.packed is not None:
        warnings.warn(f"{model} is quantized to {stored.bits} bits: written unpacked", stacklevel=2)
        stored = replace(stored, packed=None)
    return carry(stored, source, target, **choices)
