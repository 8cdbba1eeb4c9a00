"""Compare a folder with its manifest: which files are damaged, and which texts were edited.

Knows nothing of what training keeps there.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path

from ..machine.files import MANIFEST, DamagedError, read_json, sha256
from .whole import CONFIG, WEIGHTS_INDEX, read_whole

TRAINING = "training"  # the folder in a checkpoint that only training reads


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
            read_whole(folder)
        except ValueError as error:
            raise DamagedError(str(error)) from error
