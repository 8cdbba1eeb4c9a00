"""Load the model that a name means, while its files are verified.

PyTorch is imported meanwhile, if it is not there yet, so this file needs none.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..machine.environment import without_collecting
from .finding import find_model, is_run, pointed_to

if TYPE_CHECKING:
    import torch

    from ..model.gpt import GPT
    from ..tokenizers import Tokenizer


def load(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    unpacked: bool = False,
    base: str | Path | None = None,
) -> tuple[GPT, Tokenizer | None]:
    """Load the model of a run, checkpoint or Hugging Face folder, in evaluation mode.

    An adapter is added to the weights of its base, which is found by the name in its folder, or is
    `base`; `building.load_adapted` keeps both apart.

    `dtype` is torch.float32 by default. `bits` (8 or 4) packs its matrices while loading; `dtype`
    is then that of the activations. A quantized folder stays packed unless `unpacked`. The
    tokenizer is None if the folder has none. Files listed in a manifest are verified.
    """
    how = {"device": device, "dtype": dtype, "bits": bits, "unpacked": unpacked, "base": base}
    if dtype is None:
        del how["dtype"]

    def load_folder(folder: Path) -> tuple[GPT, Tokenizer | None]:
        building: Any = import_module(".building", __package__)  # and PyTorch
        return building.load_folder(folder, **how)

    likely = Path(name)
    if is_run(likely):
        likely = pointed_to(likely, "best") or likely
    with ThreadPoolExecutor(1) as pool, without_collecting():
        finding = pool.submit(find_model, name)  # verifies the files
        try:
            loaded = load_folder(likely)
        except Exception:  # perhaps by a damaged file, which verifying names; or it comes again
            return load_folder(finding.result())
        folder = finding.result()
        return loaded if folder == likely else load_folder(folder)
