"""The verb that measures a model's loss on a text: evaluate."""

import json
from argparse import Namespace
from dataclasses import dataclass

from ..config.fields import REQUIRED, at_least, setting
from ..config.settings import InferenceSettings, PrepareSettings, Split
from .evaluate_memorization import (
    add_memorization_flags,
    evaluate_memorization,
    wants_memorization,
)
from .flags import Parser, add_flags, chosen
from .opening import DATA_HELP, MODEL_HELP, open_model


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What to evaluate on."""

    data: str = setting(REQUIRED, f"what to evaluate on: {DATA_HELP}", metavar="DATA")
    split: Split | None = setting(
        None, "split of prepared data (default: validation); a text is evaluated whole"
    )
    tokens: int | None = setting(None, "evaluate on the first N tokens only")
    context_length: int | None = setting(None, "tokens per window (default: the model's context)")
    json: bool = setting(False, "write JSON")

    def __post_init__(self) -> None:
        at_least(self, 2, "tokens")
        at_least(self, 1, "context_length")


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith evaluate`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_flags(parser, EvaluateSettings)
    add_memorization_flags(parser)
    add_flags(parser, PrepareSettings, without=("deduplicate", "shard_tokens"))
    add_flags(parser, InferenceSettings, without=("compile",))


def run(options: Namespace) -> None:
    """Measure the loss of a model on a text."""
    settings, text = chosen(options, EvaluateSettings), chosen(options, PrepareSettings)
    if wants_memorization(options, EvaluateSettings):
        evaluate_memorization(options, options.model, settings.data, settings.json)
        return
    from ..evaluation.heldout import evaluate

    _, model, tokenizer = open_model(options, options.model)
    found = evaluate(
        model,
        tokenizer,
        settings.data,
        split=settings.split,
        tokens=settings.tokens,
        context_length=settings.context_length,
        text=text,
    )
    names = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")
    figures = {name: getattr(found, name) for name in names}
    print(json.dumps(figures) if settings.json else found)
