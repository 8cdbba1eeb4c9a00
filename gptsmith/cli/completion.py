"""The verb that writes a script with which a shell completes command lines: completion.

The script has all verbs and flags of this version, and asks nobody when it completes.
"""

import re
from argparse import Action, Namespace
from typing import Literal, get_args, get_origin

import shtab

from ..config.recipe import without_none
from .flags import Parser, SettingAction
from .main import VERBS, find_verb

SHELLS = ("bash", "zsh", "fish")
ON_DISK = {"DATA", "DIR", "FILE", "FOLDER", "MODEL", "OUT", "PATH", "RUN", "SOURCE"}  # metavars


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith completion`."""
    parser.add_argument(
        "shell",
        choices=SHELLS,
        metavar="|".join(SHELLS),
        help="the shell; docs/install.md says where its script belongs",
    )


def run(options: Namespace) -> None:
    """Write a script that lets a shell complete verbs, flags, choices and file names."""
    print(shtab.complete(whole_parser(), options.shell))


def whole_parser() -> Parser:
    """Return one parser with all verbs, for their names, flags and choices alone."""
    parser = Parser(prog="gptsmith")
    parser.add_argument("--version", action="store_true", help="show the version")
    verbs = parser.add_subparsers()
    for name, summary in VERBS.items():
        module, _ = find_verb(name)
        verb = verbs.add_parser(name, help=summary)
        module.arguments(verb)
        verb.add_argument("--traceback", action="store_true", help="show where an error happened")
        for action in verb._actions:
            set_completion(action)
    return parser


def set_completion(action: Action) -> None:
    """Let a setting with choices complete them, and one that names a file complete file names."""
    hint = without_none(action.hint) if isinstance(action, SettingAction) else None
    if get_origin(hint) is Literal:
        action.choices = [str(choice) for choice in get_args(hint)]
    elif ON_DISK & {*re.split(r"[^A-Z]+", str(action.metavar))}:
        action.complete = shtab.FILE  # type: ignore[attr-defined]  # as shtab wants it
