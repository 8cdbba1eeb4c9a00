"""What a person can choose about learning from examples (fine-tuning).

Knows nothing of how examples are read or learned; standard library only.
"""

import re
from collections.abc import Mapping, Sequence
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
# Settings that have a meaning for some tasks only.
ONLY_FOR: dict[str, Sequence[Task]] = {
    "template": ("chat", "preference"),
    "columns": [*EXAMPLE_KINDS],
    "test_fraction": [*EXAMPLE_KINDS],
    "batch_rows": [*EXAMPLE_KINDS],
    "epochs": [*EXAMPLE_KINDS],
    "beta": ("preference",),
    "batch_tokens": ("text",),
    "deduplicate": ("text",),
    # The loss of a few labels is now almost nothing and now several nats, which is no spike.
    "on_spike": ("text", "chat", "preference"),
    "rollback_rate": ("text", "chat", "preference"),
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
        "how a prompt is written: alpaca, plain (nothing is added), completion (as plain, without "
        "earlier exchanges), fixed-length (as completion, but no end of an answer is learned, as "
        "all are of one length) or a file with a chat template in Jinja; auto takes the model's "
        "own, else completion for a prompt with its completion, alpaca for others",
        metavar="alpaca|plain|completion|fixed-length|FILE",
    )
    columns: str | None = setting(None, COLUMNS_HELP, metavar="A,B")
    test_fraction: float | None = setting(
        None,
        "fraction of the examples kept for a test at the end (default: 0.2 for labels, else 0.1)",
    )
    batch_rows: int = setting(8, "examples per optimizer step, over all processes")
    epochs: float | None = setting(None, "passes over the examples to learn from; sets the steps")
    lora: int | None = setting(
        None,
        "rank of low-rank adapters, which learn in place of the weights; the default learning rate "
        "is then ten times as high",
        metavar="RANK",
    )
    lora_alpha: float | None = setting(
        None, "scale of the adapters, which is divided by their rank (default: twice the rank)"
    )
    lora_dropout: float = setting(0.0, "dropout probability of the adapters' input")
    lora_targets: str = setting(
        LORA_TARGETS,
        "layers of each block that get an adapter, separated by commas",
        metavar="NAMES",
    )
    freeze: str | None = setting(
        None,
        "train only the last N blocks, the final norm and the head",
        metavar="all-but-last-N",
    )
    prefix_weight: float = setting(
        0.0,
        "classify: share of the loss that is of the beginnings of texts, which have the label too",
    )
    beta: float = setting(
        0.1, "preference: how strongly the model is kept near the one it started from (DPO's beta)"
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


def check_meaning(task: Task, chosen: Mapping[str, object]) -> None:
    """Raise SettingError for a setting that was chosen, by name, but would have no effect."""
    for name, tasks in ONLY_FOR.items():
        if name in chosen and task not in tasks:
            effect = f"has no effect on the task {task}, only on {listed(tasks)}"
            raise SettingError(name, f"{effect}: leave it out")
    for name in ("lora_alpha", "lora_dropout", "lora_targets"):
        if name in chosen and chosen.get("lora") is None:
            raise SettingError(name, "has no effect without adapters: add lora 16")
    if chosen.get("epochs") is not None and "steps" in chosen:
        raise SettingError("steps", "cannot go with epochs, which set the steps: leave it out")


def listed(names: Sequence[str]) -> str:
    """Return names as a sentence lists them, as in "chat, classify and preference"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
