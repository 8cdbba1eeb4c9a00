"""Do what a refusal advises: read the cure from the message, and apply it to the command line."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from gptsmith.cli.main import main


def cured(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that a command line is refused with a message, and that every cure in it works.

    OUT in the words or in an advised command is a new place.
    """
    said = refusal([word.replace("OUT", "refused") for word in words], capsys)
    assert message in said
    for number, cure in enumerate(cures(words, said)):
        line = [word.replace("OUT", f"cured-{number}") for word in cure]
        assert main(line) == 0, (said, line, capsys.readouterr().err)


def followed(
    line: str, message: str, cures: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> str:
    """Check that a command line is refused with an advice in words, and that each way of doing it
    works; return the refusal. OUT in the lines is a new place."""
    said = refusal(shlex.split(line.replace("OUT", "refused")), capsys)
    assert message in said
    assert not Path("refused").exists()
    for number, cure in enumerate(cures):
        words = shlex.split(cure.replace("OUT", f"cured-{number}"))
        assert main(words) == 0, (said, cure, capsys.readouterr().err)
    return said


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The last line with which a command line is refused."""
    capsys.readouterr()
    assert main(words) == 2, words
    return capsys.readouterr().err.splitlines()[-1]


def cures(words: list[str], said: str) -> list[list[str]]:
    """The command lines that do what a refusal of `words` advises: one, or some to choose from.

    AssertionError if no advice can be read from it.
    """
    if command := re.search(r"`gptsmith ([^`]+)`", said):
        return [shlex.split(command[1])]
    named = re.match(r"gptsmith: (?:--)?([a-z][\w-]*)", said)
    flag = f"--{named[1]}" if named else ""
    if found := re.search(r"(\S+), did you mean '([^']+)'", said):
        for wrong in (*re.findall(r"'([^']+)'", said), found[1]):
            if any(wrong in word for word in words):
                return [[word.replace(wrong, found[2]) for word in words]]
        return [with_value(words, flag, found[2])]
    if found := re.search(r"leave out (--[\w-]+) and (--[\w-]+)", said):
        return [without(words, *found.groups())]
    if "leave it out" in said:
        return [without(words, flag)]
    if found := re.search(r"(?:try|add) (\w+) (\S+)$", said):
        return [with_value(words, "--" + found[1].replace("_", "-"), found[2])]
    if found := re.search(r"(?:try|take|choose|vocabulary,) (\w+)(?: or (\w+)|, is.*)?$", said):
        return [with_value(words, flag, value) for value in found.groups() if value]
    if found := re.search(r"; (--\w+) writes", said):
        return [[*words, found[1]]]
    if found := re.search(r"with (--[\w-]+), or (none)$", said):
        return [with_value(words, *found.groups())]
    raise AssertionError(f"no advice can be read from: {said}")


def without(words: list[str], *flags: str) -> list[str]:
    """The words without some flags and their values."""
    assert any(word.partition("=")[0] in flags for word in words), f"{flags} are not there"
    kept, skip = list[str](), False
    for word in words:
        name = word.partition("=")[0]
        skip = name in flags or (skip and not word.startswith("--"))
        kept += [] if skip else [word]
    return kept


def with_value(words: list[str], flag: str, value: str) -> list[str]:
    """The words with another value for a flag."""
    return [*(without(words, flag) if flag in words else words), flag, value]
