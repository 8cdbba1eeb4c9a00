"""OpenAI's own GPT-2: the TensorFlow folder that it was published as, and what was made from it.

Such a folder has hparams.json, a checkpoint (`bundle.py`), and encoder.json and vocab.bpe. It is
read without TensorFlow, and never written. Knows nothing of how a checkpoint lies in its files.
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
# theirs, of OpenAI's `src/model.py`: ours. It knows no others.
NUMBERS = {
    "n_vocab": "vocab_size",
    "n_ctx": "context_length",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}

_LAYER = "model/h{}/"
NAMES = weight_names(  # a matrix has a leading axis of 1 there, for a convolution: not counted here
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

# What a Saver of all variables keeps besides weights, as tf.train.AdamOptimizer calls it.
TRAINING = NoWeights(
    re.compile(r"global_step|beta[12]_power|model/.+/Adam(_1)?"), "of the optimizer's, no weight"
)


def recognise(path: Path) -> bool:
    """Whether a folder has hparams.json and the index of a TensorFlow checkpoint."""
    try:
        return (path / HPARAMS).is_file() and any(map(is_index, path.glob("*.index")))
    except OSError:
        return False


def read(path: Path) -> Stored:
    """The model of a folder; ValueError unless its tensors are those that hparams.json promises.

    `n_head` alone cannot be checked, since no tensor's shape tells it.
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
    """(1, in, out) as (in, out)."""
    return shape[1:] if len(shape) == 3 and shape[0] == 1 else shape


def config_of(path: Path) -> GPTConfig:
    """The model that a hparams.json describes: five numbers, and GPT-2 in everything else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {HPARAMS}: copy the one of its GPT-2")
    hparams = read_json(path)
    if missing := [name for name in NUMBERS if name not in hparams]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is no GPT-2's")
    if unknown := [name for name in hparams if name not in NUMBERS]:
        raise ValueError(f"{path} has {', '.join(unknown)}, which OpenAI's GPT-2 does not know")
    try:
        return GPTConfig(**{ours: hparams[theirs] for theirs, ours in NUMBERS.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def find_index(folder: Path) -> Path:
    """The checkpoint that a folder's file `checkpoint` names, or the only one that it has."""
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
        raise ValueError(f"{folder} has {names}: write which into its file 'checkpoint'")
    return found[0]


def vocabulary_in(folder: Path) -> Tokenizer | None:
    """The tokenizer of encoder.json and vocab.bpe, or None where there is neither."""
    both = folder / "encoder.json", folder / "vocab.bpe"
    return from_files(*both) if any(path.is_file() for path in both) else None
