"""The description of a model, given as a configuration, a preset, a recipe or a folder.

Reads JSON and the headers of tensors, so it needs no PyTorch.
"""

from pathlib import Path

from ..config.describe import Description
from ..config.fields import suggestion
from ..config.model import PRESETS, GPTConfig
from ..config.recipe import read_toml, recipes
from .folder import find_model, read_folder


def describe(what: GPTConfig | str | Path, *, title: str | None = None) -> Description:
    """Describe every tensor of a model, its parameters, memory and FLOPs; `str` gives the page.

    `what` is a configuration, the name of a preset or recipe, a recipe's file, or any MODEL.
    ValueError or FileNotFoundError if it is none of these, or if the folder is damaged.
    """
    if isinstance(what, GPTConfig):
        return Description(title or "a model", what)
    config, name, folder = described_config(str(what))
    if folder is not None and (found := read_folder(folder)).bits is not None:
        name += f" (quantized to {found.bits} bits: {found.tensor_bytes:,} bytes of weights)"
    return Description(title or name, config)


def described_config(what: str) -> tuple[GPTConfig, str, Path | None]:
    """Return the configuration, title and folder of a preset, a recipe or a model's folder.

    The folder is None for presets and recipes; otherwise its tensors' shapes are checked.
    """
    if what in PRESETS:
        return PRESETS[what], what, None
    if what in recipes():
        return read_toml(recipes()[what]).model, f"recipe {what}", None
    if what.endswith(".toml") and Path(what).is_file():
        return read_toml(Path(what)).model, what, None
    if not Path(what).exists():
        hint = suggestion(what, [*PRESETS, *recipes()])
        raise ValueError(f"'{what}' is not a preset, recipe or model{hint}")
    found = read_folder(find_model(what))
    return found.config, str(found.path), found.path
