"""What the words MODEL and DATA mean, for every command that takes them."""

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.folder import all_shapes, check_tensors, find_model, read_bits, read_config
from ..config.fields import suggestion
from ..config.model import PRESETS, GPTConfig
from ..config.recipe import read_toml, recipes, updated
from ..config.settings import MachineSettings, PrepareSettings
from ..machine.terminal import tell
from .flags import given


def described_config(what: str) -> tuple[GPTConfig, str, Path | None]:
    """The configuration that a preset, a recipe or a model's folder stands for, its title, and
    the folder."""
    if what in PRESETS:
        return PRESETS[what], what, None
    if what in recipes():
        return read_toml(recipes()[what]).model, f"recipe {what}", None
    if what.endswith(".toml") and Path(what).is_file():
        return read_toml(Path(what)).model, what, None
    if not Path(what).exists():
        hint = suggestion(what, [*PRESETS, *recipes()])
        raise ValueError(f"'{what}' is no preset, recipe or model{hint}")
    folder = find_model(what)
    config = read_config(folder)
    check_tensors(folder, config, all_shapes(folder))  # what is damaged is said, not described
    return config, str(folder), folder


def open_model(options: Namespace, name: str) -> Any:
    """The model and tokenizer that MODEL means, on the machine that the flags ask for."""
    return open_folder(options, name)[1:]


def open_folder(options: Namespace, name: str) -> Any:
    """The folder that MODEL means, verified, with its model and tokenizer as `open_model`."""
    # Verifying a model's files and importing PyTorch take a second each: at once, on two cores.
    with ThreadPoolExecutor(max_workers=1) as aside:
        found = aside.submit(find_model, name)
        from ..checkpoint.saved import load_folder
        from ..machine import devices
        from ..model.attention import WAYS

        folder = found.result()
    machine = choose_to_use(options, folder)
    device = devices.prepare_machine(machine)
    model, tokenizer = load_folder(folder, **devices.loading(machine.dtype, device))
    model.attend_by(WAYS[machine.attention])
    return folder, model, tokenizer


def choose_to_use(options: Namespace, folder: Path) -> MachineSettings:
    """The machine that the flags ask for, to use the model in a folder."""
    from ..machine import devices

    wanted = given(options, MachineSettings)
    machine = updated(MachineSettings(), wanted, "machine")
    word = machine.dtype if "dtype" in wanted else None
    return devices.choose(replace(machine, dtype=dtype_to_use(word, folder, machine.device)))


def dtype_to_use(word: Any, folder: Path | None, device: str) -> Any:
    """The precision that a word means where a model is used.

    Without a word it is float32, or a quantized folder's own; "auto" is the fastest that keeps the
    loss of a model that there is.
    """
    if word not in (None, "auto"):
        return word
    from ..machine import devices
    from ..machine.dtypes import dtype_of_bits

    bits = None if folder is None else read_bits(folder)
    if bits is not None:
        return dtype_of_bits(bits)
    if word is None or folder is None:
        return "float32"
    return told_fastest(folder, devices.find_device(device))


def told_fastest(folder: Path, device: Any) -> Any:
    """The precision that suits the model and device, which is said."""
    from ..evaluation.precision import KEEPS_LOSS, fastest

    dtype, kl, times = fastest(folder, device)
    if dtype == "float32":
        tell(f"dtype float32: nothing faster stays within {KEEPS_LOSS} nats of it on average")
    elif device.type == "cpu":
        tell(
            f"dtype {dtype}: {kl:.2g} nats from float32 on average, below {KEEPS_LOSS}, and "
            f"{times:.1f} times as fast"
        )
    return dtype


def open_text(options: Namespace, tokenizer: Any, config: Any, temporary: Path) -> Any:
    """The tokens that --data means, once they are known to suit the model."""
    from ..data.shards import is_dataset

    folder = Path(options.data)
    if not (folder.is_dir() and is_dataset(folder)):
        folder = prepare_whole(options, tokenizer, temporary / "data")
    return chosen_split(folder, options, tokenizer, config)


def prepare_whole(options: Namespace, tokenizer: Any, out: Path) -> Path:
    """Turn a source into tokens, none held out, for evaluating all of it."""
    from ..data.prepare import prepare

    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, so it needs data that is prepared")
    if options.split == "validation":
        raise ValueError("--split is of prepared data: this is a source, evaluated whole")
    settings = updated(PrepareSettings(), given(options, PrepareSettings), "evaluate")
    settings = replace(settings, validation_fraction=0.0)
    for _ in prepare([options.data], tokenizer, out, options=settings):
        pass
    return out


def chosen_split(folder: Path, options: Namespace, tokenizer: Any, config: Any) -> Any:
    """The tokens of the split to evaluate, once they are known to suit the model."""
    from ..data.shards import Dataset

    dataset = Dataset.open(folder)
    if dataset.fingerprint is None or tokenizer is None:
        dataset.check_ids(config.vocab_size)
    elif dataset.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{options.data} was made with another tokenizer than {options.model} has")
    held_out = dataset.validation
    if options.split == "validation" and held_out is None:
        raise ValueError(f"{options.data} has no validation split: take --split train")
    return dataset.train if options.split == "train" or held_out is None else held_out


SOURCE_HELP = "a built-in text (shakespeare), a file, a folder, or - for standard input"
MODEL_HELP = "a run, a checkpoint, or a Hugging Face GPT-2 folder"
DATA_HELP = "a source, or a folder made by prepare"


def short_name(source: str) -> str:
    """A name for a folder, from a source or a tokenizer: "my-notes" for "~/my-notes/"."""
    return (Path(source).stem if Path(source).is_file() else Path(source).name) or "text"
