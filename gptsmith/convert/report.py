"""What a conversion did: which tensors were read, ignored, missing, and how the logits moved.

Knows nothing of formats or files; it is told.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from textwrap import wrap
from typing import Any

from ..checkpoint.names import Account
from ..config.cost import parameter_count
from ..config.model import GPTConfig

WIDTH, INDENT = 100, 13  # columns
NO_BREAK = "\u00a0"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A finished conversion; `str` is for people, `to_json` the whole of it."""

    source: str
    source_format: str
    target: str
    target_format: str
    dtype: str
    bytes: int
    config: GPTConfig  # of the model that was read
    account: Account
    lost: tuple[str, ...]  # what the target cannot say, in words
    padding: int  # rows of the vocabulary that stood for no token
    tokenizer: str
    difference: float  # largest, between the logits before and after
    original: str  # how the original itself was run, and what that gave

    def __str__(self) -> str:
        config = self.config
        numbers = sum(map(prod, self.account.read.values()))
        rows = [
            (
                "model",
                f"{parameter_count(config):,} parameters: {config.n_layer} layers, "
                f"{config.n_head} heads, {config.n_embd:,} channels, "
                f"context {config.context_length:,}, vocabulary {config.vocab_size:,}",
            ),
            ("read", f"{numbers:,} numbers in {len(self.account.read):,} tensors"),
            ("", grouped(self.account.read)),
            *(("ignored", line) for line in explained(self.account.ignored)),
            *(("missing", line) for line in explained(self.account.missing)),
        ]
        if self.padding:
            rows.append(("padding", f"{self.padding} rows beyond the vocabulary, left out"))
        rows += [("lost", words) for words in self.lost]
        rows += [
            ("tokenizer", self.tokenizer),
            ("logits", f"largest difference to those before: {self.difference:.2g}"),
            ("", self.original),
            ("written", f"{self.target}: {self.target_format}, {self.dtype}, {self.bytes:,} bytes"),
        ]
        lines = wrapped(row for row in rows if row[1])
        return "\n".join([f"{self.source}: {self.source_format}", *lines])

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, with every tensor by name."""
        return {
            "source": {"path": self.source, "format": self.source_format},
            "target": {
                "path": self.target,
                "format": self.target_format,
                "dtype": self.dtype,
                "bytes": self.bytes,
            },
            "parameters": parameter_count(self.config),
            "read": {name: list(shape) for name, shape in self.account.read.items()},
            "ignored": self.account.ignored,
            "missing": self.account.missing,
            "lost": list(self.lost),
            "padding": self.padding,
            "tokenizer": self.tokenizer,
            "largest_logit_difference": self.difference,
            "original": self.original,
        }


def grouped(names: Iterable[str]) -> str:
    """Names with the layer's number as *, each pattern once: "wte.weight, 12 h.*.ln_1.weight"."""
    patterns = Counter(re.sub(r"[0-9]+(?=[./])", "*", name, count=1) for name in names)
    return ", ".join(name if n == 1 else f"{n}{NO_BREAK}{name}" for name, n in patterns.items())


def explained(reasons: Mapping[str, str]) -> list[str]:
    """The names of one reason together, with the reason."""
    return [
        f"{why}: {grouped(name for name, reason in reasons.items() if reason == why)}"
        for why in dict.fromkeys(reasons.values())
    ]


def wrapped(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Rows of a name and words, in lines that fit a page."""
    lines = []
    for name, words in rows:
        first, *rest = wrap(words, WIDTH - INDENT, break_long_words=False) or [""]
        lines += [f"  {name:<{INDENT - 2}}{first}", *(" " * INDENT + line for line in rest)]
    return [line.replace(NO_BREAK, " ") for line in lines]
