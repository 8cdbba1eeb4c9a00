"""Read and verify a model's folder without its tensors, and find the folder that MODEL names.

Reads JSON, file headers, sizes and SHA-256 only, so it needs no PyTorch.
"""

import json
import struct
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from ..config.classifier import ClassifierConfig
from ..config.cost import Shape
from ..config.fields import suggestion
from ..config.model import GPTConfig
from ..machine.files import MANIFEST, DamagedError, read_json, sha256
from .adapter_json import (
    ADAPTER_WEIGHTS,
    OWN,
    SCORE,
    has_labels,
    is_adapter,
    read_adapter_config,
    read_own,
)
from .config_json import bits_in, from_hugging_face, original_json
from .names import MASKS, PREFIX, TensorInfo, TensorMatch, hugging_face, match_tensors
from .packing import match_packed

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TRAINING = "training"


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


def verify(folder: Path, *, training: bool = True) -> None:
    """Raise DamagedError if a file in the manifest is missing, or changed unless it is text.

    Text that was changed or added is used, as other tools write it, with a warning that names it.
    A folder without a manifest (from another tool) passes. `training=False` skips `training/`.
    """
    if not (folder / MANIFEST).exists():
        return
    files = read_json(folder / MANIFEST).get("files")
    if not isinstance(files, dict):
        raise DamagedError(f"{folder / MANIFEST} lists no files: it was edited or cut short")
    changed = [
        path.relative_to(folder).as_posix()
        for pattern in ("*.json", "*.jinja", "*/*.jinja")
        for path in folder.glob(pattern)
        if path.name != MANIFEST and path.relative_to(folder).as_posix() not in files
    ]
    for name, expected in files.items():
        path = folder / name
        if not isinstance(expected, dict) or not isinstance(expected.get("bytes"), int):
            raise DamagedError(f"{folder / MANIFEST} has no size of {name}: it was edited")
        if not training and name.startswith(f"{TRAINING}/"):
            continue
        if not path.is_file():
            raise DamagedError(f"{path} is missing, though the manifest lists it")
        got, wanted = path.stat().st_size, expected["bytes"]
        if got == wanted and sha256(path) == expected.get("sha256"):
            continue
        if is_text(name):
            changed.append(name)
        elif got != wanted:
            raise DamagedError(f"{path} has {got:,} bytes, but was written with {wanted:,}")
        else:
            raise DamagedError(f"{path} was changed since it was written (its SHA-256 differs)")
    if changed:
        check_text(folder, changed)
        warnings.warn(
            f"{folder} was edited since it was written: {', '.join(sorted(changed))}; used as it "
            "is now",
            stacklevel=2,
        )


def is_text(name: str) -> bool:
    """Return whether a file neither holds nor describes tensors or the state of training."""
    in_training = name.startswith(f"{TRAINING}/")
    return Path(name).suffix in (".json", ".jinja") and name != WEIGHTS_INDEX and not in_training


def check_text(folder: Path, changed: Iterable[str]) -> None:
    """Raise DamagedError if changed JSON is not valid, or config.json not that of the tensors."""
    for name in changed:
        if name.endswith(".json"):
            read_json(folder / name)
    if CONFIG in changed:
        try:
            read_folder(folder)
        except ValueError as error:
            raise DamagedError(str(error)) from error


def read_description(folder: Path, base: str | Path | None = None) -> tuple[GPTConfig, int | None]:
    """Return the configuration in a folder's `config.json`, and the bits of packed matrices.

    Those of an adapter are of the model that it makes of its base, which is never packed.
    """
    if is_adapter(folder):
        return adapted_config(folder, read_config(find_base(folder, base))), None
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: a folder with a GPT-2 model is needed")
    values = read_json(folder / CONFIG)
    try:
        return from_hugging_face(original_json(values)), bits_in(values)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def adapted_config(folder: Path, base: GPTConfig) -> GPTConfig:
    """Return the configuration of a base with an adapter: with rows for the tokens that it adds.

    With a head of labels it is a classifier's, whose labels PEFT does not name.
    """
    own, tokens = read_own(folder), read_adapter_config(folder).tokens
    V, labels, pad = own.get("vocab_size", 0), own.get("labels"), own.get("pad_token_id")
    if type(V) is not int or not (labels is None or isinstance(labels, list)):
        raise ValueError(
            f"{folder / OWN} has vocab_size {V!r} and labels {labels!r}: it was edited"
        )
    config = replace(base, vocab_size=max(base.vocab_size, V, *(id + 1 for id in tokens)))
    if labels is None and not isinstance(base, ClassifierConfig) and has_labels(folder):
        score = safetensors_header(folder / ADAPTER_WEIGHTS).get(SCORE)
        labels = [f"LABEL_{number}" for number in range(0 if score is None else score.shape[0])]
    return config if labels is None else ClassifierConfig.of(config, tuple(labels), pad)


