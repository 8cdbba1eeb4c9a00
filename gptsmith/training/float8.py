"""Training with 8-bit floating-point matrix products, by torchao.

Knows nothing of optimizers or loops.
"""

from torch import nn

from ..config.settings import MachineSettings
from ..model.attention import WAYS
from ..model.gpt import GPT


def multiply_in_float8(model: nn.Module, *, emulate: bool = False) -> None:
    """Compute the matrix products of the blocks' linear layers in float8; the weights stay.

    Every product scales its two tensors by their current maxima (tensorwise, dynamic scaling). The
    head, whose loss is computed in chunks, stays in bf16. `emulate` runs on devices without float8,
    slowly. ImportError where torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError("dtype fp8 needs an extra: pip install 'gptsmith[fp8]'") from error
    blocks = [module for name, module in model.named_children() if name == "h"]
    for block in blocks:
        convert_to_float8_training(block, config=Float8LinearConfig(emulate=emulate))


def prepare_model(model: GPT, settings: MachineSettings) -> None:
    """Set a model's attention function and matrix products as the settings say; weights stay."""
    model.attend_by(WAYS[settings.attention])
    if settings.dtype == "fp8":
        multiply_in_float8(model)
