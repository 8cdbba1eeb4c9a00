"""What a checkpoint has beside its model, so that training can go on.

Knows nothing of what an optimizer's tensors or the state mean.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..machine.files import read_json, write_json
from .header import safetensors_header
from .safetensors import entries_of, fetch_from, write_safetensors
from .verifying import TRAINING

OPTIMIZER = f"{TRAINING}/optimizer.safetensors"
STATE = f"{TRAINING}/state.json"


def write_training(
    folder: Path, optimizer: Mapping[str, Tensor] | None, state: dict[str, Any] | None
) -> None:
    """Write the optimizer's tensors (any shapes) and the training state, where there are any."""
    if optimizer is not None:
        (folder / OPTIMIZER).parent.mkdir()
        write_safetensors(folder / OPTIMIZER, entries_of(optimizer))
    if state is not None:
        write_json(folder / STATE, state)


def load_training(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the optimizer's tensors (any shapes) and the training state, as given to `save`."""
    if not (folder / STATE).is_file() or not (folder / OPTIMIZER).is_file():
        raise ValueError(f"{folder} has a model but no training state: start from it with --from")
    state = read_json(folder / STATE)
    tensors = safetensors_header(folder / OPTIMIZER)
    get = fetch_from(tensors)
    return {name: get(name) for name in tensors}, state
