"""The description of a model, given as a configuration, a preset, a recipe or a folder.

Reads JSON and the headers of tensors, so it needs no PyTorch.
"""

from pathlib import Path

from ..config.describe import Description
from ..config.fields import suggestion
from ..config.fitting import Devices
from ..config.lora import LoRASettings
from ..config.model import PRESETS, GPTConfig
from ..config.recipe import read_toml, recipes
from .adapter_json import is_adapter, read_adapter_config
from .finding import find_base, find_model
from .folder import read_folder


def describe(
    what: GPTConfig | str | Path,
    *,
    title: str | None = None,
    lora: int | None = None,
    base: str | None = None,
    devices: Devices | None = None,
) -> Description:
    """Describe every tensor of a model, its parameters, memory and FLOPs; `str` gives the page.

    `what` is a configuration, the name of a preset or recipe, a recipe's file, or any MODEL; `base`
    is that of an adapter. `lora` adds what adapters of that rank would cost in training, and
    `devices` what training needs of each of them.
    ValueError or FileNotFoundError if it is none of these, or if the folder is damaged.
    """
    adapters = None if lora is None else LoRASettings(rank=lora, alpha=2 * lora)
    if isinstance(what, GPTConfig):
        return Description(title or "a model", what, adapters, devices)
    config, name, folder = described_config(str(what), base)
    if folder is not None and is_adapter(folder):
        held = read_adapter_config(folder)
        name += f" (LoRA of rank {held.rank} on {find_base(folder, base)})"
    elif folder is not None and (found := read_folder(folder)).bits is not None:
        name += f" (quantized to {found.bits} bits: {found.tensor_bytes:,} bytes of weights)"
    return Description(title or name, config, adapters, devices)


def described_config(what: str, base: str | None = None) -> tuple[GPTConfig, str, Path | None]:
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
    found = read_folder(find_model(what), base)
    return found.config, str(found.path), found.path
