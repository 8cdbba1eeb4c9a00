"""What a checkpoint has beside its model, so that training can go on.

Knows nothing of what an optimizer's tensors or the state mean.
"""

from collections.abc import Callable, Iterator, Mapping
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
    folder: Path,
    optimizer: Mapping[str, Tensor] | None,
    state: dict[str, Any] | None,
    gather: Callable[[Tensor], Tensor] = Tensor.detach,
) -> None:
    """Write the optimizer's tensors (any shapes) and the training state, where there are any.

    `gather` returns each tensor as it is written.
    """
    if optimizer is not None:
        (folder / OPTIMIZER).parent.mkdir()
        write_safetensors(folder / OPTIMIZER, entries_of(optimizer, gather))
    if state is not None:
        write_json(folder / STATE, state)


class TensorsOf(Mapping[str, Tensor]):
    """The tensors of a file, of any shapes, by name; each is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.known = safetensors_header(path)
        self.fetch = fetch_from(self.known)

    def __getitem__(self, name: str) -> Tensor:
        return self.fetch(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


def load_training(folder: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Return the optimizer's tensors (any shapes) and the training state, as given to `save`."""
    if not (folder / STATE).is_file() or not (folder / OPTIMIZER).is_file():
        raise ValueError(f"{folder} has a model but no training state: start from it with --from")
    return TensorsOf(folder / OPTIMIZER), read_json(folder / STATE)
