"""Flags made from the fields of settings dataclasses, and errors of one line that suggest.

A field's name is the flag, its type the check, its `help` the help. Built on argparse, which is
part of Python, starts in a few milliseconds, and leaves the wording of errors to us.
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
        """The help; its usage shows the words and flags that are needed, in this order."""
        words = [usage(action) for action in self._actions if not action.option_strings]
        flags = [
            f"{action.option_strings[0]} {action.metavar}"
            for action in self._actions
            if action.option_strings and action.required
        ]
        self.usage = " ".join(["%(prog)s", *words, *flags, "[--option value ...]"])
        return super().format_help()

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The namespace of these words; UsageError where one is not understood."""
        options, unknown = self.parse_known_args(words)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = unknown[0].partition("=")[0]
            kind = "option" if word.startswith("-") else "word"
            self.error(f"unknown {kind} '{word}'{suggestion(word, flags)}")
        return options

    @contextmanager
    def naming_flags(self, options: argparse.Namespace) -> Iterator[None]:
        """Let the error of a setting that was given on the command line name its flag."""
        try:
            yield
        except SettingError as error:
            for action in self._actions:
                if action.dest == error.name and action.option_strings and error.name in options:
                    raise UsageError(f"{action.option_strings[0]} {error.problem}") from error
            raise


def usage(action: argparse.Action) -> str:
    """How a word that follows the verb is shown: "SOURCE [SOURCE ...]" for one or more."""
    shown = action.metavar or "|".join(action.choices or ())
    return {"?": "[{0}]", "+": "{0} [{0} ...]"}.get(str(action.nargs), "{0}").format(shown)


class Formatter(argparse.HelpFormatter):
    """Help in two columns, wide enough for our longest flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse.BooleanOptionalAction):
            return action.option_strings[0].replace("--", "--[no-]", 1)
        return super()._format_action_invocation(action)


class SettingAction(argparse.Action):
    """Turns a word into a value of the setting's type; a setting of several collects them."""

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
    """Add a flag per field; what is not given stays out of the namespace.

    The help shows the fields' defaults, or the values of `defaults`, settings of the same class.
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
        flag = field.metadata.get("flag") or field.name
        parser.add_argument("--" + flag.replace("_", "-"), **options)


def help_text(field: Field[Any], default: Any) -> str:
    """A field's sentence with its default, which may take the place of one that it tells."""
    text = field.metadata["help"]
    if isinstance(default, bool):
        default = "yes" if default else "no"
    if default not in (None, MISSING, ()):
        text = re.sub(r" \(default: [^()]*\)$", "", text) + f" (default: {default})"
    return text.replace("%", "%%")


def metavar(hint: Any) -> str:
    """What stands for a value in the help: its choices, or its kind."""
    hint = without_none(hint)
    if hint == Bytes:
        return "SIZE"
    if get_origin(hint) in (Annotated, tuple):
        return metavar(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    return {int: "N", float: "X", str: "TEXT", Path: "PATH"}[hint]


def given(options: argparse.Namespace, *kinds: type) -> dict[str, Any]:
    """The values that were given on the command line, of the fields of these dataclasses."""
    names = {field.name for kind in kinds for field in fields(kind)}
    return {name: value for name, value in vars(options).items() if name in names}


def chosen(options: argparse.Namespace, kind: type[Settings]) -> Settings:
    """The settings that the command line gives, with defaults for those it does not."""
    return kind(**given(options, kind))
