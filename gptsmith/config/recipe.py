"""From TOML and words to settings, and back.

A recipe is a TOML file with a table per section of RunSettings; `config.toml` in a run is the same
file with every choice made. Nothing in one is ever executed. Standard library only.
"""

import math
import tomllib
import types
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .fields import suggestion
from .model import GPTConfig, current_names, preset
from .settings import RunSettings

LARGEST = 1 << 63
RECIPES = Path(__file__).parents[1] / "recipes"


def parse_value(name: str, value: Any, hint: Any) -> Any:
    """`value`, from TOML or the command line, as the type `hint`; ValueError naming both."""
    if get_origin(hint) in (types.UnionType, Union):
        options = [option for option in get_args(hint) if option is not type(None)]
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return parse_value(name, value, options[0])
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(map(str, get_args(hint)))
            close = suggestion(str(value), get_args(hint))
            raise ValueError(f"{name} is {value!r}: one of {choices} is needed{close}")
        return value
    if hint is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}: true or false is needed")
        return value
    if hint is str and isinstance(value, str):
        return value
    wanted = {int: "a whole number", float: "a number", str: "text"}[hint]
    number = None if hint is str else number_of(value, hint)
    if number is None:
        raise ValueError(f"{name} is {value!r}: {wanted} is needed")
    if not math.isfinite(number) or (hint is int and abs(number) >= LARGEST):
        raise ValueError(f"{name} is {number}: {wanted} that a machine can hold is needed")
    return number


def number_of(value: Any, kind: type) -> int | float | None:
    """`value` as an int or a float, or None where it is neither; 1e6 and 65_536 are whole too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        if kind is float or not isinstance(value, float):
            return kind(value)
    except (ValueError, OverflowError):
        pass
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if math.isfinite(number) and number == int(number) else None


def updated(settings: Any, values: Mapping[str, Any], where: str) -> Any:
    """A settings dataclass with values replaced; unknown names are errors with a suggestion."""
    hints = get_type_hints(type(settings))
    if isinstance(settings, GPTConfig):
        values = current_names(values)
    for name in values:
        if name not in hints:
            raise ValueError(f"{where} has no setting '{name}'{suggestion(name, hints)}")
    new = {name: parse_value(name, value, hints[name]) for name, value in values.items()}
    if "block" in new and new["block"] != settings.block:
        new = {"activation": None, "bias": None, "qkv_bias": None} | new  # the other block's own
    return replace(settings, **new)


def sections() -> dict[str, type]:
    """The sections of RunSettings by name, in order."""
    return {f.name: get_type_hints(RunSettings)[f.name] for f in fields(RunSettings)}


def with_overrides(settings: RunSettings, flat: Mapping[str, Any]) -> RunSettings:
    """Settings with some replaced by name alone (no two sections share one)."""
    flat = current_names(flat)
    for section, kind in sections().items():
        names = {f.name for f in fields(kind)}
        values = {name: value for name, value in flat.items() if name in names}
        if values:
            part = updated(getattr(settings, section), values, section)
            settings = replace(settings, **{section: part})
    return settings


def read_toml(path: Path) -> RunSettings:
    """Settings from a recipe or a run's config.toml; unknown tables and keys are errors."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    settings = RunSettings()
    for section, table in document.items():
        if section not in sections():
            hint = suggestion(section, sections())
            raise ValueError(f"{path} has an unknown section '{section}'{hint}")
        if not isinstance(table, dict):
            raise ValueError(f"{path}: '{section}' is a section: write [{section}]")
        base = getattr(settings, section)
        if section == "model" and "preset" in table:
            table = dict(table)
            base = preset(parse_value("preset", table.pop("preset"), str))
        part = updated(base, table, f"{path} [{section}]")
        settings = replace(settings, **{section: part})
    return settings


def to_toml(settings: RunSettings) -> str:
    """Settings as a file that `read_toml` reads back; absent choices are left out."""
    lines = ["# Everything needed to repeat this run:  gptsmith train config.toml", ""]
    for section in sections():
        part = getattr(settings, section)
        lines.append(f"[{section}]")
        for f in fields(part):
            value = getattr(part, f.name)
            if value is not None or f.default is not None:
                lines.append(f"{f.name} = {toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """A string, number or boolean as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:  # TOML has no word for it; `parse_value` reads this one
        return '"none"'
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08X}" for c in escaped) + '"'
    return repr(value)


def recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}
