"""The command that measures: bench, of training, of generation, also against transformers, and of
serving."""

import json
import tempfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from ..checkpoint.described import described_config
from ..config.fields import suggestion
from ..config.model import PRESETS, GPTConfig
from ..config.recipe import parse_value, types_of
from ..config.settings import Dtype, LoadSettings, MachineSettings, TrainingSettings
from ..machine.environment import use_huge_pages
from ..machine.terminal import tell
from .flags import Parser, add_flags, chosen, given
from .load import bench_serve
from .opening import dtype_to_use
from .turns import flag

AGAINST = {"transformers": False, "transformers-compiled": True}  # whether its step is compiled
ROWS, ROUNDS = "1,8", 3  # of a table; rounds where something is compared


def arguments(parser: Parser) -> None:
    """What may follow `gptsmith bench`."""
    parser.add_argument("what", choices=("train", "generate", "serve"), help="what to measure")
    parser.add_argument(
        "model",
        metavar="MODEL|PRESET|RECIPE|URL",
        help=f"presets: {', '.join(PRESETS)}; serve: a model, which is served for as long, or the "
        "address of a server that runs",
    )
    parser.add_argument("--steps", default="10", metavar="N", help="steps timed (default: 10)")
    parser.add_argument(
        "--rows",
        metavar="N[,N]",
        help="rows at once (train: default 4; generate: default 1,8, one number alone for a "
        "single measurement)",
    )
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        help="generate: default 32, and 1024 for prefill, or what the context holds; serve: "
        "default 32",
    )
    parser.add_argument(
        "--max-tokens",
        metavar="N",
        help="generate and serve: default 128, or what the context holds",
    )
    parser.add_argument(
        "--against",
        metavar="|".join(AGAINST),
        action="append",
        default=[],
        help="generate: measure these too, in turn, on the same weights; repeatable",
    )
    parser.add_argument(
        "--rounds", metavar="N", help="generate: measure so often (default: 3 with --against)"
    )
    parser.add_argument("--optimizer", metavar="adamw|muon", help="train: default adamw")
    parser.add_argument(
        "--profile", action="store_true", help="train: where the time goes, by part of the model"
    )
    parser.add_argument("--json", action="store_true", help="write JSON")
    parser.add_argument(
        "--dtype",
        dest="dtypes",
        metavar="|".join(get_args(Dtype)),
        action="append",
        default=[],
        help="precision of matrix products (generate: default float32; several with commas)",
    )
    serving = parser.add_argument_group("of serve")
    add_flags(serving, LoadSettings, without=("prompt_tokens", "max_tokens"))
    serving.add_argument("--slots", metavar="N", help="texts served at once (a model's)")
    serving.add_argument("--api-key", metavar="KEY", help="its key (default: GPTSMITH_API_KEY)")
    add_flags(parser, MachineSettings, without=("dtype", "micro_batch", "deterministic"))


def run(options: Namespace) -> None:
    """Measure tokens per second, step time or waiting times, and peak memory."""
    if options.what == "serve":
        refuse(options, "train", "profile", "optimizer")
        refuse(options, "generate", "rows", "against", "rounds")
        bench_serve(options)
        return
    refuse(options, "serve", "clients", "seconds", "seed", "slots", "api_key")
    config, title, folder = described_config(options.model)
    machines = chosen_machines(options, folder)
    rows = counts("rows", options.rows)
    if options.what == "train":
        refuse(options, "generate", "against", "rounds")
        if len(machines) > 1 or len(rows) > 1:
            raise ValueError("bench train measures one dtype and number of rows at a time")
        found = measure_training(options, config, machines[0], *rows)
    else:
        refuse(options, "train", "profile", "optimizer")
        if len(rows) != 1 or len(machines) > 1 or options.against or options.rounds:
            show_table(options, config, title, folder, machines)
            return
        found = measure_generation(options, config, folder, machines[0], *rows)
    if options.json:
        print(json.dumps({"model": title, **found}))
        return
    show_figures(f"{options.what}: {title}", found)


def refuse(options: Namespace, right: str, *names: str) -> None:
    """ValueError where flags were given that are only of `bench RIGHT`."""
    if asked := [flag(name) for name in names if getattr(options, name, None)]:
        kind = {"train": "training", "generate": "generation", "serve": "serving"}[right]
        raise ValueError(f"{' and '.join(asked)} are of {kind}: say 'bench {right}'")


def counts(name: str, text: str | None) -> list[int]:
    """The numbers of a list with commas; none where there is no list."""
    return [] if text is None else [count(name, word) for word in text.split(",")]


def count(name: str, text: str) -> int:
    """A number of something; ValueError where it is below 1."""
    found = parse_value(name, text, int)
    if found < 1:
        raise ValueError(f"{name} is {found}: at least 1 is needed")
    return found


def chosen_machines(options: Namespace, folder: Path | None) -> list[MachineSettings]:
    """The settings of the machine, once for each dtype that is asked for."""
    words = [word for words in options.dtypes for word in words.split(",")]
    machine = chosen(options, MachineSettings)
    if options.what == "generate":
        words = [dtype_to_use(word, folder, machine.device) for word in words or [None]]
    dtypes = dict.fromkeys(words or [machine.dtype])
    return [replace(machine, dtype=parse_value("dtype", dtype, Dtype)) for dtype in dtypes]


# -- one measurement, in this process


