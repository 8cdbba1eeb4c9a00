"""The verb that writes a model in another format: export. `import` shares some of its helps."""

import json
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from ..config.fields import REQUIRED, Bytes, setting
from ..config.settings import BASE_HELP
from ..convert.formats import DTYPES, WRITABLE
from ..machine.dtypes import dtype_named
from ..machine.environment import return_freed_memory
from .flags import Parser, add_flags, chosen
from .opening import MODEL_HELP

DtypeName = Annotated[str, partial(dtype_named, known=DTYPES)]
DTYPE_HELP = "number format of the weights (default: as stored)"
SHARD_HELP = "maximum size of a weights file in a Hugging Face folder, as 5GB (default: one file)"


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What to write."""

    to: str = setting(REQUIRED, f"one of {', '.join(WRITABLE)}", metavar="FORMAT")
    approximate: bool = setting(
        False, "if the format cannot express the model exactly, write the nearest one that it can"
    )
    dtype: DtypeName | None = setting(
        None, f"{DTYPE_HELP}; q8_0 is for gguf", metavar="|".join(DTYPES)
    )
    shard_size: Bytes | None = setting(None, SHARD_HELP)
    base: str | None = setting(None, BASE_HELP, metavar="MODEL")
    json: bool = setting(False, "write the report as JSON")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith export`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("out", metavar="OUT", help="new file or folder")
    add_flags(parser, ExportSettings)


def run(options: Namespace) -> None:
    """Write a model in the format of another tool."""
    settings = chosen(options, ExportSettings)
    from ..convert.carry import export_model

    return_freed_memory()
    report = export_model(
        options.model,
        Path(options.out),
        to=settings.to,
        approximate=settings.approximate,
        dtype=settings.dtype,
        shard_bytes=settings.shard_size,
        base=settings.base,
    )
    print(json.dumps(report.to_json(), indent=2) if settings.json else report)
