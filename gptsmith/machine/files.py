"""Write files completely or not at all, and detect damaged ones when reading.

Knows nothing of their contents beyond JSON and SHA-256.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
CHUNK_BYTES = 1 << 20  # read at a time
ACCESS_DENIED, SHARING_VIOLATION = 5, 32  # of Windows's winerror.h
HASHED_BYTES = 8 << 20  # at a time: a buffer of them is all the memory that hashing takes


class DamagedError(ValueError):
    """A file or folder is not as it was written: cut short, changed or incomplete."""


# -- writing: all or nothing


@contextmanager
def written_whole(folder: Path, *, manifest: bool = True) -> Iterator[Path]:
    """Yield a temporary folder, and rename it to `folder` once everything is on disk.

    Any failure removes it. `folder` must not exist, unless it is empty. `manifest` adds a manifest;
    datasets have checksums of their own instead.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists: choose another name, or remove it first")
    with renamed_once_written(folder) as temporary:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
        temporary.mkdir(parents=True)
        yield temporary
        if manifest:
            write_manifest(temporary)


@contextmanager
def file_written_whole(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, and rename it to `path` once it is on disk.

    Any failure removes it; `path` must not exist.
    """
    if path.exists():
        raise ValueError(f"{path} already exists: choose another name, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_once_written(path) as temporary:
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically: write a temporary file, flush it, rename it."""
    with renamed_once_written(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def renamed_once_written(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or a folder, which takes the place of `path` at the end.

    Any failure removes it; if the disk is full, the error says so.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        for each in [*temporary.rglob("*"), temporary]:
            flush_to_disk(each)
        if path.is_dir():
            path.rmdir()
        replace(temporary, path)
        flush_to_disk(path.parent)
    except BaseException as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(PermissionError):  # on Windows, if the error keeps it open
                temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(
                f"the disk is full: {path} was not written; free some space and try again"
            ) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, in ASCII: names of files may be no valid Unicode."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="ascii", newline="\n")


def flush_to_disk(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk (fsync).

    Windows flushes only files that are open for writing; it cannot open folders, and does not need
    this for names.
    """
    is_folder = path.is_dir()
    if is_folder and not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# -- files that other processes read

WAITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # seconds, for a program that reads a file


def replace(source: Path, target: Path) -> None:
    """Rename a file or a folder; a file that is there is replaced.

    Windows refuses that while another program, such as one that looks for viruses, reads either of
    them: then it is tried again for two seconds.
    """
    for seconds in WAITS:
        try:
            source.replace(target)
            return
        except PermissionError as error:
            if not is_being_read(error):
                raise
        time.sleep(seconds)
    source.replace(target)


def remove_folder(folder: Path) -> None:
    """Remove a folder; on Windows, what another program reads stays there, with a warning."""
    try:
        shutil.rmtree(folder)
    except PermissionError as error:
        if not is_being_read(error):
            raise
        warnings.warn(f"{folder} is being read, and could not be removed whole", stacklevel=2)


def is_being_read(error: OSError) -> bool:
    """Whether Windows refused to touch a file because another program has it open."""
    return getattr(error, "winerror", None) in (ACCESS_DENIED, SHARING_VIOLATION)


# -- the manifest


def write_manifest(folder: Path) -> None:
    """Record size and SHA-256 of every file in `folder` (and below) as `manifest.json`."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"), key=Path.as_posix)
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": "gptsmith-manifest", "version": 1, "files": files})


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file.

    Other threads may run Python code meanwhile, and each chunk may have to wait 5 ms for them: with
    hashlib.file_digest's quarter of a megabyte, large files would take five times as long.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(HASHED_BYTES, path.stat().st_size + 1)))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def edited(path: Path) -> bool:
    """Return whether a file differs from what the manifest beside it, if there is one, says."""
    manifest = path.with_name(MANIFEST)
    files = read_json(manifest).get("files") if manifest.exists() else None
    entry = files.get(path.name) if isinstance(files, dict) else None
    return isinstance(entry, dict) and entry.get("sha256") != sha256(path)


# -- reading


def chunks(path: Path, start: int, count: int) -> Iterator[bytes]:
    """Yield `count` bytes of a file from `start` on, a megabyte at a time."""
    with path.open("rb") as file:
        file.seek(start)
        while count > 0 and (chunk := file.read(min(count, CHUNK_BYTES))):
            yield chunk
            count -= len(chunk)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; DamagedError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DamagedError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DamagedError(f"{path} contains {type(value).__name__}, not a JSON object")
    return value
