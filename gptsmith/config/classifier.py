"""What a classifier is: a GPT-2 whose head scores labels instead of the next token.

Knows nothing of tensors, files or training; standard library only.
"""

from dataclasses import dataclass, fields
from typing import Any

from .model import GPTConfig


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(GPTConfig):
    """A GPT-2 with a head of one row per label; the label's number is its place in `labels`.

    `pad_token_id` is the token that fills rows up to the longest of a batch. None, as in folders of
    other tools, means that no token does. ValueError for the modern block, and for labels that are
    not at least two different texts.
    """

    tie_weights: bool = False
    labels: tuple[str, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        super().__post_init__()
        if self.modern:
            raise ValueError(
                "a classifier has GPT-2's block, as its Hugging Face class has no other: the "
                "modern block cannot be one"
            )
        if self.tie_weights:
            raise ValueError("a classifier's head cannot be tied to the embedding")
        if len(self.labels) < 2 or len({*self.labels}) < len(self.labels):
            raise ValueError(
                f"the labels are {list(self.labels)}: at least two different ones are needed"
            )
        pad, V = self.pad_token_id, self.vocab_size
        if pad is not None and not (type(pad) is int and 0 <= pad < V):
            raise ValueError(f"pad_token_id is {pad!r}: 0 to {V - 1}, or null, is needed")

    @property
    def head_rows(self) -> int:
        """Rows of the head: one for each label."""
        return len(self.labels)

    @classmethod
    def of(
        cls, config: GPTConfig, labels: tuple[str, ...], pad_token_id: int | None
    ) -> "ClassifierConfig":
        """Return the classifier with a model's blocks and embeddings."""
        return cls(**_shared(config), labels=labels, pad_token_id=pad_token_id)

    def body(self) -> GPTConfig:
        """Return the configuration of a model that writes, with the same blocks and embeddings."""
        return GPTConfig(**_shared(self), tie_weights=True)


def _shared(config: GPTConfig) -> dict[str, Any]:
    """Return the fields that a classifier shares with a model that writes."""
    names = [field.name for field in fields(GPTConfig) if field.name != "tie_weights"]
    return {name: getattr(config, name) for name in names}


def without_labels(config: GPTConfig) -> GPTConfig:
    """Return a model's configuration as settings have it: the labels are the data's."""
    return config.body() if isinstance(config, ClassifierConfig) else config


def check_writes(config: GPTConfig, place: object) -> None:
    """Raise ValueError if a model is a classifier, where one that writes text is needed."""
    if isinstance(config, ClassifierConfig):
        raise ValueError(
            f"{place} is a classifier, which labels texts and does not write: use `gptsmith "
            "classify` or `gptsmith serve`, or a model that writes"
        )
