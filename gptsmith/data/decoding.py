"""Decode the bytes of a source, and recognise what is not text.

Knows nothing of documents or rows.
"""

import codecs
import encodings
import hashlib
import re
import warnings
from collections.abc import Iterator

from ..config.fields import suggestion
from ..machine.files import CHUNK_BYTES
from .sources import Source

# What a file begins with that is not text, and what to do with it.
OTHERS = {
    b"\x1f\x8b": "compressed with gzip: decompress it first, as by gunzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: decompress it first, as by unzstd",
    b"BZh91AY&SY": "compressed with bzip2: decompress it first, as by bunzip2",
    b"\xfd7zXZ\x00": "compressed with xz: decompress it first, as by unxz",
    b"%PDF-": "a PDF: convert it to text first, as by pdftotext",
    b"PK\x03\x04": "a ZIP archive, as .docx and .epub are too: convert it to text first",
    b"PAR1\x15": "a Parquet file: name it .parquet, and its rows are read",
}
# The longer of two marks comes first.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
HEAD = 64  # bytes by which a file is recognised


def checked_encoding(name: str) -> str:
    """Return the usual name of a character encoding; ValueError if Python does not know it."""
    try:
        # Python's own codecs only: a package may register one that accepts any name.
        if not (found := encodings.search_function(name.lower())):
            raise LookupError(name)
        "x".encode(found.name)  # refuses codecs that do not encode text as bytes, such as rot13
        return found.name
    except LookupError as error:
        known = ["utf-8", "utf-16", "latin-1", "cp1252", "shift_jis", "gb18030", "big5", "koi8-r"]
        hint = suggestion(name, known) or ": try utf-8 or latin-1"
        raise ValueError(f"encoding '{name}' is unknown{hint}") from error


def decoded_text(
    source: Source, encoding: str, stop: int | None, digest: "hashlib._Hash | None"
) -> Iterator[tuple[str, int]]:
    """Yield text of a source, a megabyte at a time, with the number of bytes decoded so far."""
    decoder = codecs.getincrementaldecoder(encoding)()
    # A byte order mark at the start of a file is not text.
    mark = "\ufeff" if encoding == "utf-8" and source.at_start else ""
    position, starts = 0, True  # bytes read; whether there was no character yet
    with source.open() as file:
        if source.at_start:
            check_beginning(source, encoding, file.read(HEAD))
            file.seek(0)
        while True:
            pending = len(decoder.getstate()[0])  # bytes of an incomplete character
            wanted = CHUNK_BYTES
            if stop is not None and position - pending < stop:
                wanted = min(CHUNK_BYTES, max(1, stop - position))
            data = file.read(wanted)
            if digest is not None:
                digest.update(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                place = position - pending + error.start
                raise ValueError(
                    f"{source.name}: byte 0x{error.object[error.start]:02x} at position {place} "
                    f"is not {encoding}: name the file's encoding with --encoding, as latin-1"
                ) from error
            except UnicodeError as error:  # some codecs do not report a position
                raise ValueError(
                    f"{source.name} is not {encoding} ({error}): name its --encoding, as utf-8"
                ) from error
            position += len(data)
            if text and starts:
                text, starts = text.removeprefix(mark), False
            if text:
                yield text, position - len(decoder.getstate()[0])
            if not data:
                return


def check_beginning(source: Source, encoding: str, head: bytes) -> None:
    """Raise ValueError if a source begins as something else than text in this encoding."""
    for mark, problem in OTHERS.items():
        if head.startswith(mark):
            raise ValueError(f"{source.name} is {problem}")
    marked = (name for mark, name in MARKS.items() if head.startswith(mark))
    found = next(marked, None) or unmarked_utf_16(head)
    if found and not encoding.startswith(found[:6]):
        raise ValueError(f"{source.name} is {found}, not {encoding}: add --encoding {found}")
    if re.match(rb"\s*<(!doctype\s+)?html\b", head, re.I) and ".html" not in source.name:
        warnings.warn(f"{source.name} looks like HTML, whose tags are text too", stacklevel=2)


def unmarked_utf_16(head: bytes) -> str | None:
    """Return the encoding of what is mostly ASCII in UTF-16, which is valid UTF-8 with zeros."""
    even, odd = head[::2], head[1::2]
    if len(head) < HEAD or any(even) == any(odd):
        return None
    return "utf-16-le" if any(even) else "utf-16-be"
