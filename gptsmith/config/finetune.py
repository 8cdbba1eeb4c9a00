"""What a person can choose about learning from examples (fine-tuning).

Knows nothing of how examples are read or learned; standard library only.
"""

import re
from dataclasses import dataclass
from typing import Literal

from .fields import SettingError, above, at_least, setting, within

Task = Literal["text", "chat", "classify", "preference"]
ExampleKind = Literal["chat", "classify", "preference"]  # what a row of data is an example of
# The examples that each task learns from; text is none.
EXAMPLE_KINDS: dict[Task, ExampleKind] = {
    "chat": "chat",
    "classify": "classify",
    "preference": "preference",
}
COLUMNS_HELP = "names of the columns of a .csv or .tsv file that has no header"
LORA_TARGETS = "attn.c_attn,attn.c_proj,mlp.c_fc,mlp.c_proj"


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """How a model learns from examples."""

    task: Task | None = setting(
        None,
        "text: more text; chat: answers to prompts; classify: labels of texts; preference: the "
        "better of two answers (default: what the fields of the data say)",
    )
    template: str = setting(
        "auto",
        "how a prompt is written: alpaca, plain (nothing is added) or a file with a chat template "
        "in Jinja; auto takes the model's own, else alpaca, or plain for prompts with completions",
        metavar="alpaca|plain|FILE",
    )
    columns: str | None = setting(None, COLUMNS_HELP, metavar="A,B")
    test_fraction: float | None = setting(
        None,
        "fraction of the examples kept for a test at the end (default: 0.2 for labels, else 0.1)",
    )
    batch_rows: int = setting(8, "examples per optimizer step, over all processes")
    epochs: float | None = setting(None, "times that every example is learned; sets the steps")
    lora: int | None = setting(
        None, "learn low-rank adapters of this rank in place of the weights", metavar="RANK"
    )
    lora_alpha: float | None = setting(
        None, "adapters are multiplied by this over their rank (default: twice the rank)"
    )
    lora_dropout: float = setting(0.0, "dropout of what enters an adapter")
    lora_targets: str = setting(
        LORA_TARGETS, "layers of a block that get an adapter, with commas", metavar="NAMES"
    )
    freeze: str | None = setting(
        None,
        "all-but-last-N: only the last N blocks, the final norm and the head learn",
        metavar="all-but-last-N",
    )
    prefix_weight: float = setting(
        0.0,
        "classify: share of the loss that is of the beginnings of texts, which have the label too",
    )
    beta: float = setting(
        0.1, "preference: how strongly the model is held to the one it started from"
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_rows", "lora")
        above(self, 0, "epochs", "lora_alpha", "beta")
        within(self, 0, 1, "test_fraction", "lora_dropout", "prefix_weight")
        if self.freeze is not None and not re.fullmatch(r"all-but-last-\d+", self.freeze):
            raise SettingError("freeze", f"is '{self.freeze}': all-but-last-N is needed")
        known = LORA_TARGETS.split(",")
        for name in self.lora_targets.split(","):
            if name not in known:
                raise SettingError(
                    "lora_targets", f"has '{name}': some of {LORA_TARGETS} are needed"
                )

    @property
    def example_kind(self) -> ExampleKind | None:
        """What the task learns from; None for text, or if the data says the task."""
        return None if self.task is None else EXAMPLE_KINDS.get(self.task)

    @property
    def header(self) -> list[str] | None:
        """The names in `columns`."""
        return self.columns.split(",") if self.columns else None

    @property
    def lora_scale(self) -> float:
        """What adapters are multiplied by; 2 unless `lora_alpha` says otherwise."""
        return 2.0 if self.lora_alpha is None else self.lora_alpha / (self.lora or 1)
