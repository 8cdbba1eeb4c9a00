"""Products of 8-bit floats in training, by torchao.

Knows nothing of optimizers or loops.
"""

from torch import nn

from ..config.settings import MachineSettings
from ..model.attention import WAYS
from ..model.gpt import GPT


def multiply_in_float8(model: nn.Module, *, emulate: bool = False) -> None:
    """Let the linear layers of the blocks multiply in 8-bit floats, by torchao; the weights stay.

    Each product finds the scale of its whole tensors as it runs. The head, whose loss is computed
    in parts, stays in bf16. `emulate` computes what an older device would, slowly.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError("dtype fp8 needs an extra: pip install 'gptsmith[fp8]'") from error
    blocks = [module for name, module in model.named_children() if name == "h"]
    for block in blocks:
        convert_to_float8_training(block, config=Float8LinearConfig(emulate=emulate))


def prepare_model(model: GPT, settings: MachineSettings) -> None:
    """Let a model compute as the (chosen) settings say; its weights stay."""
    model.attend_by(WAYS[settings.attention])
    if settings.dtype == "fp8":
        multiply_in_float8(model)
