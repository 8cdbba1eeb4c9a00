"""What lies in a model's folder: which files, whole or damaged, and which folder a name means.

Knows nothing of tensors: it reads JSON, sizes and SHA-256, so it needs no PyTorch.
"""

import json
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.cost import Shape
from ..config.fields import suggestion
from ..config.model import GPTConfig
from ..machine.files import MANIFEST, DamagedError, read_json, sha256
from .config_json import from_hugging_face
from .names import MASKS, PREFIX, Account, account, hugging_face
from .packing import bits_in, original_json
from .packing import check_tensors as check_packed

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TRAINING = "training"


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


def read_config_json(folder: Path) -> dict[str, Any]:
    """A folder's `config.json` as it is; FileNotFoundError where there is none."""
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: a folder with a GPT-2 model is needed")
    return read_json(folder / CONFIG)


def read_config(folder: Path) -> GPTConfig:
    """The model that a folder's `config.json` describes."""
    values = read_config_json(folder)
    try:
        return from_hugging_face(original_json(values))
    except ValueError as error:
        raise type(error)(f"{folder}: {error}") from error


def read_bits(folder: Path) -> int | None:
    """In how many bits a folder's matrices are packed; None where they are not."""
    values = read_config_json(folder)
    try:
        return bits_in(values)
    except ValueError as error:
        raise type(error)(f"{folder}: {error}") from error


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


def all_shapes(folder: Path) -> dict[str, Shape]:
    """Name and shape of every tensor of a folder, from its files' headers alone."""
    shapes = dict[str, Shape]()
    for path in weight_files(folder):
        shapes |= tensor_shapes(path)
    return shapes


def check_tensors(folder: Path, config: GPTConfig, shapes: Mapping[str, Shape]) -> Account:
    """What each tensor of a folder is; ValueError where they are not those of its config.json."""
    if (bits := read_bits(folder)) is not None:
        found = {
            name: (shapes[name], str(entry.get("dtype")))
            for path in weight_files(folder)
            for name, entry in header(path).items()
        }
        return check_packed(folder, config, bits, found)
    return account(
        hugging_face(config),
        config,
        {name.removeprefix(PREFIX): shape for name, shape in shapes.items()},
        place=folder,
        kind="NanoChat" if config.modern else "GPT-2",
        says=CONFIG,
        ignored=MASKS,
        zero_biases=not config.modern,
    )


def tensor_shapes(path: Path) -> dict[str, Shape]:
    """Name and shape of each tensor in a safetensors file, from its header alone."""
    return {name: tuple(entry["shape"]) for name, entry in header(path).items()}


def tensor_bytes(folder: Path) -> int:
    """What all tensors of a folder take."""
    entries = [entry for path in weight_files(folder) for entry in header(path).values()]
    return sum(end - start for start, end in (entry["data_offsets"] for entry in entries))


def header(path: Path) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of each tensor: "shape", "dtype" and "data_offsets"."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise DamagedError(f"{path} is cut short: {size:,} bytes do not even hold its header")
        try:
            entries = json.loads(file.read(length))
        except ValueError as error:
            raise DamagedError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(entries, dict):
        raise DamagedError(f"{path} is not a safetensors file: its header is no object")
    entries.pop("__metadata__", None)
    if not all(
        isinstance(e, dict) and {"shape", "data_offsets"} <= e.keys() for e in entries.values()
    ):
        raise DamagedError(f"{path} is not a safetensors file: its header lists no tensors")
    if size < 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0):
        raise DamagedError(
            f"{path} is cut short: {size:,} bytes are fewer than its header promises"
        )
    return entries


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
