"""What lies in a model's folder: which files, whole or damaged, and which folder a name means.

Knows nothing of tensors: it reads JSON, sizes and SHA-256, so it needs no PyTorch.
"""

import json
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..config.cost import Shape
from ..config.fields import suggestion
from ..config.model import GPTConfig
from ..machine.files import MANIFEST, DamagedError, read_json, sha256
from .config_json import bits_in, from_hugging_face, original_json
from .names import MASKS, PREFIX, TensorInfo, TensorMatch, hugging_face, match_tensors
from .packing import match_packed

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TRAINING = "training"


class ModelFolder(NamedTuple):
    """What a model's folder says of itself, once its parts are known to fit one another."""

    path: Path
    config: GPTConfig
    bits: int | None  # in which its matrices are packed; None where they are not
    tensors: dict[str, TensorInfo]  # by their names in the files
    match: TensorMatch

    @property
    def tensor_bytes(self) -> int:
        """What all tensors take."""
        return sum(tensor.bytes for tensor in self.tensors.values())


def verify(folder: Path, *, training: bool = True) -> None:
    """Raise DamagedError unless every file in the manifest is there, whole.

    A folder without a manifest (from elsewhere) passes. `training=False` leaves out `training/`.
    """
    if not (folder / MANIFEST).exists():
        return
    manifest = read_json(folder / MANIFEST)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise DamagedError(f"{folder / MANIFEST} lists no files: it was edited or cut short")
    for name, expected in files.items():
        path = folder / name
        if not isinstance(expected, dict) or not isinstance(expected.get("bytes"), int):
            raise DamagedError(f"{folder / MANIFEST} has no size of {name}: it was edited")
        if not training and name.startswith(f"{TRAINING}/"):
            continue
        if not path.is_file():
            raise DamagedError(f"{path} is missing, though the manifest lists it")
        if path.stat().st_size != expected["bytes"]:
            got, wanted = path.stat().st_size, expected["bytes"]
            raise DamagedError(f"{path} has {got:,} bytes, but was written with {wanted:,}")
        if sha256(path) != expected.get("sha256"):
            raise DamagedError(f"{path} was changed since it was written (its SHA-256 differs)")


def read_description(folder: Path) -> tuple[GPTConfig, int | None]:
    """The model of a folder's `config.json`, and in how many bits its matrices are packed."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: a folder with a GPT-2 model is needed")
    values = read_json(folder / CONFIG)
    try:
        return from_hugging_face(original_json(values)), bits_in(values)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def read_config(folder: Path) -> GPTConfig:
    """The model that a folder's `config.json` describes."""
    return read_description(folder)[0]


def read_bits(folder: Path) -> int | None:
    """In how many bits a folder's matrices are packed; None where they are not."""
    return read_description(folder)[1]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights: one, or the shards of an index."""
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
            f"{folder} has no {WEIGHTS}, only .bin files: `gptsmith import {folder} OUT` reads them"
        )
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}: a folder with a GPT-2 model is needed")


def read_folder(folder: Path) -> ModelFolder:
    """What a folder says of its model; ValueError where its tensors are not those of its config."""
    config, bits = read_description(folder)
    tensors = {n: t for path in weight_files(folder) for n, t in safetensors_header(path).items()}
    if bits is not None:
        match = match_packed(folder, config, bits, tensors)
    else:
        match = match_unpacked(folder, config, {name: t.shape for name, t in tensors.items()})
    return ModelFolder(folder, config, bits, tensors, match)


def match_unpacked(folder: Path, config: GPTConfig, shapes: Mapping[str, Shape]) -> TensorMatch:
    """What each tensor is to the Hugging Face class that a folder's config.json names."""
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


def safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """What a safetensors file says of its tensors; DamagedError unless it is that long.

    The library's `safe_open` would say it too, but imports NumPy for it, a third of the time that
    `gptsmith describe FOLDER` takes, and does not tell a file that is cut short from others.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise DamagedError(f"{path} is cut short: {size:,} bytes do not even hold its header")
        try:
            entries = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(entries, dict):
        raise DamagedError(f"{path} is not a safetensors file: its header is no object")
    entries.pop("__metadata__", None)
    tensors, end = dict[str, TensorInfo](), 8 + length
    try:
        for name, entry in entries.items():
            first, last = (8 + length + int(offset) for offset in entry["data_offsets"])
            shape = tuple(map(int, entry["shape"]))
            tensors[name] = TensorInfo(path, shape, str(entry["dtype"]), first, last - first)
            end = max(end, last)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} is not a safetensors file: its header is not valid") from error
    if size < end:
        raise DamagedError(
            f"{path} is cut short: {size:,} bytes are fewer than its header promises"
        )
    return tensors


# -- which folder a name means


def checkpoints(run: Path) -> list[Path]:
    """A run's checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def is_run(folder: Path) -> bool:
    """Whether a folder is a training run, rather than one model."""
    return (folder / "checkpoints").is_dir()


def pointed_to(run: Path, pointer: str) -> Path | None:
    """The checkpoint that a run's `best` or `last` names, or None where there is none yet."""
    path = run / pointer
    if not path.is_file():
        return None
    return run / "checkpoints" / path.read_text(encoding="utf-8").strip()


def find_checkpoint(run: Path, pointer: str, *, training: bool) -> Path:
    """The verified checkpoint that `pointer` names; where it is damaged, the newest good one.

    Falling back is said in a warning. FileNotFoundError where no checkpoint is whole.
    """
    first = pointed_to(run, pointer)
    candidates = [first] if first else []
    candidates += [path for path in checkpoints(run) if path != first]
    problems = []
    for path in candidates:
        try:
            verify(path, training=training)
            read_config(path)
        except (DamagedError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{problems[0]}; using {path} instead", stacklevel=2)
        return path
    why = f": {problems[0]}" if problems else ""
    raise FileNotFoundError(f"{run} has no whole checkpoint to use{why}")


def find_model(name: str | Path) -> Path:
    """The folder with the model that MODEL means: a run's best checkpoint, or the folder itself."""
    folder = Path(name)
    if not folder.exists():
        beside = folder.parent.glob("*") if folder.parent.is_dir() else []
        hint = suggestion(folder.name, [path.name for path in beside])
        raise FileNotFoundError(f"no model at {folder}{hint}")
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is a file: a run, a checkpoint or a Hugging Face folder is needed"
        )
    if is_run(folder):
        return find_checkpoint(folder, "best", training=False)
    verify(folder, training=False)
    return folder