def measure_training(
    options: Namespace, config: GPTConfig, machine: MachineSettings, rows: int = 4
) -> dict[str, Any]:
    """The figures of training, with the profile where it is asked for."""
    from .profile import profile_train
    from .timing import bench_train

    hint = types_of(TrainingSettings)["optimizer"]
    optimizer = parse_value("optimizer", options.optimizer or "adamw", hint)
    steps = count("steps", options.steps)
    measure = profile_train if options.profile else bench_train
    return measure(config, machine, rows=rows, steps=steps, optimizer=optimizer)


def measure_generation(
    options: Namespace,
    config: GPTConfig,
    folder: Path | None,
    machine: MachineSettings,
    rows: int,
) -> dict[str, Any]:
    """The figures of generation; the new tokens with those that are for programs."""
    use_huge_pages()
    from .timing import bench_generate

    prompt_tokens, max_tokens = asked_tokens(options, config)
    found = bench_generate(
        config,
        machine,
        rows=rows,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        folder=folder,
    )
    return found if options.json else without_tokens(found)


def asked_tokens(options: Namespace, config: GPTConfig) -> tuple[int, int]:
    """Prompt and new tokens, as asked for or as fit."""
    from .timing import fitting

    asked = {name: getattr(options, name) for name in ("prompt_tokens", "max_tokens")}
    prompt, new = (None if text is None else count(name, text) for name, text in asked.items())
    return fitting(config, prompt, new)


def show_figures(title: str, found: dict[str, Any]) -> None:
    """Print what one measurement found."""
    profile = found.pop("profile", None)
    width = max(map(len, found))
    print(title)
    for name, value in found.items():
        shown = f"{value:,.4g}" if isinstance(value, float) and value < 1000 else value
        shown = f"{value:,.0f}" if isinstance(value, int | float) and value >= 1000 else shown
        print(f"  {name.replace('_', ' '):<{width}}  {shown}")
    if profile is not None:
        from .profile import render

        print()
        print(render(profile))


# -- a table, of processes that take turns


def show_table(
    options: Namespace,
    config: GPTConfig,
    title: str,
    folder: Path | None,
    machines: Sequence[MachineSettings],
) -> None:
    """Measure every dtype and number of rows, by us and by whom we are compared with."""
    against = list(dict.fromkeys(name for names in options.against for name in names.split(",")))
    check_installed(against)
    from ..machine.devices import choose
    from .comparison import LONG_PROMPT, lines, measures, render
    from .turns import in_turn

    machines = [choose(each) for each in machines]
    rows = counts("rows", options.rows or ROWS)
    prompt, new = asked_tokens(options, config)
    if new < 2:
        raise ValueError("max_tokens is 1, which is no decoding: at least 2 are needed")
    long = min(LONG_PROMPT, config.context_length) if options.prompt_tokens is None else prompt
    wanted = [each for m in machines for each in measures(m.dtype, rows, prompt, new, long)]
    rounds = ROUNDS if against else 1
    if options.rounds is not None:
        rounds = count("rounds", options.rounds)
    with tempfile.TemporaryDirectory() as scratch:
        systems = contestants(options, config, folder, machines, against, Path(scratch))
        cases = list(dict.fromkeys(each.case for each in wanted))
        found = list(in_turn(systems, cases, rounds, tell))
    table = lines(wanted, found)
    first = without_tokens(found[0].figures)
    if options.json:
        measured = [
            {"round": m.round, "system": m.system, **vars(m.case), **without_tokens(m.figures)}
            for m in found
        ]
        # Where scripts look for the figures of one measurement, there are the first one's.
        whole = {"table": [asdict(line) for line in table], "measurements": measured}
        print(json.dumps({"model": title, **first, "rounds": rounds, **whole}))
        return
    print(f"generate: {title}, {first['parameters']:,} parameters, greedy, {prompt} + {new} tokens")
    print(f"on {first['device']}, {first['threads']} threads, rounds: {rounds}\n")
    print(render(table))


def check_installed(against: Sequence[str]) -> None:
    """Raise where one is unknown, or not installed."""
    for name in against:
        if name not in AGAINST:
            known = " or ".join(AGAINST)
            raise ValueError(f"against is '{name}'{suggestion(name, AGAINST)}: {known} is needed")
        if find_spec("transformers") is None:
            raise ImportError(f"--against {name} needs a package: pip install transformers")


def contestants(
    options: Namespace,
    config: GPTConfig,
    folder: Path | None,
    machines: Sequence[MachineSettings],
    against: Sequence[str],
    scratch: Path,
) -> list[Any]:
    """Ourselves, and the others on the same weights, which go to `scratch` if they are nowhere."""
    from .turns import ourselves, somebody_else

    same: dict[str, Any] = {"device": machines[0].device, "threads": machines[0].threads}
    model = options.model
    if against:
        from ..checkpoint.saved import save
        from .peers import DTYPES
        from .timing import varied_model

        if folder is None:
            folder = scratch / "model"
            save(varied_model(config), None, folder)
        model = str(folder)
        if left := [machine.dtype for machine in machines if machine.dtype not in DTYPES]:
            tell(f"note: {' and '.join(against)} not measured in {', '.join(left)}")
    program = ("-m", "gptsmith.cli.peers")
    return [
        ourselves("gptsmith", model, given(options, MachineSettings) | same),
        *(
            somebody_else(
                name, tuple(DTYPES), *program, folder=model, compiled=AGAINST[name], **same
            )
            for name in against
        ),
    ]


def without_tokens(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Figures without the tokens that were generated."""
    return {name: value for name, value in figures.items() if name != "tokens"}
