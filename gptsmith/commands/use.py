"""The commands that use a model: sample, evaluate and plot."""

import json
import os
import tempfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ..flags import Parser, add_flags, given
from ..folder import find_model, read_bits
from ..recipe import convert, updated
from ..runtime import use_huge_pages
from ..settings import MachineSettings, PrepareSettings, SamplingSettings
from .words import DATA_HELP, MODEL_HELP, tell

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
    from ..decode import open_decoder
    from ..generate import complete, stream

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
    texts = complete(model, tokenizer, prompts, **counts, **wanted)
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
    from ..drafts import FromModel, FromText

    if options.draft == "text":
        return FromText()
    model, other = open_model(options, options.draft)
    if other is None or other.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{options.draft} has another tokenizer than {options.model}: no draft for it"
        )
    return FromModel(model)


def open_model(options: Namespace, name: str) -> Any:
    """The model and tokenizer that MODEL means, on the machine that the flags ask for."""
    return open_folder(options, name)[1:]


def open_folder(options: Namespace, name: str) -> Any:
    """The folder that MODEL means, verified, with its model and tokenizer as `open_model`."""
    # Verifying a model's files and importing PyTorch take a second each: at once, on two cores.
    with ThreadPoolExecutor(max_workers=1) as aside:
        found = aside.submit(find_model, name)
        from .. import devices
        from ..checkpoint import load_folder

        folder = found.result()
    machine = choose_to_use(options, folder)
    device = devices.prepare_machine(machine)
    model, tokenizer = load_folder(folder, **devices.loading(machine.dtype, device))
    devices.prepare_model(model, machine)
    return folder, model, tokenizer


def choose_to_use(options: Namespace, folder: Path) -> MachineSettings:
    """The machine that the flags ask for, to use the model in a folder."""
    from .. import devices

    wanted = given(options, MachineSettings)
    machine = updated(MachineSettings(), wanted, "machine")
    word = machine.dtype if "dtype" in wanted else None
    return devices.choose(replace(machine, dtype=dtype_to_use(word, folder, machine.device)))


def dtype_to_use(word: Any, folder: Path | None, device: str) -> Any:
    """The precision that a word means where a model is used.

    Without a word it is float32, or a quantized folder's own; "auto" is the fastest that keeps the
    loss of a model that there is.
    """
    if word not in (None, "auto"):
        return word
    from .. import devices

    bits = None if folder is None else read_bits(folder)
    if bits is not None:
        return devices.dtype_of_bits(bits)
    if word is None or folder is None:
        return "float32"
    return told_fastest(folder, devices.find_device(device))


def told_fastest(folder: Path, device: Any) -> Any:
    """The precision that suits the model and device, which is said."""
    from ..precision import KEEPS_LOSS, fastest

    dtype, kl, times = fastest(folder, device)
    if dtype == "float32":
        tell(f"dtype float32: nothing faster stays within {KEEPS_LOSS} nats of it on average")
    elif device.type == "cpu":
        tell(
            f"dtype {dtype}: {kl:.2g} nats from float32 on average, below {KEEPS_LOSS}, and "
            f"{times:.1f} times as fast"
        )
    return dtype


def add_evaluate(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--data", required=True, metavar="DATA", help=DATA_HELP)
    parser.add_argument(
        "--split",
        choices=("train", "validation"),
        help="of prepared data (default: validation); a source is evaluated whole",
    )
    parser.add_argument("--tokens", metavar="N", help="only the first N tokens")
    parser.add_argument("--context-length", metavar="T", help="window (default: the model's)")
    parser.add_argument("--json", action="store_true", help="write JSON")
    add_flags(parser, PrepareSettings, without=("validation_fraction", "shard_tokens"))
    add_flags(parser, MachineSettings, without=("compile", "micro_batch", "deterministic"))


def evaluate(options: Namespace) -> None:
    """Measure the loss of a model on a text."""
    from ..evaluate import evaluate

    tokens = convert("tokens", options.tokens, int | None)
    window = convert("context_length", options.context_length, int | None)
    model, tokenizer = open_model(options, options.model)
    if window is not None and not 1 <= window <= model.config.context_length:
        limit = model.config.context_length
        raise ValueError(f"context_length is {window}: 1 to the model's {limit} is needed")
    with tempfile.TemporaryDirectory() as temporary:
        found = evaluate(
            model,
            open_text(options, tokenizer, model.config, Path(temporary)),
            tokenizer=tokenizer,
            first_tokens=tokens,
            context_length=window,
        )
    values = {
        "loss": found.loss,
        "perplexity": found.perplexity,
        "bits_per_byte": found.bits_per_byte,
        "tokens": found.tokens,
        "bytes": found.bytes,
    }
    if options.json:
        print(json.dumps(values))
        return
    bits = "unknown" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"
    print(f"loss           {found.loss:.4f} nats per token")
    print(f"perplexity     {found.perplexity:.2f}")
    print(f"bits per byte  {bits}")
    print(f"tokens         {found.tokens:,}")


def open_text(options: Namespace, tokenizer: Any, config: Any, temporary: Path) -> Any:
    """The tokens that --data means, once they are known to suit the model."""
    from ..data.shards import is_dataset

    folder = Path(options.data)
    if not (folder.is_dir() and is_dataset(folder)):
        folder = prepare_whole(options, tokenizer, temporary / "data")
    return chosen_split(folder, options, tokenizer, config)


def prepare_whole(options: Namespace, tokenizer: Any, out: Path) -> Path:
    """Turn a source into tokens, none held out, for evaluating all of it."""
    from ..data.prepare import prepare

    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer, so it needs data that is prepared")
    if options.split == "validation":
        raise ValueError("--split is of prepared data: this is a source, evaluated whole")
    settings = updated(PrepareSettings(), given(options, PrepareSettings), "evaluate")
    settings = replace(settings, validation_fraction=0.0)
    for _ in prepare([options.data], tokenizer, out, options=settings):
        pass
    return out


def chosen_split(folder: Path, options: Namespace, tokenizer: Any, config: Any) -> Any:
    """The tokens of the split to evaluate, once they are known to suit the model."""
    from ..data.shards import Dataset

    dataset = Dataset.open(folder)
    if dataset.fingerprint is None or tokenizer is None:
        dataset.check_ids(config.vocab_size)
    elif dataset.fingerprint != tokenizer.fingerprint:
        raise ValueError(f"{options.data} was made with another tokenizer than {options.model} has")
    held_out = dataset.validation
    if options.split == "validation" and held_out is None:
        raise ValueError(f"{options.data} has no validation split: take --split train")
    return dataset.train if options.split == "train" or held_out is None else held_out


def add_plot(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", default="loss.png", metavar="FILE", help="default: loss.png")


def plot(options: Namespace) -> None:
    """Draw the loss curves of runs into one PNG."""
    from ..training.plot import draw_curves, read_metrics

    curves = {}
    for name in options.runs:
        path = Path(name) / "metrics.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{name} has no metrics.jsonl: it is not the folder of a run")
        label = Path(name).name if Path(name).name not in curves else name
        curves[label] = read_metrics(path)
    draw_curves(curves, Path(options.out))
    print(options.out)
