"""Command-line flags from the fields of settings dataclasses, and one-line errors with suggestions.

A field gives the flag its name, its type and its help. Built on argparse, which is part of Python,
imports in a few milliseconds, and lets us word the errors.
"""

import argparse
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from ..config.fields import Bytes, SettingError, suggestion
from ..config.recipe import parse_value, types_of, without_none

Settings = TypeVar("Settings")


class UsageError(ValueError):
    """The command line cannot be understood."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with a suggestion for a misspelt flag."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def format_help(self) -> str:
        """Return the help, whose usage line shows the required arguments and flags."""
        words = [usage_word(action) for action in self._actions if not action.option_strings]
        flags = [
            f"{action.option_strings[0]} {action.metavar}"
            for action in self._actions
            if action.option_strings and action.required
        ]
        self.usage = " ".join(["%(prog)s", *words, *flags, "[--option value ...]"])
        return super().format_help()

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the arguments of a verb; UsageError if one is unknown."""
        options, unknown = self.parse_known_args(words)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].partition("=")[0]
            kind = "option" if word.startswith("-") else "word"
            self.error(f"unknown {kind} '{word}'{suggestion(word, flags)}")
        return options

    @contextmanager
    def naming_flags(self, options: argparse.Namespace) -> Iterator[None]:
        """Make errors about a setting from the command line name its flag."""
        try:
            yield
        except SettingError as error:
            for action in self._actions:
                if action.dest == error.name and action.option_strings and error.name in options:
                    named = UsageError(f"{action.option_strings[0]} {error.problem}")
                    for note in getattr(error, "__notes__", ()):  # of several processes, which one
                        named.add_note(note)
                    raise named from error
            raise


def usage_word(action: argparse.Action) -> str:
    """Return a positional argument as the usage line shows it, as in "SOURCE [SOURCE ...]"."""
    shown = action.metavar or "|".join(action.choices or ())
    return {"?": "[{0}]", "+": "{0} [{0} ...]"}.get(str(action.nargs), "{0}").format(shown)


class Formatter(argparse.HelpFormatter):
    """Writes help in two columns that are wide enough for our longest flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


class SettingAction(argparse.Action):
    """Parses a value by the setting's type; for a tuple, the flag can be repeated."""

    def __init__(self, option_strings: Sequence[str], dest: str, hint: Any, **more: Any) -> None:
        super().__init__(option_strings, dest, **more)
        self.hint = hint

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        word: Any,
        flag: str | None = None,
    ) -> None:
        if get_origin(self.hint) is tuple:
            value: Any = parse_value(str(flag), word, get_args(self.hint)[0])
            value = (*getattr(namespace, self.dest, ()), value)
        else:
            value = parse_value(str(flag), word, self.hint)
        setattr(namespace, self.dest, value)


def add_flags(
    parser: argparse._ActionsContainer,
    settings: type,
    *,
    without: Iterable[str] = (),
    defaults: Any = None,
) -> None:
    """Add a flag for each field; flags that are not given stay out of the namespace.

    The help shows the fields' defaults, or those in `defaults`, an instance of the same class.
    """
    for field in fields(settings):
        if field.name in without:
            continue
        hint = types_of(settings)[field.name]
        default = field.default if defaults is None else getattr(defaults, field.name)
        options: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "required": default is MISSING,
            "help": help_text(field, default),
        }
        if without_none(hint) is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["action"], options["hint"] = SettingAction, hint
            options["metavar"] = field.metadata.get("metavar") or metavar(hint)
            if alone := field.metadata.get("alone"):
                options["nargs"], options["const"] = "?", alone
        flag = field.metadata.get("flag") or field.name
        parser.add_argument("--" + flag.replace("_", "-"), **options)


def help_text(field: Field[Any], default: Any) -> str:
    """Return a field's help with its default, which replaces a "(default: ...)" in the text."""
    text = field.metadata["help"]
    if isinstance(default, bool):
        default = "yes" if default else "no"
    if default not in (None, MISSING, ()):
        text = re.sub(r" \(default: [^()]*\)$", "", text) + f" (default: {default})"
    return text.replace("%", "%%")


def metavar(hint: Any) -> str:
    """Return the placeholder for a value in the help: its choices, or its kind."""
    hint = without_none(hint)
    if hint == Bytes:
        return "SIZE"
    if get_origin(hint) in (Annotated, tuple):
        return metavar(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    return {int: "N", float: "X", str: "TEXT", Path: "PATH"}[hint]


def given(options: argparse.Namespace, *kinds: type) -> dict[str, Any]:
    """Return the values that the command line gives for the fields of these dataclasses."""
    names = {field.name for kind in kinds for field in fields(kind)}
    return {name: value for name, value in vars(options).items() if name in names}


def changed(options: argparse.Namespace, *kinds: type) -> set[str]:
    """Return the fields of these dataclasses to which the command line gives another value."""
    defaults = {field.name: field.default for kind in kinds for field in fields(kind)}
    return {name for name, value in given(options, *kinds).items() if value != defaults[name]}


def chosen(options: argparse.Namespace, kind: type[Settings]) -> Settings:
    """Return the settings from the command line, with defaults for those that are not given."""
    return kind(**given(options, kind))
