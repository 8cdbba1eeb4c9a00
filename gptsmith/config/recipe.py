"""From TOML and words to settings, and back.

A recipe is a TOML file with a table per section of RunSettings; `config.toml` in a run is the same
file with every choice made. Nothing in one is ever executed.
"""

import math
import re
import tomllib
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tomli_w

from .fields import SettingError, suggestion
from .model import PRESETS, GPTConfig, current_names
from .settings import RunSettings

LARGEST = 1 << 63
RECIPES = Path(__file__).parents[1] / "recipes"
OWN_DATA = "default"  # the recipe for data of one's own, where none is named
# In names of folders, Windows allows none of these characters, and nothing like "aux.txt".
FORBIDDEN = re.compile(r'[<>:"/\\|?*\x00-\x1f]')
RESERVED = re.compile(r"^(con|prn|aux|nul|com\d|lpt\d)\.", re.IGNORECASE)
LONGEST_NAME = 60  # characters
NEEDED = {int: "a whole number", float: "a number", str: "text", Path: "a path"}


# -- values


def parse_value(name: str, value: Any, hint: Any) -> Any:
    """`value`, from TOML or the command line, as the type `hint`; SettingError naming both."""
    if get_origin(hint) in (types.UnionType, Union):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        kind = without_none(hint)
        words = [word for option in get_args(hint) for word in get_args(option) if kind is int]
        if value in words:
            return value
        if words and number_of(value, kind) is None:
            needed = " or ".join([NEEDED[kind], *words])
            raise SettingError(name, f"is {value!r}: {needed} is needed")
        return parse_value(name, value, kind)
    if get_origin(hint) is Annotated:
        hint, read = get_args(hint)
        try:
            value = read(value) if isinstance(value, str) else value
        except ValueError as error:
            raise SettingError(name, f"is {value!r}: {error}") from error
        return parse_value(name, value, hint)
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        for choice in choices:
            if str(value) == str(choice):
                return choice
        known, close = ", ".join(map(str, choices)), suggestion(str(value), choices)
        raise SettingError(name, f"is {value!r}: one of {known} is needed{close}")
    if get_origin(hint) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(parse_value(name, each, get_args(hint)[0]) for each in values)
    if hint is bool:
        if not isinstance(value, bool):
            raise SettingError(name, f"is {value!r}: true or false is needed")
        return value
    if hint in (str, Path) and isinstance(value, str):
        return hint(value)
    number = number_of(value, hint) if hint in (int, float) else None
    if number is None:
        raise SettingError(name, f"is {value!r}: {NEEDED[hint]} is needed")
    if not math.isfinite(number) or (hint is int and abs(number) >= LARGEST):
        raise SettingError(name, f"is {number}: {NEEDED[hint]} that a machine can hold is needed")
    return number


def without_none(hint: Any) -> Any:
    """The type of a value where there is one: `int` for `int | None`."""
    if get_origin(hint) not in (types.UnionType, Union):
        return hint
    return next(option for option in get_args(hint) if option is not type(None))


