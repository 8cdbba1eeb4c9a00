"""Which matrices of a quantized model are packed, with how many bits and in which shapes.

Knows nothing of tensors or files.

Letters:  M rows (outputs)    C columns (inputs)    N words of a row in one lane    W lanes
"""

from .cost import Shape, components
from .model import GPTConfig

BITS = (4, 8)
VOCABULARY_BITS = 8  # of token embedding and head, whose rounding changes the logits directly
WORD_BITS = 32


def lanes(columns: int) -> int:
    """Return the number of lanes, each with a scale of its own, for a row of `columns` columns.

    A lane takes 8 to 64 columns. A multiple of 16 lanes suits the widest vector registers, a
    multiple of 8 the others; of equally suitable numbers, the smallest is best.
    """
    if columns % 8:
        raise ValueError(f"a matrix has {columns} columns: a multiple of 8 is needed to pack it")
    eighth = columns // 8
    possible = [W for W in range(1, eighth + 1) if eighth % W == 0 and columns <= 64 * W]
    return min(possible, key=lambda W: (W % 16 != 0, W % 8 != 0, W))


def packed_shapes(shape: Shape, bits: int) -> tuple[Shape, Shape]:
    """The shapes of words (M, N, W) and scales (M, W) for a matrix (M, C)."""
    (M, C), W = shape, lanes(shape[1])
    return (M, C * bits // WORD_BITS // W, W), (M, W)


def check_bits(bits: object) -> int:
    """Return the number of bits; ValueError unless it is 8 or 4."""
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits is {bits!r}: 8 or 4 is needed")
    return bits


def packed_matrices(config: GPTConfig, bits: int) -> dict[str, int]:
    """Return the modules whose matrix is packed, with the bits of each.

    Position embeddings are few, so they stay unpacked; a tied head shares the packed embedding.
    ValueError if the model's sizes do not allow packing.
    """
    check_bits(bits)
    for name, size in {"n_embd": config.n_embd, "n_inner": config.mlp_size}.items():
        if size % 8:
            raise ValueError(f"{name} is {size}: a multiple of 8 is needed to quantize a model")
    return {
        part.name.removesuffix(".weight"): bits if part.name.startswith("h.") else VOCABULARY_BITS
        for part in components(config)
        if len(part.shape) == 2 and part.count and part.name != "wpe.weight"
    }
