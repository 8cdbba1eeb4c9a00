"""Choose the precision for inference: on a CPU, the fastest that keeps the model's loss.

How far a precision moves the predictions is measured once per model, on text that it generates; how
fast it is, once per shape of a model. Both are remembered on disk. Knows nothing of how weights are
packed.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint import building, folder, opening, whole
from ..config import cost
from ..config.settings import Dtype
from ..machine import chooser, devices, environment
from ..machine.dtypes import dtype_of_bits
from ..machine.files import MANIFEST, read_json
from ..model.gpt import GPT
from .quantization import (
    TIMED_TOKENS,
    compare_with,
    decode_speed,
    divergence,
    first_token,
    logits_of,
    own_text,
)

# Largest mean Kullback-Leibler divergence from the float32 model, in nats. It is what the precision
# adds to the loss, and readers of a loss do not look past the third decimal.
KEEPS_LOSS = 0.001
TOKENS = 256  # of generated text to measure on
SECONDS = 2.0  # of decoding, to compare speeds


class Choice(NamedTuple):
    """A precision, with its divergence from float32 and its speed."""

    dtype: Dtype
    mean_kl: float  # nats, float32 || this one
    times_as_fast: float  # decode speed of one row, relative to float32


def fastest(place: Path, device: torch.device) -> Choice:
    """Return the fastest precision in which a folder's model keeps its loss.

    On a GPU this is the device's fast precision, without measuring. A quantized model has only its
    own. Divergences are remembered for the model's weights, and speeds for its shape.
    """
    if bits := folder.read_bits(place):
        return Choice(dtype_of_bits(bits), 0.0, 1.0)
    if device.type != "cpu":
        return Choice(devices.find_dtype("auto", device), 0.0, 1.0)
    candidates, models = candidates_on_cpu(place, device), Models(place)
    about = key(place, candidates)
    figures = chooser.recall("divergence", about)
    if figures.keys() != {*candidates}:
        figures = divergences(models, candidates)
        with suppress(OSError):  # `once` warns of it
            chooser.remember("divergence", about, figures)
    config = replace(folder.read_config(place), init="gpt2", dropout=0.0)
    names = kept(figures)
    choice = chooser.once("decoding", asdict(config), names, lambda: timed(models, names))
    return described(choice, figures)


def candidates_on_cpu(place: Path, device: torch.device) -> list[Dtype]:
    """Return the precisions that may be faster than float32.

    Packed weights need the compiled step, since PyTorch would unpack them in every forward pass.
    """
    config = folder.read_config(place)
    packable = config.n_embd % 8 == config.mlp_size % 8 == 0 and not config.modern
    packed: list[Dtype] = ["int4", "int8"] if packable and environment.compiler() else []
    return [*packed, *(dtype for dtype in devices.precisions(device) if dtype != "float32")]


def measured(place: Path, candidates: Sequence[Dtype]) -> Choice:
    """Measure the candidates; return the fastest that keeps the loss, or float32.

    Speed depends on the model: where all weights fit the processor's cache, fewer bits gain
    nothing.
    """
    models = Models(place)
    figures = divergences(models, candidates)
    return described(timed(models, kept(figures)), figures)


class Models:
    """A folder's model in every precision, in memory together only if there is ample room."""

    def __init__(self, place: Path) -> None:
        self.place, self.opened = place, dict[Dtype, GPT]()
        everything = 2 * cost.weight_bytes(folder.read_config(place))  # float32, bf16, int8, int4
        self.room = everything < devices.available_memory(torch.device("cpu")) / 4

    def open(self, dtype: Dtype) -> GPT:
        """Return the model in this precision."""
        if dtype not in self.opened:
            if not self.room:
                self.opened.clear()
            how: Any = {}
            if dtype != "float32":
                how = devices.loading(dtype, torch.device("cpu"))
            self.opened[dtype] = building.load_folder(self.place, **how)[0]
        return self.opened[dtype]


def divergences(models: Models, candidates: Sequence[Dtype]) -> dict[str, float]:
    """Return the mean divergence from float32 of each candidate, in nats."""
    first = first_token(opening.open_folder(models.place).tokenizer)
    rows = own_text(models.open("float32"), TOKENS, first=first)
    logits = list(logits_of(models.open("float32"), rows))
    return {
        # At least the smallest number that is not 0: figures on disk are positive.
        dtype: max(
            divergence([*compare_with(logits, models.open(dtype), rows)]).mean_kl,
            sys.float_info.min,
        )
        for dtype in candidates
    }


def kept(figures: dict[str, float]) -> list[str]:
    """Return float32 and, of the others, those that keep the loss; those with more bits first."""
    return ["float32", *(dtype for dtype in reversed(figures) if figures[dtype] < KEEPS_LOSS)]


def timed(models: Models, names: Sequence[str]) -> chooser.Choice:
    """Time the decoding of one row in these precisions."""

    def measure(dtype: Any) -> float:
        speed = decode_speed(models.open(dtype))
        return 1.0 if speed is None else TIMED_TOKENS / speed  # None: the context is too short

    # Without room, each turn would load the model again.
    return chooser.choose(names, measure, budget=SECONDS if models.room else 0.0)


def described(choice: chooser.Choice, figures: Mapping[str, float]) -> Choice:
    """Return a choice with its divergence, and its speed relative to float32."""
    dtype: Any = choice.name
    if dtype == "float32":
        return Choice("float32", 0.0, 1.0)
    seconds = choice.seconds
    return Choice(dtype, figures[dtype], seconds["float32"] / seconds[dtype])


def key(place: Path, candidates: Sequence[Dtype]) -> str:
    """Return a hexadecimal digest of what a divergence depends on: the weights and the candidates.

    The manifest's checksums stand for the weights, or else their files' sizes and times.
    """
    names = {path.name for path in whole.weight_files(place)} | {whole.CONFIG}
    if (place / MANIFEST).is_file():
        sums = read_json(place / MANIFEST)["files"]
        known: list[Any] = [(name, sums.get(name)) for name in sorted(names)]
    else:
        stats = [(name, (place / name).stat()) for name in sorted(names)]
        known = [(place.resolve(), name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    depends = (known, candidates, KEEPS_LOSS, TOKENS)
    return hashlib.sha256(repr(depends).encode()).hexdigest()[:20]
