"""A simulated Windows: Linux, which refuses what Windows refuses.

Windows flushes only files that are open for writing; it replaces, renames and deletes nothing that
is open or mapped; it refuses some characters and names; it ends lines with CR LF and writes in
cp1252 where nobody says otherwise; and it lacks what only POSIX has.
"""

import builtins
import errno
import io
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LACKING: dict[Any, str] = {
    os: "fork geteuid getuid sched_getaffinity O_DIRECTORY",
    signal: "SIGHUP SIGKILL",
    socket: "AF_UNIX",
}
LACKING_MODULES = "fcntl grp pwd resource termios"
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
FORBIDDEN = re.compile(r'[<>:"\\|?*\0-\x1f]|[. ]$')
SHARING_VIOLATION = 32


def refusal(path: Any, winerror: int = SHARING_VIOLATION) -> PermissionError:
    error = PermissionError(errno.EACCES, "it is used by another process", str(path))
    error.winerror = winerror  # type: ignore[attr-defined]
    return error


def used() -> set[str]:
    """All files that this process has open or mapped."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # that of the list itself
            continue
    lines = Path("/proc/self/maps").read_bytes().decode(errors="replace").splitlines()
    return found | {line.split(maxsplit=5)[5] for line in lines if line.count("/")}


def check_unused(path: Any) -> None:
    """Refuse a file that is used, and a folder with such a file."""
    real = os.path.realpath(path)
    if any(each == real or each.startswith(f"{real}/") for each in used()):
        raise refusal(path)


def check_name(path: Any) -> None:
    """Refuse names that Windows cannot have."""
    if isinstance(path, int):
        return
    for name in Path(os.fsdecode(path)).parts[1 if os.path.isabs(path) else 0 :]:
        if name not in (".", "..") and (FORBIDDEN.search(name) or RESERVED.fullmatch(name)):
            raise OSError(errno.EINVAL, "the name is not valid", os.fsdecode(path))


@contextmanager
def simulated_windows() -> Iterator[None]:
    """Let this process see a Windows until the end."""
    with pytest.MonkeyPatch.context() as patch:
        for module, names in LACKING.items():
            for name in names.split():
                patch.delattr(module, name)
        for name in LACKING_MODULES.split():
            patch.setitem(sys.modules, name, None)
        patch.setattr(signal, "SIGBREAK", signal.SIGUSR2, raising=False)
        patch_files(patch)
        patch_texts(patch)
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict")
            patch.setattr(sys, name, stream)
        yield


def patch_files(patch: pytest.MonkeyPatch) -> None:
    """Refuse what Windows refuses to do with files that are open."""
    open_file, unlink, rmdir = os.open, os.unlink, os.rmdir

    def os_open(path: Any, flags: int, *more: Any, **options: Any) -> int:
        check_name(path)
        if os.path.isdir(path) and flags & os.O_TMPFILE != os.O_TMPFILE:  # that has no name
            raise refusal(path, 5)
        return open_file(path, flags, *more, **options)

    def fsync(file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        facts = Path(f"/proc/self/fdinfo/{number}").read_text("ascii").split()
        if int(facts[facts.index("flags:") + 1], 8) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    def moving(move: Callable[..., None], *, replaces: bool) -> Callable[..., None]:
        def moved(source: Any, target: Any, **options: Any) -> None:
            check_name(target)
            check_unused(source)
            if os.path.isdir(target) or (os.path.exists(target) and not replaces):
                raise refusal(target, 5)
            check_unused(target)
            move(source, target, **options)

        return moved

    def removing(remove: Callable[..., None]) -> Callable[..., None]:
        def removed(path: Any, **options: Any) -> None:
            check_unused(path)
            remove(path, **options)

        return removed

    def rmtree(path: Any, ignore_errors: bool = False, *_: Any, **options: Any) -> None:
        for place, folders, files in os.walk(path, topdown=False):
            here = [(removing(unlink), each) for each in files]
            for remove, name in [*here, *((rmdir, each) for each in folders)]:
                try:
                    remove(os.path.join(place, name))
                except OSError:
                    if not ignore_errors:
                        raise
        try:
            rmdir(path)
        except OSError:
            if not ignore_errors:
                raise

    patch.setattr(os, "open", os_open)
    patch.setattr(os, "fsync", fsync)
    patch.setattr(os, "replace", moving(os.replace, replaces=True))
    patch.setattr(os, "rename", moving(os.rename, replaces=False))
    for name in ("unlink", "remove"):
        patch.setattr(os, name, removing(unlink))
    patch.setattr(shutil, "rmtree", rmtree)


def patch_texts(patch: pytest.MonkeyPatch) -> None:
    """Texts are in cp1252 unless somebody says what they are in, and their lines end with CR LF."""
    plain_open, mkdir = io.open, os.mkdir

    def text_open(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        *more: Any,
        **options: Any,
    ) -> Any:
        check_name(file)
        if "b" not in mode:
            encoding = "cp1252" if encoding in (None, "locale") else encoding
            newline = "\r\n" if newline is None and not mode.startswith("r") else newline
        return plain_open(file, mode, buffering, encoding, errors, newline, *more, **options)

    def make_folder(path: Any, *more: Any, **options: Any) -> None:
        check_name(path)
        mkdir(path, *more, **options)

    patch.setattr(io, "open", text_open)
    patch.setattr(builtins, "open", text_open)
    patch.setattr(os, "mkdir", make_folder)
