"""Read OpenAI's GPT-2 in the TensorFlow folder of its publication, or one of the same form.

The folder has hparams.json, a checkpoint (`bundle.py`), encoder.json and vocab.bpe. It is read
without TensorFlow, and never written. Knows nothing of a checkpoint's file format.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.names import NoWeights, weight_names
from ..checkpoint.tensors import Stored, stored_under
from ..config.cost import Shape
from ..config.model import GPTConfig
from ..machine.files import read_json
from ..tokenizers import Tokenizer
from ..tokenizers.build import from_files
from .bundle import is_index, open_bundle

HPARAMS = "hparams.json"
# theirs: ours. These are all parameters of OpenAI's `src/model.py`.
NUMBERS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}

_LAYER = "model/h{}/"
NAMES = weight_names(  # their matrices have a leading axis of 1 (a convolution), which `read` drops
    {  # ours: theirs
        "wte": "model/wte",
        "wpe": "model/wpe",
        "h.{}.ln_1": f"{_LAYER}ln_1",
        "h.{}.attn.c_attn": f"{_LAYER}attn/c_attn",
        "h.{}.attn.c_proj": f"{_LAYER}attn/c_proj",
        "h.{}.ln_2": f"{_LAYER}ln_2",
        "h.{}.mlp.c_fc": f"{_LAYER}mlp/c_fc",
        "h.{}.mlp.c_proj": f"{_LAYER}mlp/c_proj",
        "ln_f": "model/ln_f",
    },
    embedding="",
    norm=("/g", "/b"),
    linear=("/w", "/b"),
    transposed=True,
)

# Variables of tf.train.AdamOptimizer, which a Saver of all variables keeps too.
TRAINING = NoWeights(
    re.compile(r"global_step|beta[12]_power|model/.+/Adam(_1)?"), "of the optimizer, not a weight"
)


def recognise(path: Path) -> bool:
    """Return whether a folder has hparams.json and the index of a TensorFlow checkpoint."""
    try:
        return (path / HPARAMS).is_file() and any(map(is_index, path.glob("*.index")))
    except OSError:
        return False


def read(path: Path) -> Stored:
    """Open the model of a folder; ValueError if its tensors do not match hparams.json.

    Only `n_head` cannot be checked, because no tensor's shape depends on it.
    """
    config = config_of(path / HPARAMS)
    bundle = open_bundle(find_index(path))
    shapes = {name: without_leading_one(v.shape) for name, v in bundle.variables.items()}

    def get(name: str) -> Tensor:
        return torch.from_numpy(bundle.read(name).reshape(shapes[name]))

    stored = stored_under(
        NAMES,
        config,
        shapes,
        get,
        tokenizer=vocabulary_in(path),
        source=bundle.index,
        says=HPARAMS,
        ignored=TRAINING,
    )
    for name in stored.tensors.read:
        bundle.check_float32(name)
    return stored


def without_leading_one(shape: Shape) -> Shape:
    """Return (in, out) for (1, in, out), and other shapes unchanged."""
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def config_of(path: Path) -> GPTConfig:
    """Return the configuration in hparams.json: five numbers, and GPT-2's defaults."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {HPARAMS}: copy it from the original model")
    hparams = read_json(path)
    if missing := [name for name in NUMBERS if name not in hparams]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is not that of a GPT-2")
    if unknown := [name for name in hparams if name not in NUMBERS]:
        raise ValueError(f"{path} has {', '.join(unknown)}, which OpenAI's GPT-2 does not know")
    try:
        return GPTConfig(**{ours: hparams[theirs] for theirs, ours in NUMBERS.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_index(folder: Path) -> Path:
    """Return the index that a folder's file `checkpoint` names, or the only one there is."""
    found = sorted(path for path in folder.glob("*.index") if is_index(path))
    said = folder / "checkpoint"
    text = said.read_text(encoding="utf-8", errors="replace") if said.is_file() else ""
    if last := re.search(r'^model_checkpoint_path: "(?:.*[/\\])?([^"]+)"', text, re.MULTILINE):
        named = folder / f"{last[1]}.index"
        if named in found:
            return named
    if not found:
        raise FileNotFoundError(f"{folder} has no *.index of a TensorFlow checkpoint")
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"{folder} has {names}: name the one to read in its file 'checkpoint', as in "
            f'model_checkpoint_path: "{found[-1].stem}"'
        )
    return found[0]


def vocabulary_in(folder: Path) -> Tokenizer | None:
    """Load the tokenizer of encoder.json and vocab.bpe; None if both are missing."""
    both = folder / "encoder.json", folder / "vocab.bpe"
    return from_files(*both) if any(path.is_file() for path in both) else None
