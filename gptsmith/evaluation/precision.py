"""Choose the precision for inference: on a CPU, the fastest that keeps the model's loss.

It is measured once per model, on text that the model generates, and cached on disk. Knows nothing
of how weights are packed.
"""

import hashlib
import json
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint import folder, saved
from ..config.settings import Dtype
from ..machine import devices, environment
from ..machine.dtypes import dtype_of_bits
from ..machine.files import MANIFEST, read_json, write_text
from .quantization import compare_with, decode_speed, divergence, first_token, logits_of, own_text

# Largest mean Kullback-Leibler divergence from the float32 model, in nats. It is what the precision
# adds to the loss, and readers of a loss do not look past the third decimal.
KEEPS_LOSS = 0.001
TOKENS = 256  # of generated text to measure on


class Choice(NamedTuple):
    """A precision, with its divergence from float32 and its speed."""

    dtype: Dtype
    mean_kl: float  # nats, float32 || this one
    times_as_fast: float  # decode speed of one row, relative to float32


def fastest(place: Path, device: torch.device) -> Choice:
    """Return the fastest precision in which a folder's model keeps its loss.

    On a GPU this is the device's fast precision, without measuring. A quantized model has only its
    own.
    """
    if bits := folder.read_bits(place):
        return Choice(dtype_of_bits(bits), 0.0, 1.0)
    if device.type != "cpu":
        return Choice(devices.find_dtype("auto", device), 0.0, 1.0)
    candidates = candidates_on_cpu(place, device)
    remembered = environment.cache_folder("dtype") / f"{key(place, candidates)}.json"
    with suppress(OSError, ValueError, TypeError):  # not measured yet, or the file is damaged
        return Choice(**json.loads(remembered.read_text(encoding="utf-8")))
    choice = measured(place, candidates)
    try:
        remembered.parent.mkdir(parents=True, exist_ok=True)
        write_text(remembered, json.dumps(choice._asdict()))
    except OSError as error:
        warnings.warn(f"the choice of {choice.dtype} could not be cached: {error}", stacklevel=2)
    return choice


def candidates_on_cpu(place: Path, device: torch.device) -> list[Dtype]:
    """Return the precisions that may be faster than float32, the fastest first.

    Packed weights need the compiled step, since PyTorch would unpack them in every forward pass.
    """
    config = folder.read_config(place)
    packable = config.n_embd % 8 == config.mlp_size % 8 == 0 and not config.modern
    packed: list[Dtype] = ["int4", "int8"] if packable and environment.compiler() else []
    fast = devices.find_dtype("auto", device)
    return packed if fast == "float32" else [*packed, fast]


def measured(place: Path, candidates: list[Dtype]) -> Choice:
    """Measure the candidates; return the fastest that keeps the loss, or float32.

    Speed depends on the model: where all weights fit the processor's cache, fewer bits gain
    nothing. One model is in memory at a time.
    """
    model, tokenizer = saved.load_folder(place)
    rows = own_text(model, TOKENS, first=first_token(tokenizer))
    kept = list(logits_of(model, rows))
    usual = decode_speed(model) or 1.0
    del model
    found = []
    for dtype in candidates:
        model, _ = saved.load_folder(place, **devices.loading(dtype, torch.device("cpu")))
        kl = divergence([*compare_with(kept, model, rows)]).mean_kl
        if kl < KEEPS_LOSS:
            found.append(Choice(dtype, kl, (decode_speed(model) or usual) / usual))
        del model
    return max([*found, Choice("float32", 0.0, 1.0)], key=lambda choice: choice.times_as_fast)


def key(place: Path, candidates: list[Dtype]) -> str:
    """Return a hexadecimal digest of what a choice depends on: the weights and the candidates.

    The manifest's checksums stand for the weights, or else their files' sizes and times.
    """
    names = {path.name for path in folder.weight_files(place)} | {folder.CONFIG}
    if (place / MANIFEST).is_file():
        sums = read_json(place / MANIFEST)["files"]
        known: list[Any] = [(name, sums.get(name)) for name in sorted(names)]
    else:
        stats = [(name, (place / name).stat()) for name in sorted(names)]
        known = [(place.resolve(), name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    depends = (known, candidates, KEEPS_LOSS, TOKENS)
    return hashlib.sha256(repr(depends).encode()).hexdigest()[:20]
