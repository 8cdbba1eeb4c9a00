"""The command that generates text: sample."""

import json
import os
from argparse import Namespace
from typing import Any, Literal

from ..config.recipe import convert, updated
from ..config.settings import MachineSettings, SamplingSettings
from ..machine.environment import use_huge_pages
from ..machine.terminal import tell
from .flags import Parser, add_flags, given
from .opening import MODEL_HELP, open_model

COMPILE_HELP = (
    "on a CPU, a step in C++ for each token, compiled once for a machine in some seconds; auto "
    "does without where there is no compiler (default: auto)"
)


def add_sample(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to continue; repeatable: several are continued in one batch",
    )
    parser.add_argument(
        "--max-tokens", default="200", metavar="N", help="most tokens (default: 200)"
    )
    parser.add_argument("--seed", metavar="S", help="the same seed gives the same text")
    parser.add_argument(
        "--num-samples", default="1", metavar="N", help="texts for each prompt (default: 1)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this; repeatable"
    )
    parser.add_argument(
        "--draft",
        metavar="text|MODEL",
        help="guess tokens from the text or by a smaller model: the same output, fewer passes",
    )
    parser.add_argument("--json", action="store_true", help="write JSON")
    add_flags(parser, SamplingSettings)
    parser.add_argument("--compile", metavar="auto|yes|no", default="auto", help=COMPILE_HELP)
    add_flags(parser, MachineSettings, without=("compile", "micro_batch", "deterministic"))


def sample(options: Namespace) -> None:
    """Let a model write."""
    sampling = updated(SamplingSettings(), given(options, SamplingSettings), "sample")
    counts = {
        name: convert(name, getattr(options, name), int) for name in ("max_tokens", "num_samples")
    }
    if counts["max_tokens"] < 0 or counts["num_samples"] < 1:
        raise ValueError("max_tokens must be at least 0, and num_samples at least 1")
    seed = convert("seed", options.seed, int | None)
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
    elif seed < 0:
        raise ValueError(f"seed is {seed}: at least 0 is needed")

    convert("compile", options.compile, Literal["auto", "yes", "no"])
    use_huge_pages()
    prompts = options.prompt or [""]
    single = len(prompts) == counts["num_samples"] == 1 and not options.json
    if options.draft is not None and not single:
        raise ValueError(
            "a draft is for one text at a time: take one --prompt, no --num-samples and no --json"
        )

    model, tokenizer = open_model(options, options.model)
    from ..generation.compiled import open_decoder
    from ..generation.writing import generate, stream

    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.json, so it cannot read or write text")
    if options.seed is None:
        tell(f"seed {seed}")
    wanted: dict[str, Any] = {"seed": seed, "stop": options.stop, "sampling": sampling}
    wanted |= {"decoder": open_decoder(model, options.compile)}
    if single:
        wanted |= {"max_tokens": counts["max_tokens"], "draft": open_draft(options, tokenizer)}
        pieces = stream(model, tokenizer, prompts[0], **wanted)
        first = next(pieces, "")  # what cannot be done is said before anything is written
        print(prompts[0] + first, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    texts = generate(model, tokenizer, prompts, **counts, **wanted)
    rows = [
        {"seed": seed + i, "prompt": prompts[i // counts["num_samples"]], "text": text}
        for i, text in enumerate(texts)
    ]
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    print("\n---\n".join(row["prompt"] + row["text"] for row in rows))


def open_draft(options: Namespace, tokenizer: Any) -> Any:
    """What guesses for the model: its own text, a model with the same tokenizer, or nothing."""
    if options.draft is None:
        return None
    from ..generation.drafts import FromModel, FromText

    if options.draft == "text":
        return FromText()
    model, other = open_model(options, options.draft)
    if other is None or other.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{options.draft} has another tokenizer than {options.model}: no draft for it"
        )
    return FromModel(model)
