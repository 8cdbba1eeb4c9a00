"""Read the folder of a whole model, without its tensors.

Reads JSON and file headers only, so it needs no PyTorch. Knows nothing of adapters.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..config.cost import Shape
from ..config.model import GPTConfig
from ..machine.files import DamagedError, read_json
from ..machine.shell import typed
from .config_json import bits_in, from_hugging_face, original_json
from .header import safetensors_header
from .names import MASKS, PREFIX, TensorInfo, TensorMatch, hugging_face, match_tensors
from .packing import match_packed

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"


class ModelFolder(NamedTuple):
    """The description of a model's folder, whose tensors match its configuration."""

    path: Path
    config: GPTConfig
    bits: int | None  # of packed matrices; None if the model is not quantized
    tensors: dict[str, TensorInfo]  # by their names in the files
    match: TensorMatch

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors, in bytes."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def read_whole(folder: Path) -> ModelFolder:
    """Return a folder's description; ValueError if its tensors do not match its config.json."""
    config, bits = whole_description(folder)
    tensors = {n: t for path in weight_files(folder) for n, t in safetensors_header(path).items()}
    if bits is not None:
        match = match_packed(folder, config, bits, tensors)
    else:
        match = match_unpacked(folder, config, {name: t.shape for name, t in tensors.items()})
    return ModelFolder(folder, config, bits, tensors, match)


def whole_description(folder: Path) -> tuple[GPTConfig, int | None]:
    """Return the configuration in a folder's `config.json`, and the bits of packed matrices."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: a folder with a GPT-2 model is needed")
    values = read_json(folder / CONFIG)
    try:
        return from_hugging_face(original_json(values)), bits_in(values)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files with a model's weights: one, or the shards of an index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS_INDEX).is_file():
        index = read_json(folder / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()):
            raise DamagedError(f"{folder / WEIGHTS_INDEX} has no weight_map of names to files")
        names = set(index.values())
        paths = [folder / name for name in sorted(names)]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though {WEIGHTS_INDEX} lists it")
        return paths
    if any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS}, only .bin files: "
            f"`gptsmith import {typed(folder)} OUT` reads them"
        )
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}: a folder with a GPT-2 model is needed")


def match_unpacked(folder: Path, config: GPTConfig, shapes: Mapping[str, Shape]) -> TensorMatch:
    """Match a folder's tensors with those of its Hugging Face class."""
    return match_tensors(
        hugging_face(config),
        config,
        {name.removeprefix(PREFIX): shape for name, shape in shapes.items()},
        source=folder,
        kind="NanoChat" if config.modern else "GPT-2",
        says=CONFIG,
        ignored=MASKS,
        zero_biases=not config.modern,
    )