def read_config(folder: Path, base: str | Path | None = None) -> GPTConfig:
    """Return the configuration in a folder's `config.json`, or in that of an adapter's base."""
    return read_description(folder, base)[0]


def read_bits(folder: Path) -> int | None:
    """Return the bits of a folder's packed matrices; None if it is not quantized."""
    return None if is_adapter(folder) else read_description(folder)[1]


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
            f"`gptsmith import {quote(str(folder))} OUT` reads them"
        )
    raise FileNotFoundError(f"{folder} has no {WEIGHTS}: a folder with a GPT-2 model is needed")


def read_folder(folder: Path, base: str | Path | None = None) -> ModelFolder:
    """Return a folder's description; ValueError if its tensors do not match its config.json.

    For an adapter, the tensors are those of its base.
    """
    if is_adapter(folder):
        found = read_folder(find_base(folder, base))
        return found._replace(path=folder, config=adapted_config(folder, found.config), bits=None)
    config, bits = read_description(folder)
    tensors = {n: t for path in weight_files(folder) for n, t in safetensors_header(path).items()}
    if bits is not None:
        match = match_packed(folder, config, bits, tensors)
    else:
        match = match_unpacked(folder, config, {name: t.shape for name, t in tensors.items()})
    return ModelFolder(folder, config, bits, tensors, match)


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


def safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors in a safetensors file's header; DamagedError if the file is too short.

    The library's `safe_open` could read it, but it imports NumPy, which takes a third of the time
    of `gptsmith describe FOLDER`, and it does not distinguish truncated files from invalid ones.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise DamagedError(f"{path} is cut short: its {size:,} bytes end within the header")
        try:
            entries = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{path} is not a safetensors file: {error}") from error
    if not isinstance(entries, dict):
        raise DamagedError(f"{path} is not a safetensors file: its header is not a JSON object")
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
            f"{path} is cut short: it has {size:,} bytes, fewer than its header says"
        )
    return tensors


# -- finding the folder that a name means


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, newest first."""
    return sorted((run / "checkpoints").glob("step-*"), reverse=True)


def is_run(folder: Path) -> bool:
    """Return whether a folder is a training run, not a single model."""
    return (folder / "checkpoints").is_dir()


def pointed_to(run: Path, pointer: str) -> Path | None:
    """Return the checkpoint that a run's `best` or `last` names; None if there is none yet."""
    path = run / pointer
    if not path.is_file():
        return None
    return run / "checkpoints" / path.read_text(encoding="utf-8").strip()


def find_checkpoint(run: Path, pointer: str, *, training: bool) -> Path:
    """Return the checkpoint that `pointer` names, verified; if damaged, the newest intact one.

    A warning reports the fallback. FileNotFoundError if no checkpoint is intact.
    """
    first = pointed_to(run, pointer)
    candidates = [first] if first else []
    candidates += [path for path in checkpoints(run) if path != first]
    problems = []
    for path in candidates:
        try:
            verify(path, training=training)
            if is_adapter(path):
                read_adapter_config(path)  # its base is looked for later, as it may be named
            else:
                read_config(path)
        except (DamagedError, FileNotFoundError) as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{problems[0]}; using {path} instead", stacklevel=2)
        return path
    why = f": {problems[0]}" if problems else ""
    raise FileNotFoundError(f"{run} has no intact checkpoint{why}")


def find_model(name: str | Path) -> Path:
    """Return the folder of MODEL, verified: a run's best checkpoint, or the folder itself."""
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


def find_base(folder: Path, base: str | Path | None = None) -> Path:
    """Return the folder of an adapter's base, verified: `base`, or as the adapter names it.

    The name is a path, also from the adapter's folder on; or the base has its last word as its name
    and is beside the adapter, or beside a folder that the adapter is in.
    """
    named = str(base or read_adapter_config(folder).base)
    places = [Path(named), folder / named]
    places += [parent / Path(named).name for parent in folder.resolve().parents[:4]]
    here = folder.resolve()
    found = [place for place in places if named and place.is_dir() and place.resolve() != here]
    if base is None and not found:
        raise FileNotFoundError(
            f"{folder} is an adapter, and its base '{named}' is not there: name it with --base, as "
            f"in `gptsmith merge {quote(str(folder))} OUT --base MODEL`"
        )
    model = find_model(base or found[0])
    if is_adapter(model):
        raise ValueError(
            f"the base of {folder}, {model}, is an adapter itself: "
            f"`gptsmith merge {quote(str(model))} OUT` makes it a whole model, which can be a base"
        )
    return model


def best_of(name: str) -> str:
    """Return the best checkpoint of a run by its name, or any other word as it is."""
    return str(find_model(name)) if is_run(Path(name)) else name
