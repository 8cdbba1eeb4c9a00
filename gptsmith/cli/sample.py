"""The verb that generates text: sample."""

import json
import os
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from ..config.fields import at_least, setting
from ..config.settings import InferenceSettings, SamplingSettings
from ..machine.environment import use_huge_pages
from ..machine.terminal import tell
from .flags import Parser, add_flags, chosen
from .opening import MODEL_HELP, open_model, open_writer


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What to generate."""

    prompt: tuple[str, ...] = setting(
        (), "text to continue; repeatable: several prompts are continued in one batch"
    )
    max_tokens: int = setting(200, "maximum number of new tokens")
    seed: int | None = setting(
        None,
        "random seed; the same seed gives the same text (default: a random one, which is shown)",
    )
    num_samples: int = setting(1, "number of texts for each prompt")
    stop: tuple[str, ...] = setting((), "end the text before this string; repeatable")
    draft: str | None = setting(
        None,
        "guess tokens from the text itself or with a smaller model: the same output in fewer "
        "forward passes",
        metavar="text|MODEL",
    )
    json: bool = setting(False, "write JSON")

    def __post_init__(self) -> None:
        at_least(self, 0, "max_tokens", "seed")
        at_least(self, 1, "num_samples")

    @property
    def single(self) -> bool:
        """Whether there is only one text, which can be shown while it is generated."""
        return len(self.prompt) <= 1 and self.num_samples == 1 and not self.json


def arguments(parser: Parser) -> None:
    """Add the arguments of `gptsmith sample`."""
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_flags(parser, SampleSettings)
    add_flags(parser, SamplingSettings)
    add_flags(parser, InferenceSettings)


def run(options: Namespace) -> None:
    """Generate text with a model."""
    settings, sampling = chosen(options, SampleSettings), chosen(options, SamplingSettings)
    if settings.draft is not None and not settings.single:
        raise ValueError(
            "--draft needs a single text: leave out --json and --num-samples, and give one --prompt"
        )
    use_huge_pages()
    _, model, tokenizer, decoder = open_writer(options, options.model)
    seed = settings.seed
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        tell(f"seed {seed}")
    wanted: dict[str, Any] = {
        "max_tokens": settings.max_tokens,
        "seed": seed,
        "stop": settings.stop,
        "sampling": sampling,
        "decoder": decoder,
    }
    prompts = settings.prompt or ("",)
    if settings.single:
        draft = open_draft(options, settings.draft, tokenizer)
        print_stream(model, tokenizer, prompts[0], draft=draft, **wanted)
        return
    from ..generation.writing import generate

    each = settings.num_samples
    texts = generate(model, tokenizer, prompts, num_samples=each, **wanted)
    rows: list[dict[str, Any]] = [
        {"seed": seed + i, "prompt": prompts[i // each], "text": text}
        for i, text in enumerate(texts)
    ]
    if settings.json:
        print(json.dumps(rows, indent=2))
    else:
        print("\n---\n".join(row["prompt"] + row["text"] for row in rows))


def print_stream(model: Any, tokenizer: Any, prompt: str, **wanted: Any) -> None:
    """Print a prompt and its continuation while it is generated."""
    from ..generation.writing import stream

    pieces = stream(model, tokenizer, prompt, **wanted)
    first = next(pieces, "")  # so that an error comes before any output
    print(prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def open_draft(options: Namespace, name: str | None, tokenizer: Any) -> Any:
    """Return the draft that guesses tokens: the text itself, or a model with the same tokenizer."""
    if name is None:
        return None
    from ..generation.drafts import FromModel, FromText

    if name == "text":
        return FromText()
    _, model, other = open_model(options, name)
    if other is None or other.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the draft {name} has another tokenizer than {options.model}: use a model with the "
            "same tokenizer"
        )
    return FromModel(model)
