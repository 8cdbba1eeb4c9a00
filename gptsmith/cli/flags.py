"""Command-line flags made from settings dataclasses, and errors of one line that suggest.

A field's name is the flag, its type the check, its `help` the help; built on argparse, which is
part of Python, starts in a few milliseconds, and leaves the wording of errors to us.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from ..config.fields import suggestion


class UsageError(ValueError):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with a suggestion for a misspelt flag."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", Formatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The namespace of these words; UsageError where one is not understood."""
        found, unknown = self.parse_known_args(words)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].partition("=")[0]
            kind = "option" if word.startswith("-") else "word"
            self.error(f"unknown {kind} '{word}'{suggestion(word, flags)}")
        return found


class Formatter(argparse.HelpFormatter):
    """Help in two columns, wide enough for our longest flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)


def flag_name(field: Any) -> str:
    """The flag of a settings field: "--batch-tokens" for `batch_tokens`."""
    return "--" + str(field.metadata.get("flag", field.name)).replace("_", "-")


def add_flags(
    parser: argparse._ActionsContainer, settings: type, *, without: Iterable[str] = ()
) -> None:
    """Add a flag per field; what is not given stays out of the namespace."""
    hints = get_type_hints(settings)
    for field in fields(settings):
        if field.name in without:
            continue
        default = None if field.default is MISSING else field.default
        shown = "" if default is None else f" (default: {default})"
        options: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": (field.metadata["help"] + shown).replace("%", "%%"),
        }
        if bool in (hints[field.name], *get_args(hints[field.name])):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = metavar(hints[field.name])
        parser.add_argument(flag_name(field), **options)


def metavar(hint: Any) -> str:
    """What stands for a value in the help: its choices, or its kind."""
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    kinds = {int: "N", float: "X", str: "TEXT"}
    return next(kinds[kind] for kind in (hint, *get_args(hint)) if kind in kinds)


def given(namespace: argparse.Namespace, *kinds: type) -> dict[str, Any]:
    """The values that were given on the command line, of the fields of these dataclasses."""
    names = {field.name for kind in kinds for field in fields(kind)}
    return {name: value for name, value in vars(namespace).items() if name in names}
