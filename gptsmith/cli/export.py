"""The command that writes a model in another format: export; and what import shares with it."""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..machine.environment import return_freed_memory
from .flags import Parser
from .opening import MODEL_HELP

# As in the table of convert/formats.py, which takes longer to import than help may take.
READABLE = "huggingface, nanogpt, book, llmc, gguf, tensorflow"
WRITABLE = "huggingface, nanogpt, book, llmc, gguf, onnx"

# Every word that somebody has for a number format, and ours.
DTYPES = {
    **dict.fromkeys(("float32", "f32", "fp32"), "float32"),
    **dict.fromkeys(("fp16", "float16", "f16"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16"), "bf16"),
    "q8_0": "q8_0",
}
SCALES = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def add_export(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="the new file or folder")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"one of {WRITABLE}")
    parser.add_argument(
        "--approximate",
        action="store_true",
        help="write what is nearest to what FORMAT cannot say",
    )
    add_common(parser, "float32|fp16|bf16|q8_0")


def add_common(parser: Parser, dtypes: str) -> None:
    parser.add_argument("--dtype", metavar=dtypes, help="number format (default: as stored)")
    parser.add_argument(
        "--shard-size", metavar="SIZE", help="cut a Hugging Face folder's weights, as in 5GB"
    )
    parser.add_argument("--json", action="store_true", help="write the report as JSON")


def export(options: Namespace) -> None:
    """Write a model in the format of another tool."""
    from ..convert import export_model

    return_freed_memory()
    wanted = {"to": options.to, "approximate": options.approximate}
    show(export_model(options.model, Path(options.out), **wanted, **choices(options)), options)


def choices(options: Namespace) -> dict[str, Any]:
    """What both commands let a user choose."""
    dtype = None
    if options.dtype is not None:
        if options.dtype.lower() not in DTYPES:
            known = ", ".join(dict.fromkeys(DTYPES.values()))
            raise ValueError(f"dtype is '{options.dtype}': one of {known} is needed")
        dtype = DTYPES[options.dtype.lower()]
    return {"dtype": dtype, "shard_bytes": byte_count(options.shard_size)}


def byte_count(text: str | None) -> int | None:
    """The number of bytes that a text such as "5GB" means."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in SCALES or float(match[1]) == 0:
        raise ValueError(f"shard_size is '{text}': a size such as 500MB or 5GB is needed")
    return int(float(match[1]) * SCALES[match[2].upper()])


def show(report: Any, options: Namespace) -> None:
    """Write the report of a conversion."""
    print(json.dumps(report.to_json(), indent=2) if options.json else report)
