"""ONNX folders, which onnxruntime and similar libraries run without PyTorch.

`model.onnx` maps tokens to logits, with a KV cache and a mask for padding as optimum expects them;
its weights are in `weights.bin`. The folder is written but never read: a graph does not say which
model it computes. Knows nothing of a graph's contents (`onnx_graph.py`).

Shapes:  B batch    T tokens    V vocabulary
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.names import OURS
from ..checkpoint.saving import write_description
from ..checkpoint.tensors import Entry, Stored, to_theirs
from ..config.model import GPTConfig
from ..model.modern import rotation_at
from .onnx_graph import FLOAT, ROTATION, Graph, gpt

MODEL, WEIGHTS = "model.onnx", "weights.bin"

# The first operator set with Gelu, and its file format: both of ONNX 1.15.
OPERATORS, FORMAT = 20, 9
INT64, FLOAT16 = 7, 10  # from TensorProto.DataType
ELEMENTS = {"float32": FLOAT, "fp16": FLOAT16}
PAGE = 4096  # bytes; tensors start at pages, so that they can be mapped (ONNX's ExternalData.md)


# -- writing


def nearest(config: GPTConfig) -> GPTConfig:
    """Return the model itself: a graph can express all of it."""
    return config


def write(stored: Stored, out: Path, dtype: str) -> None:
    """Write the graph, its weights, config.json and the tokenizer into an existing folder.

    With "fp16" the weights take half the space on disk; all computation stays in float32.
    """
    if dtype not in ELEMENTS:
        raise ValueError(f"ONNX weights cannot be written in {dtype}: choose float32 or fp16")
    config, weights = stored.config, entries(stored, dtype)
    offsets = offsets_of(weights)
    graph = gpt(config, {entry.name: entry for entry in weights})
    (out / MODEL).write_bytes(serialized(graph, config, offsets))
    with (out / WEIGHTS).open("wb") as file:
        for entry, offset in zip(weights, offsets, strict=True):
            file.seek(offset)
            file.write(entry.read())
    write_description(stored, out)


def entries(stored: Stored, dtype: str) -> list[Entry]:
    """Return the tensors of `weights.bin`, with our names; a tied head is not repeated."""
    config = stored.config
    found = to_theirs(OURS, config, stored.fetch, dtype)
    if config.modern:
        P, D = config.context_length, config.head_size
        table = partial(rotation_at, torch.arange(P), D)
        found.append(Entry(ROTATION, (2, P, 1, D // 2), "float32", table))
    return found


def offsets_of(weights: Sequence[Entry]) -> list[int]:
    """Return the offset of each tensor: the first page after the previous tensor."""
    pages = [-(-entry.bytes // PAGE) for entry in weights]
    return [PAGE * page for page in accumulate(pages[:-1], initial=0)]


def serialized(graph: Graph, config: GPTConfig, offsets: Sequence[int]) -> bytes:
    """Return the bytes of the `.onnx` file, which refers to the weights by their offsets."""
    try:
        from onnx import helper, numpy_helper
    except ImportError as error:
        raise ImportError("ONNX needs an extra: pip install 'gptsmith[onnx]'") from error
    nodes = [
        helper.make_node(node.operator, node.inputs, node.outputs, node.name, **node.attributes)
        for node in graph.nodes
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in graph.numbers.items()]
    tensors += map(external_tensor, graph.weights.values(), offsets)
    proto = helper.make_graph(nodes, "gpt", *inputs_and_outputs(config), tensors)
    operators = [helper.make_opsetid("", OPERATORS)]
    made = helper.make_model(
        proto, opset_imports=operators, ir_version=FORMAT, producer_name="gptsmith"
    )
    return made.SerializeToString()


def external_tensor(entry: Entry, offset: int) -> Any:
    """Return a reference to a tensor in `weights.bin`."""
    from onnx import TensorProto

    tensor = TensorProto(name=entry.name, dims=entry.shape, data_type=ELEMENTS[entry.dtype])
    tensor.data_location = TensorProto.EXTERNAL
    place = {"location": WEIGHTS, "offset": str(offset), "length": str(entry.bytes)}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def inputs_and_outputs(config: GPTConfig) -> tuple[list[Any], list[Any]]:
    """Return the inputs and outputs, with the names of optimum and transformers.js."""
    from onnx.helper import make_tensor_value_info as value_info

    inputs = [
        value_info("input_ids", INT64, ("batch", "tokens")),
        value_info("attention_mask", INT64, ("batch", "past + tokens")),
        value_info("position_ids", INT64, ("batch", "tokens")),
    ]
    outputs = [value_info("logits", FLOAT, ("batch", "tokens", config.vocab_size))]
    G, D = config.kv_heads, config.head_size
    for layer in range(config.n_layer):
        for part in ("key", "value"):
            before, after = ("batch", G, "past", D), ("batch", G, "past + tokens", D)
            inputs.append(value_info(f"past_key_values.{layer}.{part}", FLOAT, before))
            outputs.append(value_info(f"present.{layer}.{part}", FLOAT, after))
    return inputs, outputs


# -- running


def run(folder: Path, tokens: Tensor) -> Tensor:
    """Compute logits with onnxruntime and a folder's `model.onnx`.  (B, T) -> (B, T, V)

    ValueError if onnxruntime refuses: the folder is damaged, or the tokens do not suit the model.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError("onnxruntime is an extra: pip install 'gptsmith[onnx]'") from error
    path, options = folder / MODEL, onnxruntime.SessionOptions()
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {MODEL}")
    options.log_severity_level = 4  # it raises its errors, so it need not print them
    # For one pass, using the mapped weights directly is faster and needs less memory.
    options.add_session_config_entry("session.disable_prepacking", "1")
    B, T = tokens.shape
    given = {
        "input_ids": tokens.cpu().long(),
        "attention_mask": torch.ones(B, T, dtype=torch.long),
        "position_ids": torch.arange(T).repeat(B, 1),
    }
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for cache in session.get_inputs()[len(given) :]:
            _, heads, _, channels = cache.shape
            given[cache.name] = torch.zeros(B, heads, 0, channels)
        arrays = {name: tensor.numpy() for name, tensor in given.items()}
        (logits,) = session.run(["logits"], arrays)
    except Exception as error:  # its errors have no other class in common
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: onnxruntime refuses: {reason}") from error
    return torch.from_numpy(logits)
