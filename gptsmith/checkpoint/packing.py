"""The tensors that a quantized model's folder must contain, and the check that it does.

Works on names, shapes and number formats. Knows nothing of tensors or files themselves.
"""

from collections.abc import Mapping

from ..config.cost import Shape, components
from ..config.model import GPTConfig
from ..config.quantization import packed_matrices, packed_shapes
from ..machine.dtypes import NUMBER_FORMATS, STORED, dtype_of_bits
from .names import TensorInfo, TensorMatch, check_layers, check_shapes, full_name


def expected_tensors(config: GPTConfig, bits: int) -> dict[str, tuple[Shape, tuple[str, ...]]]:
    """Return shape and possible number formats of each tensor in a quantized model's folder."""
    matrices, expected = packed_matrices(config, bits), dict[str, tuple[Shape, tuple[str, ...]]]()
    for part in components(config):
        module = part.name.removesuffix(".weight")
        if module in matrices:
            words, scales = packed_shapes(part.shape, matrices[module])
            dtype = dtype_of_bits(matrices[module])
            expected[full_name(f"{module}.words")] = words, (dtype,)
            expected[full_name(f"{module}.scales")] = scales, ("bf16",)
        elif part.count:
            expected[full_name(part.name)] = part.shape, STORED
    return expected


def match_packed(
    folder: object, config: GPTConfig, bits: int, found: Mapping[str, TensorInfo]
) -> TensorMatch:
    """Match the tensors of a folder; ValueError if they are not the expected ones."""
    blocks, says = [full_name(f"h.{{}}.{part}") for part in ("attn", "mlp")], "config.json"
    check_layers(blocks, config, found, folder, says)
    expected = expected_tensors(config, bits)
    shapes = {name: shape for name, (shape, _) in expected.items()}
    check_shapes(
        shapes,
        {name: tensor.shape for name, tensor in found.items()},
        source=folder,
        kind="quantized model",
        says=says,
        note=f" ({bits} bits)",
    )
    for name, (_, dtypes) in expected.items():
        words = [NUMBER_FORMATS[dtype].header for dtype in dtypes]
        if (got := found[name].dtype) not in words:
            raise ValueError(
                f"{folder}: {name} is of type {got}, but {' or '.join(words)} is needed"
            )
    return TensorMatch(read=shapes)
