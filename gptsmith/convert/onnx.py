"""How does a model run without PyTorch? As graphs that onnxruntime and its kin carry out.

A folder: `model.onnx` takes tokens to logits, `model_with_past.onnx` also continues keys and values
that the caller keeps, and both share the numbers of `weights.bin`. Written, never read: a graph
says what is computed, not which model it is. Knows nothing of what is in a graph.

Shapes:  B batch    T tokens    D channels per head    V vocabulary
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.names import OURS
from ..checkpoint.saved import write_description
from ..checkpoint.tensors import Entry, Stored, to_theirs
from ..config.model import GPTConfig
from ..model.modern import rotation_at
from .onnx_graph import FLOAT, ROTATION, Graph, gpt

MODEL, MODEL_WITH_PAST, WEIGHTS = "model.onnx", "model_with_past.onnx", "weights.bin"

# The first set of operators with Gelu, and the file format that came with it: both of ONNX 1.15.
OPERATORS, FORMAT = 20, 9
INT64, FLOAT16 = 7, 10  # ONNX's numbers for formats of numbers: TensorProto.DataType
ELEMENTS = {"float32": FLOAT, "fp16": FLOAT16}
PAGE = 4096  # bytes; where a tensor should begin, so that it can be mapped (ONNX's ExternalData.md)


# -- writing


def nearest(config: GPTConfig) -> GPTConfig:
    """The model itself: a graph can say all of it."""
    return config


def write(stored: Stored, out: Path, dtype: str) -> None:
    """Two graphs, their weights, config.json and the tokenizer, into a folder that exists.

    With "fp16" the weights are halved on disk; every step still computes in float32.
    """
    if dtype not in ELEMENTS:
        raise ValueError(f"ONNX weights in {dtype} are not written: choose float32 or fp16")
    config, weights = stored.config, entries(stored, dtype)
    offsets = offsets_of(weights)
    for name, cached in ((MODEL, False), (MODEL_WITH_PAST, True)):
        graph = gpt(config, {entry.name: entry for entry in weights}, cached)
        (out / name).write_bytes(serialized(graph, config, offsets, cached))
    with (out / WEIGHTS).open("wb") as file:
        for entry, offset in zip(weights, offsets, strict=True):
            file.seek(offset)
            file.write(entry.read())
    write_description(stored, out)


def entries(stored: Stored, dtype: str) -> list[Entry]:
    """The tensors of `weights.bin`, under our names; a tied head is the embedding."""
    config = stored.config
    found = to_theirs(OURS, config, stored.fetch, dtype)
    if config.modern:
        P, D = config.context_length, config.head_size
        table = partial(rotation_at, torch.arange(P), D)
        found.append(Entry(ROTATION, (2, P, 1, D // 2), "float32", table))
    return found


def offsets_of(weights: Sequence[Entry]) -> list[int]:
    """Where each tensor begins: on the first page after the one before."""
    pages = [-(-entry.bytes // PAGE) for entry in weights]
    return [PAGE * page for page in accumulate(pages[:-1], initial=0)]


def serialized(graph: Graph, config: GPTConfig, offsets: Sequence[int], cached: bool) -> bytes:
    """The bytes of a `.onnx` file, which says of each weight only where it lies."""
    try:
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise ImportError("ONNX needs an extra: pip install 'gptsmith[onnx]'") from error
    nodes = [
        helper.make_node(node.operator, node.inputs, node.outputs, node.name, **node.attributes)
        for node in graph.nodes
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in graph.numbers.items()]
    tensors += map(elsewhere, graph.weights.values(), offsets)
    proto = helper.make_graph(nodes, "gpt", *doors(config, cached), tensors)
    operators = [helper.make_opsetid("", OPERATORS)]
    made = helper.make_model(
        proto, opset_imports=operators, ir_version=FORMAT, producer_name="gptsmith"
    )
    return made.SerializeToString()


def elsewhere(entry: Entry, offset: int) -> Any:
    """A tensor whose numbers lie in `weights.bin`."""
    from onnx import TensorProto

    tensor = TensorProto(name=entry.name, dims=entry.shape, data_type=ELEMENTS[entry.dtype])
    tensor.data_location = TensorProto.EXTERNAL
    told = {"location": WEIGHTS, "offset": str(offset), "length": str(entry.bytes)}
    for key, value in told.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def doors(config: GPTConfig, cached: bool) -> tuple[list[Any], list[Any]]:
    """What goes in and what comes out, named as optimum and transformers.js name it."""
    from onnx.helper import make_tensor_value_info as door

    inputs = [door("input_ids", INT64, ("batch", "tokens"))]
    outputs = [door("logits", FLOAT, ("batch", "tokens", config.vocab_size))]
    G, D = config.kv_heads, config.head_size
    for layer in range(config.n_layer if cached else 0):
        for part in ("key", "value"):
            before, after = ("batch", G, "past", D), ("batch", G, "past + tokens", D)
            inputs.append(door(f"past_key_values.{layer}.{part}", FLOAT, before))
            outputs.append(door(f"present.{layer}.{part}", FLOAT, after))
    return inputs, outputs


# -- running


def run(folder: Path, tokens: Tensor) -> Tensor:
    """The logits that onnxruntime finds with a folder's `model.onnx`.  (B, T) -> (B, T, V)

    ValueError where it refuses: a damaged folder, or tokens that the model does not take.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("onnxruntime is an extra: pip install 'gptsmith[onnx]'") from error
    path, options = folder / MODEL, onnxruntime.SessionOptions()
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MODEL}")
    options.log_severity_level = 4  # what is wrong it raises; it need not say it too
    # For one pass it is quicker, and holds less, to use the weights where they are mapped.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        (logits,) = session.run(["logits"], {"input_ids": tokens.cpu().long().numpy()})
    except Exception as error:  # its errors have no other class in common
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: onnxruntime refuses: {said}") from error
    return torch.from_numpy(logits)