def number_of(value: Any, kind: type) -> int | float | None:
    """`value` as an int or a float, or None where it is neither; 1e6 and 65_536 are whole too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if kind is int and not isinstance(value, float):
        with suppress(ValueError):
            return int(value)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if kind is float else int(number) if number.is_integer() else None


# -- settings


@cache
def types_of(kind: type) -> dict[str, Any]:
    """The type of each field of a settings dataclass, by name, in order."""
    return get_type_hints(kind, include_extras=True)


def updated(settings: Any, values: Mapping[str, Any]) -> Any:
    """A settings dataclass with some values replaced; ValueError for an unknown name."""
    kind: Any = type(settings)
    types = types_of(kind)
    if isinstance(settings, GPTConfig):
        values = current_names(values)
    for name in values:
        if name not in types:
            raise ValueError(f"there is no setting '{name}'{suggestion(name, types)}")
    new = {name: parse_value(name, value, types[name]) for name, value in values.items()}
    if "block" in new and new["block"] != settings.block:
        new = {"activation": None, "bias": None, "qkv_bias": None} | new  # the other block's own
    return replace(settings, **new)


def sections() -> dict[str, type]:
    """The sections of RunSettings by name, in order."""
    return types_of(RunSettings)


def with_overrides(settings: RunSettings, values: Mapping[str, Any]) -> RunSettings:
    """Settings with some replaced by name alone (no two sections share one)."""
    values = current_names(values)
    homes = {name: section for section, kind in sections().items() for name in types_of(kind)}
    for name in values:
        if name not in homes:
            raise ValueError(f"there is no setting '{name}'{suggestion(name, homes)}")
    for section in sections():
        own = {name: value for name, value in values.items() if homes[name] == section}
        if own:
            part = updated(getattr(settings, section), own)
            settings = replace(settings, **{section: part})
    return settings


def run_settings(
    what: RunSettings | str | Path | None, choices: Mapping[str, Any]
) -> tuple[RunSettings, str]:
    """The settings of a fresh run, and a name for it.

    `what` is what to begin with: settings, a recipe, a .toml file, or data, for which there is a
    recipe too. `choices` replace single settings, by name.
    """
    choices = current_names(choices)
    if what is None and choices.get("data") is not None:
        settings, name = read_toml(recipes()[OWN_DATA]), short_name(choices["data"])
    elif isinstance(what, RunSettings):
        settings, name = what, short_name(what.data.data or "")
    else:
        settings, name = starting_settings(what)
    settings = with_overrides(settings, choices)
    if settings.training.start_from is not None:
        for choice in choices:
            if choice in types_of(GPTConfig) and choice != "dropout":
                problem = "cannot go with --from, which brings its own model: leave it out"
                raise SettingError(choice, problem)
    return settings, name


def starting_settings(what: str | Path | None) -> tuple[RunSettings, str]:
    """The settings that a recipe, a .toml file or data stands for, and a name for the run."""
    known = recipes()
    if what is None:
        what = f"a recipe ({', '.join(known)}), a .toml file or data"
        raise ValueError(f"nothing was named to train on: {what} is needed")
    word, path = str(what), Path(what)
    if word in known:
        return read_toml(known[word]), word
    if path.suffix == ".toml":
        if not path.is_file():
            raise FileNotFoundError(f"there is no settings file at {path}")
        return read_toml(path), path.stem
    if word != "-" and not path.exists():
        hint = suggestion(word, [*known, "shakespeare"])
        raise ValueError(f"'{word}' is no recipe, file or folder{hint}")
    settings = read_toml(known[OWN_DATA])
    return replace(settings, data=replace(settings.data, data=word)), short_name(word)


def short_name(source: str) -> str:
    """A name for a folder, from a source or a tokenizer: "my-notes" for "~/my-notes/".

    Every system allows it: "char:ABC" is "char-ABC".
    """
    path, spelled_out = Path(source), source.startswith("char:")
    name = path.stem if path.is_file() else source if spelled_out else path.name
    name = FORBIDDEN.sub("-", name)[:LONGEST_NAME].rstrip(". ")
    return RESERVED.sub(r"\1-", name) or "text"


# -- TOML


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def read_toml(path: Path) -> RunSettings:
    """Settings from a recipe or a run's config.toml; unknown tables and keys are errors."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    settings = RunSettings()
    for section, table in document.items():
        if section not in sections():
            hint = suggestion(section, sections())
            raise ValueError(f"{path} has an unknown section '{section}'{hint}")
        if not isinstance(table, dict):
            raise ValueError(f"{path}: '{section}' is a section: write [{section}]")
        try:
            part = section_of(table, getattr(settings, section))
        except ValueError as error:
            raise ValueError(f"{path} [{section}]: {error}") from error
        settings = replace(settings, **{section: part})
    return settings


def section_of(table: dict[str, Any], defaults: Any) -> Any:
    """A section's settings from a table of TOML; a `preset` takes the place of the defaults."""
    if isinstance(defaults, GPTConfig) and "preset" in table:
        name = parse_value("preset", table["preset"], str)
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ValueError(f"no preset '{name}'{suggestion(name, PRESETS)} (known: {known})")
        table = {key: value for key, value in table.items() if key != "preset"}
        defaults = PRESETS[name]
    return updated(defaults, table)


def to_toml(settings: RunSettings) -> str:
    """Settings as a file that `read_toml` reads back; absent choices are left out.

    ValueError for a value that is not UTF-8, as the name of a file may be.
    """
    document = {}
    for section in sections():
        part = getattr(settings, section)
        document[section] = {
            field.name: "none" if value is None else value  # TOML has no null
            for field in fields(part)
            if (value := getattr(part, field.name)) is not None or field.default is not None
        }
    if settings.finetune.task is None:
        del document["finetune"]  # nothing is learned from examples
    heading = "# Everything needed to repeat this run:  gptsmith train config.toml\n\n"
    text = heading + tomli_w.dumps(document)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = text[: text.index("\n", error.start)].rpartition("\n")[2]
        raise ValueError(
            f"the run's settings cannot hold what is not UTF-8: {line}: rename the file or folder, "
            "or choose another value"
        ) from None
    return text
