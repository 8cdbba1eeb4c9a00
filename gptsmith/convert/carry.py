"""Convert a model from one format to another, and verify that it is the same.

Uses the formats only through the functions listed in `formats.py`.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import building, opening
from ..checkpoint.adapter_json import is_adapter
from ..checkpoint.finding import best_of, find_model
from ..checkpoint.names import TIED
from ..checkpoint.tensors import Stored, first_tokens, with_all
from ..config.classifier import check_writes
from ..config.cost import weight_bytes
from ..config.model import PRESETS
from ..machine.files import file_written_whole, written_whole
from ..model.gpt import GPT
from ..tokenizers import (
    Tokenizer,
    Usage,
    gpt2_tokenizer,
    load_tokenizer,
    open_tokenizer,
    read_usage,
)
from .formats import WRITABLE, FormatPath, check_dtype, check_name, find_source, nearest
from .proof import ConversionReport, largest_difference, logits, rounding_of, some_tokens, told

MEMORY_TO_SPARE = 500 * 10**6  # bytes of the 1 GB that a conversion may take beyond the weights
PADDED_TO = (64, 128)  # vocabularies are padded to multiples of these for speed


# -- the public functions


def read(path: str | Path, *, format: str | None = None) -> tuple[GPT, Tokenizer | None]:
    """Read the model and tokenizer of a file or folder in any readable format.

    The model is in evaluation mode; the tokenizer is None if there is none.
    """
    source = find_source(Path(path), format)
    stored, _ = without_padding(stored_at(source), source.path)
    return building.build(stored), stored.tokenizer


def import_model(
    path: Path,
    out: Path,
    *,
    format: str | None = None,
    tokenizer: str | None = None,
    **choices: Any,
) -> ConversionReport:
    """Convert a model from any readable format to a new Hugging Face folder.

    `tokenizer` replaces the source's: "gpt2", "byte", a folder, a `meta.pkl`, or "none". `choices`
    are further arguments of `carry`.
    """
    source = find_source(path, format)
    stored, padding = without_padding(stored_at(source, tokenizer), path)
    check_writes(stored.config, path)
    target = FormatPath(out, "huggingface")
    return carry(stored, source, target, padding=padding, run_original=True, **choices)


def export_model(
    model: str | Path, out: Path, *, to: str, base: str | None = None, **choices: Any
) -> ConversionReport:
    """Convert a MODEL to a new file or folder of another format.

    `base` is that of an adapter, which is merged; `choices` are further arguments of `carry`.
    """
    target = FormatPath(out, check_name(to, WRITABLE, "written"))
    source = FormatPath(find_model(model), "huggingface")
    stored = opening.open_folder(source.path, base=base)
    check_writes(stored.config, source.path)
    if stored.bits is not None:
        warnings.warn(f"{model} is quantized to {stored.bits} bits: written unpacked", stacklevel=2)
        stored = replace(stored, bits=None)
    return carry(stored, source, target, **choices)


def merge_adapter(
    adapter: str | Path, out: Path, *, base: str | None = None, **choices: Any
) -> ConversionReport:
    """Write the whole model that a LoRA adapter makes of its base as a new Hugging Face folder.

    Its logits are compared with those of the base with the adapter beside its weights, as it was
    trained. `choices` are further arguments of `carry`. ValueError if it is no adapter.
    """
    source = FormatPath(find_model(adapter), "huggingface")
    if not is_adapter(source.path):
        raise ValueError(f"{source.path} is a whole model: an adapter is needed, to be merged")
    stored = opening.open_folder(source.path, base=base)

    @torch.inference_mode()
    def beside(tokens: Tensor) -> Tensor:
        return building.load_adapted(source.path, base=base)(tokens).logits

    return carry(stored, source, FormatPath(out, "huggingface"), before=beside, **choices)


# -- the model and its tokenizer


def stored_at(source: FormatPath, tokenizer: str | None = None) -> Stored:
    """Open a source, with the named tokenizer instead of its own.

    If there is neither, and the vocabulary has GPT-2's size, the tokenizer is GPT-2's.
    """
    stored = source.module.read(source.path)
    if TIED in stored.tensors.ignored.values() and not torch.equal(
        stored.fetch("lm_head.weight"), stored.fetch("wte.weight")
    ):
        raise ValueError(
            f"{source.path}: the head should be tied to the embedding, but differs from it"
        )
    named = stored.tokenizer
    if tokenizer is not None:
        named = named_tokenizer(tokenizer)
    elif named is None and stored.config.vocab_size in padded_sizes(PRESETS["gpt2"].vocab_size):
        named = gpt2_tokenizer()
    if named is not None and named.usage == Usage():
        named = Tokenizer(named.backend, stored.usage)
    return replace(stored, tokenizer=named, defaults=stored.usage)


def named_tokenizer(name: str) -> Tokenizer | None:
    """Return the tokenizer that a name means: none, gpt2, byte, a folder, or a `meta.pkl`."""
    return None if name == "none" else open_tokenizer(best_of(name))


def padded_sizes(vocab_size: int) -> set[int]:
    """Return a vocabulary's size, and the sizes that it may be padded to for speed."""
    return {vocab_size, *(-(-vocab_size // step) * step for step in PADDED_TO)}


def without_padding(stored: Stored, source: Path) -> tuple[Stored, int]:
    """Return the model without rows beyond its tokenizer's ids, and the number of these rows.

    ValueError if there are more than padding for speed explains, or too few rows.
    """
    config, tokenizer = stored.config, stored.tokenizer
    if tokenizer is None or tokenizer.vocab_size == config.vocab_size:
        return stored, 0
    V, rows = tokenizer.vocab_size, config.vocab_size
    if rows not in padded_sizes(V):
        raise ValueError(
            f"{source}: the tokenizer has {V:,} tokens, but the embedding {rows:,} rows: name the "
            "right tokenizer with --tokenizer, or none"
        )
    fetch = first_tokens(V, stored.fetch)
    return replace(stored, config=replace(config, vocab_size=V), fetch=fetch), rows - V


# -- the conversion


def carry(
    stored: Stored,
    source: FormatPath,
    target: FormatPath,
    *,
    dtype: str | None = None,
    approximate: bool = False,
    shard_bytes: int | None = None,
    padding: int = 0,
    run_original: bool = False,
    before: Callable[[Tensor], Tensor] | None = None,
) -> ConversionReport:
    """Write a stored model in the target's format, all or nothing, and compare the logits.

    ValueError if the format cannot express the model, unless `approximate`; and if an exact copy
    computes other logits than the model, or the model others than its original system. `padding` is
    the number of rows that were dropped from the vocabulary; `before` computes the logits to keep,
    (B, T) -> (B, T, V), if not the stored model does.
    """
    dtype = check_dtype(target, dtype, stored.dtype)
    near, lost = nearest(stored.config, target)
    if lost and not approximate:
        raise ValueError(
            f"{target.format.title}: cannot express {'; '.join(lost)}; "
            "--approximate writes the nearest model that it can"
        )
    if shard_bytes is not None and not target.format.ours:
        raise ValueError(f"{target.format.title}: cannot be written in shards: leave that out")
    fetch = with_all(stored.config, stored.fetch, near)
    options = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    with whole(target) as temporary:
        target.module.write(
            replace(stored, config=near, fetch=fetch, dtype=dtype), temporary, dtype, **options
        )
        tokens = some_tokens(stored.config)
        kept = logits(stored, tokens) if before is None else before(tokens)
        after, copy = read_back(FormatPath(temporary, target.name), stored, tokens)
        tokenizer = compare_tokenizers(stored.tokenizer, copy.tokenizer, target)
        untold = [words for words in told(stored) if words not in told(copy)]
        del copy  # Windows renames no file that is mapped
        difference = largest_difference(kept, after)
        exact = not lost and dtype in ("float32", stored.dtype)
        if not (difference <= rounding_of(kept) if exact else isfinite(difference)):
            raise ValueError(
                f"{target.path} was not written: its logits would differ by {difference:.2g}"
            )
        original = "" if not run_original else compare_original(source, stored, tokens, kept)
        size = bytes_in(temporary)
    return ConversionReport(
        source=str(source.path),
        source_format=source.format.title,
        target=str(target.path),
        target_format=target.format.title,
        dtype=dtype,
        bytes=size,
        config=stored.config,
        tensors=stored.tensors,
        lost=(*lost, *untold),
        padding=padding,
        tokenizer=tokenizer,
        difference=difference,
        original=original,
    )


def whole(target: FormatPath) -> AbstractContextManager[Path]:
    """Yield a temporary path for a new file or folder, which is renamed once it is complete."""
    if target.format.is_file:
        return file_written_whole(target.path)
    return written_whole(target.path, manifest=target.format.ours)


def read_back(written: FormatPath, stored: Stored, tokens: Tensor) -> tuple[Tensor, Stored]:
    """Return the logits of the written model, and the model.  (B, T) -> (B, T, V)

    Where the format cannot be read, it is the stored one, with what was written beside it.
    """
    path = written.path
    if written.format.readable:
        copy = written.module.read(path)
        return logits(copy, tokens), copy
    held = load_tokenizer(path) if (path / "tokenizer.json").is_file() else None
    copy = replace(stored, tokenizer=held, defaults=read_usage(path))
    return written.module.run(path, tokens), copy


def compare_tokenizers(ours: Tokenizer | None, held: Tokenizer | None, target: FormatPath) -> str:
    """Describe the tokenizer that was written; ValueError if it does something else than ours."""
    if ours is None:
        return "none"
    words = f"{ours.kind}, {ours.vocab_size:,} tokens"
    if held is None:
        return f"not written ({words}): the format has no place for it"
    if held.fingerprint != ours.fingerprint:
        raise ValueError(f"{target.format.title}: it would change the tokenizer ({words})")
    return words


def compare_original(source: FormatPath, stored: Stored, tokens: Tensor, ours: Tensor) -> str:
    """Describe how far our logits are from those of the source's own system.

    ValueError if rounding does not explain the difference. The system is not run if its float32
    weights would take far more memory than the source has bytes.  (B, T), (B, T, V)
    """
    runner = source.format.runner
    if not runner:
        return "not compared with the original, which takes its own code to run"
    if find_spec(runner) is None:
        return f"not compared with the original: {runner} is not installed"
    if weight_bytes(stored.config) > bytes_in(source.path) + MEMORY_TO_SPARE:
        return "not compared with the original, whose weights in float32 would take too much memory"
    theirs = source.module.run(source.path, tokens)[..., : ours.shape[-1]]
    difference = largest_difference(ours, theirs)
    if not difference <= rounding_of(theirs):
        raise ValueError(f"{source.path}: {runner}'s logits differ from ours by {difference:.2g}")
    return f"largest difference to the original, run by {runner}: {difference:.2g}"


def bytes_in(path: Path) -> int:
    """Return the size of a file, or of all files in a folder, in bytes."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
