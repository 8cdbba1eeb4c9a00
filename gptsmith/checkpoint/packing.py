"""What a quantized model's folder holds: its tensors, and the section of config.json about them.

Names, shapes and JSON; knows nothing of tensors themselves, or of files.
"""

from collections.abc import Mapping
from typing import Any

from ..config.cost import Shape, components
from ..config.model import GPTConfig
from ..config.quantization import VOCABULARY_BITS, check_bits, packed_matrices, packed_shapes
from .config_json import to_hugging_face
from .names import Account, check_layers, full_name, same

MODEL_TYPE = "gptsmith-quantized"  # a name that nobody else takes for a model of theirs
FORMAT = 1


def expected_tensors(config: GPTConfig, bits: int) -> dict[str, Shape]:
    """Name and shape of every tensor in a quantized model's folder."""
    packed, shapes = packed_matrices(config, bits), dict[str, Shape]()
    for part in components(config):
        if not part.count:
            continue
        name = part.name.removesuffix(".weight")
        if name in packed:
            words, scales = packed_shapes(part.shape, packed[name])
            shapes |= {full_name(f"{name}.words"): words, full_name(f"{name}.scales"): scales}
        else:
            shapes[full_name(part.name)] = part.shape
    return shapes


# -- config.json


def to_json(config: GPTConfig, bits: int) -> dict[str, Any]:
    """The config.json of a quantized model: the original's, under a type of its own."""
    theirs = to_hugging_face(config)
    return {
        **theirs,
        "architectures": ["GptsmithQuantized"],
        "model_type": MODEL_TYPE,
        "quantization": {
            "format": FORMAT,
            "bits": bits,
            "vocabulary_bits": VOCABULARY_BITS,
            "model_type": theirs["model_type"],
        },
    }


def bits_in(theirs: Mapping[str, Any]) -> int | None:
    """The bits of the model that a config.json describes; None where it is not quantized."""
    return None if theirs.get("model_type") != MODEL_TYPE else check_bits(_section(theirs)["bits"])


def original_json(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the model that a quantized one was made from; any other as it is."""
    if theirs.get("model_type") != MODEL_TYPE:
        return dict(theirs)
    return {**theirs, "model_type": _section(theirs)["model_type"]}


def _section(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the quantization, once this version is known to understand it."""
    section = theirs.get("quantization")
    if not isinstance(section, dict) or not {"format", "bits", "model_type"} <= section.keys():
        raise ValueError(
            'config.json has no "quantization" with format, bits and model_type: it was edited'
        )
    if section["format"] != FORMAT:
        raise ValueError(
            f"the folder is of quantized format {section['format']!r}, but this version of "
            f"gptsmith reads format {FORMAT}: quantize the original again, or update gptsmith"
        )
    if section.get("vocabulary_bits") != VOCABULARY_BITS:
        got = section.get("vocabulary_bits")
        raise ValueError(f"config.json has vocabulary_bits {got!r}: {VOCABULARY_BITS} is needed")
    return section


# -- a folder's tensors


def check_tensors(
    place: object, config: GPTConfig, bits: int, found: Mapping[str, tuple[Shape, str]]
) -> Account:
    """What each tensor, of a shape and a type, is; ValueError where they are not those needed."""
    table = same(*(full_name(f"h.{{}}.{end}") for end in ("attn", "mlp")))
    check_layers(table, config, found, f"{place} has {{}} layers, but config.json calls for {{}}")
    expected = expected_tensors(config, bits)
    if lacking := [name for name in expected if name not in found]:
        raise ValueError(
            f"{place} lacks {len(lacking)} tensors of a quantized model, {lacking[0]} first"
        )
    if extra := sorted(found.keys() - expected.keys()):
        raise ValueError(
            f"{place} has {len(extra)} tensors no quantized model has, {extra[0]} first"
        )
    for name, shape in expected.items():
        got, dtype = found[name]
        if tuple(got) != shape:
            raise ValueError(
                f"{place}: {name} is {tuple(got)}, but config.json calls for {shape} ({bits} bits)"
            )
        if dtype not in (types := _types(name)):
            raise ValueError(f"{place}: {name} is of type {dtype}, but {' or '.join(types)} is due")
    return Account(read=expected)


def _types(name: str) -> tuple[str, ...]:
    """What a safetensors header may call the numbers of a tensor."""
    if name.endswith(".words"):
        return ("I32",)
    return ("BF16",) if name.endswith(".scales") else ("F32", "F16", "BF16")
