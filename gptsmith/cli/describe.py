"""The verb that shows a model's parameters, shapes, memory and FLOPs: describe."""

import json
import re
from argparse import Namespace
from dataclasses import dataclass
from typing import Literal

from ..checkpoint.described import describe
from ..config.fields import Bytes, SettingError, at_least, setting
from ..config.fitting import Devices
from ..config.model import PRESETS
from ..config.settings import BASE_HELP
from .flags import Parser, add_flags, chosen


@dataclass(frozen=True, kw_only=True)
class DescribeSettings:
    """What to show."""

    trace: str | None = setting(
        None, "run a forward pass of B rows of T tokens, and show every shape", metavar="BxT"
    )
    lora: int | None = setting(
        None, "also show what learning adapters of this rank would cost", metavar="RANK"
    )
    base: str | None = setting(None, BASE_HELP, metavar="MODEL")
    devices: int | None = setting(
        None, "also show the memory that training needs on each of N devices", metavar="N"
    )
    memory: Bytes | None = setting(
        None, "memory of each device, as 80GB, for the largest micro-batch (one device by default)"
    )
    dtype: Literal["float32", "bf16"] | None = setting(
        None, "precision of matrix products on these devices; bf16 unless given"
    )
    json: bool = setting(False, "write JSON")

    def __post_init__(self) -> None:
        at_least(self, 1, "lora", "devices")
        if self.dtype is not None and self.fleet is None:
            raise SettingError(
                "dtype", "has no effect on its own: add --devices 8 or --memory 80GB"
            )

    @property
    def fleet(self) -> Devices | None:
        """The devices to train on, if they were asked about."""
        if self.devices is None and self.memory is None:
            return None
        return Devices(count=self.devices or 1, memory=self.memory, dtype=self.dtype or "bf16")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith describe`."""
    what = f"a model, a recipe, or a preset: {', '.join(PRESETS)}"
    parser.add_argument("what", metavar="MODEL|PRESET|RECIPE", help=what)
    add_flags(parser, DescribeSettings)


def run(options: Namespace) -> None:
    """Show every component of a model: shapes, parameters, memory, FLOPs."""
    settings = chosen(options, DescribeSettings)
    description = describe(
        options.what, lora=settings.lora, base=settings.base, devices=settings.fleet
    )
    values = description.to_json()
    trace = None
    if settings.trace is not None:
        from ..model.trace import render
        from ..model.trace import trace as run_trace

        trace = list(run_trace(description.config, *parse_shape(settings.trace)))
        values["trace"] = [line.to_json() for line in trace]
    if settings.json:
        print(json.dumps(values, indent=2))
        return
    print(description)
    if trace is not None:
        print()
        print(render(trace))


def parse_shape(text: str) -> tuple[int, int]:
    """Parse the shape of a batch: "2x4", 2 rows of 4 tokens, is (2, 4)."""
    if not re.fullmatch(r"[1-9][0-9]*x[1-9][0-9]*", text):
        raise ValueError(f"--trace is '{text}': BxT is needed, as 2x4 for 2 rows of 4 tokens")
    batch, tokens = text.split("x")
    return int(batch), int(tokens)
