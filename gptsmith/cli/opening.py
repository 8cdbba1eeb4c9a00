"""How verbs open MODEL: find its folder, verify it, and load it on the chosen device."""

from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..checkpoint.adapter_json import is_adapter
from ..checkpoint.finding import find_base, find_model
from ..checkpoint.folder import read_bits, read_config
from ..config.classifier import ClassifierConfig, check_writes
from ..config.settings import InferenceSettings, MachineSettings
from ..machine.environment import importing
from ..machine.shell import typed
from ..machine.terminal import tell
from .flags import chosen

SOURCE_HELP = "a built-in text (shakespeare), a file, a folder, or - for standard input"
MODEL_HELP = "a run, a checkpoint, or a Hugging Face GPT-2 or LoRA folder"
CLASSIFIER_HELP = "a run, a checkpoint, or a Hugging Face folder of a GPT-2 that labels texts"
DATA_HELP = "a text, or a folder made by `gptsmith prepare`"


def open_model(
    options: Namespace, name: str, *, labels: bool | None = False, base: str | Path | None = None
) -> Any:
    """Return MODEL's verified folder, model and tokenizer, with the flags' device and dtype.

    ValueError if it is a classifier, or with `labels` if it is none; with None it may be either.
    `base` is that of an adapter, if not the flags' or what its folder names.
    """
    settings = chosen(options, InferenceSettings)
    if name == options.model:  # not of another model, which drafts for it
        base = base or settings.base
    # Verifying the files and importing PyTorch take a second each, so they run in parallel.
    with ThreadPoolExecutor(max_workers=1) as pool:
        opening = pool.submit(verified, name, labels=labels, base=base)
        with importing():
            from ..checkpoint.building import load_folder
            from ..machine import devices
            from ..model.attention import WAYS

        folder, tokenizer = opening.result()
    dtype = settings.dtype
    # What auto chooses is measured on text that the model writes.
    if dtype == "auto" and isinstance(read_config(folder), ClassifierConfig):
        dtype = "float32"
    machine = devices.choose(
        MachineSettings(
            device=settings.device,
            dtype=dtype_to_use(dtype, folder, settings.device, base),
            attention=settings.attention,
            threads=settings.threads,
        )
    )
    device = devices.prepare_machine(machine)
    how = devices.loading(machine.dtype, device)
    model, tokenizer = load_folder(folder, tokenizer=tokenizer, base=base, **how)
    model.attend_by(WAYS[machine.attention])
    return folder, model, tokenizer


def verified(name: str, *, labels: bool | None, base: str | Path | None = None) -> tuple[Path, Any]:
    """Return MODEL's verified folder and its tokenizer, if it has one; neither needs PyTorch.

    ValueError as in `open_model`.
    """
    from ..tokenizers import load_tokenizer

    folder = find_model(name)
    config = read_config(folder, base)
    if labels is False:
        check_writes(config, name)
    elif labels and not isinstance(config, ClassifierConfig):
        raise ValueError(
            f"{name} is not a classifier: it writes text and has no labels; make one with "
            f"`gptsmith finetune {typed(name)} --data FILE`, of texts and labels"
        )
    return folder, load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def open_writer(options: Namespace, name: str, **more: Any) -> Any:
    """As `open_model`, but return the compiled step as well; ValueError without a tokenizer."""
    return with_decoder(options, name, *open_model(options, name, **more))


def with_decoder(
    options: Namespace, name: str, folder: Path, model: Any, tokenizer: Any, *, sharing: Any = None
) -> tuple[Path, Any, Any, Any]:
    """Return what `open_model` opened, and its compiled step; ValueError without a tokenizer.

    Tensors that equal those of the model `sharing` are its own.
    """
    if sharing is not None:
        from ..model.lora import share_weights

        share_weights(model, sharing)
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer.json, which generating text needs: add one")
    from ..generation.compiled import CompiledDecoder, open_decoder
    from ..generation.crossover import tune

    settings = chosen(options, InferenceSettings)
    decoder = open_decoder(model, settings.compile)
    if settings.dtype == "auto" and isinstance(decoder, CompiledDecoder):
        tune(decoder)
    return folder, model, tokenizer, decoder


def dtype_to_use(
    word: Any, folder: Path | None, device: str, base: str | Path | None = None
) -> Any:
    """Return the precision that a --dtype means for using a model.

    Without one it is float32, or the folder's own if it is quantized. "auto" is the fastest that
    keeps the model's loss, or that of an adapter's base; a line says which.
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
    from ..evaluation.precision import KEEPS_LOSS, fastest

    found = devices.find_device(device)
    place = find_base(folder, base) if is_adapter(folder) else folder
    dtype, kl, times = fastest(place, found)
    if dtype == "float32":
        tell(f"dtype float32: no faster one stays within {KEEPS_LOSS} nats of it on average")
    elif found.type == "cpu":
        tell(
            f"dtype {dtype}: {kl:.2g} nats from float32 on average, below {KEEPS_LOSS}, and "
            f"{times:.1f} times as fast"
        )
    return dtype
