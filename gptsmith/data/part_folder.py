"""A part of a dataset on disk: what is in its folder, and whether it is as it was written.

Knows nothing of how parts are made (`parts.py`) or joined (`join.py`).

Shapes:  D documents
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config.fields import SettingError
from ..machine.files import MANIFEST, DamagedError, edited, read_json, sha256
from .repeats import DIGEST_BYTES
from .shards import TokenStream

PART_INFO, PART_FORMAT, PART_VERSION = "dataset-part.json", "gptsmith-dataset-part", 1
DOCUMENTS, ENDS, TOKENIZER = "documents.bin", "ends.bin", "tokenizer"
# A document has two sections: all of it and nothing, or what is before its tail and its tail.
SECTIONS = ("tokens", "tail")
DOCUMENT = np.dtype(
    [
        ("bytes", "<i8", 2),  # of text, with what separates documents
        ("there", "?", 2),  # whether there is such a section, which may be empty
        ("separator", "u1"),  # bytes at the end that are no text of the document
        ("digest", "u1", DIGEST_BYTES),
    ]
)


class Part(NamedTuple):
    """Which part of how many, counted from 1."""

    number: int
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @classmethod
    def parse(cls, word: str) -> "Part":
        """Return the part that a word such as 3/16 means; SettingError if it means none."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", word)
        if not match or not 1 <= int(match[1]) <= int(match[2]):
            raise SettingError("part", f"is {word}: I/N with I from 1 to N is needed, as in 3/16")
        return cls(int(match[1]), int(match[2]))


class PartFolder(NamedTuple):
    """A part on disk."""

    folder: Path
    part: Part
    info: dict[str, Any]  # dataset-part.json

    def documents(self) -> np.ndarray:
        """Return what is known of each document: (D,) DOCUMENT."""
        return np.fromfile(self.folder / DOCUMENTS, DOCUMENT)

    def ends(self) -> np.ndarray:
        """Return where the sections of each document end among the tokens of theirs: (D, 2)."""
        return np.fromfile(self.folder / ENDS, "<i8").reshape(-1, 2)

    def streams(self) -> list[TokenStream]:
        """Return the tokens of both sections."""
        return [
            TokenStream([self.folder / name for name in names]) for names in self.info["shards"]
        ]


def is_part(folder: Path) -> bool:
    """Return whether a folder was made by `prepare --part`."""
    return (folder / PART_INFO).is_file() and (folder / MANIFEST).is_file()


def open_part(folder: Path) -> PartFolder:
    """Open a part; ValueError if the folder is none, DamagedError if its description changed."""
    if not is_part(folder):
        raise ValueError(
            f"{folder} is no part of a text: a folder made by `gptsmith prepare --part I/N` is "
            "needed"
        )
    if edited(folder / PART_INFO):
        raise DamagedError(
            f"{folder / PART_INFO} was changed since it was written: remove {folder}, and make the "
            "part again"
        )
    info = read_json(folder / PART_INFO)
    if (info.get("format"), info.get("version")) != (PART_FORMAT, PART_VERSION):
        raise DamagedError(
            f"{folder / PART_INFO} has version {info.get('version')!r}: this gptsmith reads "
            f"version {PART_VERSION}; make all parts with this one"
        )
    return PartFolder(folder, Part.parse(info["part"]), info)


def verify(each: PartFolder) -> None:
    """Raise DamagedError if a file of a part is missing, or is not as it was written."""
    cure = f"remove {each.folder}, and make --part {each.part} again"
    for name, expected in (read_json(each.folder / MANIFEST).get("files") or {}).items():
        path = each.folder / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing: {cure}")
        if sha256(path) != expected["sha256"]:
            raise DamagedError(f"{path} was changed since it was written: {cure}")
    ends, counts = each.ends(), [len(stream) for stream in each.streams()]
    known = len(each.documents()) == len(ends) == each.info["documents"]
    if not known or counts != each.info["tokens"]:
        # Two processes wrote it at once, as when a cluster starts a job again that is not dead yet.
        raise DamagedError(f"{each.folder} has files of different attempts: {cure}")
