"""How fast GPT-2 generates on this machine: gptsmith and its peers, from one run.

    python benchmarks/generate.py --preset gpt2 --rounds 3 --out TABLE.md
    python benchmarks/generate.py --preset toy --rounds 1 --out TABLE.md    a small model

All have the same random weights, prompts, threads and environment, decode greedily, and take turns;
each measurement is a process of its own. The peers are transformers, CTranslate2 (`pip install
ctranslate2`) and llama.cpp (`pip install xllamacpp gguf`); what is not installed is listed as such.
TABLE.md gets the medians and ranges, TABLE.json every measurement.

What the words mean: *decode* is what comes after the first token; *memory* is the most that was
resident of the process, Python, libraries and mapped files included; the *bound* is how often a
second the machine can read the weights of the blocks and the head, scales of int8 and int4 and the
keys and values left out; a *ratio* is compiled gptsmith's speed divided by this system's, the
median over the rounds.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

from peers import CTRANSLATE2_TYPES, LLAMA_TYPES, write_ctranslate2, write_ggufs

from gptsmith.checkpoint import saved
from gptsmith.cli.comparison import Spread, by_round, first_difference, paired_ratio, three_digits
from gptsmith.cli.timing import fitting, varied_model
from gptsmith.cli.turns import Case, Figures, Measurement, System, in_turn, ourselves, somebody_else
from gptsmith.config import cost
from gptsmith.config.model import PRESETS, GPTConfig
from gptsmith.config.settings import Dtype
from gptsmith.machine import environment
from gptsmith.machine.files import write_json
from gptsmith.tokenizers import byte_tokenizer, gpt2_tokenizer

# n_embd is whole blocks of 32, as llama.cpp's numbers of few bits need it.
TOY = GPTConfig(vocab_size=257, context_length=64, n_layer=2, n_head=4, n_embd=64)
CONFIGS = {"toy": TOY} | {name: PRESETS[name] for name in PRESETS if name.startswith("gpt2")}
BYTES = {"float32": 4, "bf16": 2, "int8": 1, "int4": 0.5}  # of a number
OURS = "gptsmith, compiled"
PACKAGES = {
    "transformers": ("transformers",),
    "CTranslate2": ("ctranslate2", "transformers"),
    "llama.cpp": ("xllamacpp", "gguf"),
}
PROGRAM = (str(Path(__file__).with_name("peers.py").resolve()),)
SUMMED = 100_000_000  # numbers in float32, far more than any cache holds


# -- who takes part


def contestants(config: GPTConfig, scratch: Path, threads: int) -> dict[str, System | str]:
    """Every system by name, or what is missing for it; writes the files that they read."""
    model = scratch / "model"
    tokenizer = gpt2_tokenizer() if config.vocab_size >= 50257 else byte_tokenizer()
    saved.save(varied_model(config), tokenizer, model)
    words = tuple(dtype for dtype in BYTES if dtype in get_args(Dtype))
    found: dict[str, System | str] = {}
    for name, compile in ((OURS, "yes"), ("gptsmith, plain", "no")):
        machine = {"device": "cpu", "threads": threads, "compile": compile}
        found[name] = replace(ourselves(name, str(model), machine), dtypes=words)
        for dtype in BYTES:
            if dtype not in words:
                found[f"{name}, {dtype}"] = "not in this version"
    transformers = {"folder": str(model), "device": "cpu", "threads": threads}
    program = ("-m", "gptsmith.cli.peers")
    rest = {"threads": threads, "scratch": str(scratch)}
    others = [
        somebody_else(
            "transformers", ("float32", "bf16"), *program, compiled=False, **transformers
        ),
        somebody_else("transformers, compiled", ("bf16",), *program, compiled=True, **transformers),
        somebody_else(
            "transformers, dynamic int8", ("int8",), *PROGRAM, who="transformers_int8", **rest
        ),
        somebody_else("CTranslate2", CTRANSLATE2_TYPES, *PROGRAM, who="ctranslate2", **rest),
        somebody_else("llama.cpp", tuple(LLAMA_TYPES), *PROGRAM, who="llama_cpp", **rest),
    ]
    for system in others:
        needed = PACKAGES[system.name.split(",")[0]]
        missing = [package for package in needed if find_spec(package) is None]
        found[system.name] = f"not installed: {', '.join(missing)}" if missing else system
    if not isinstance(found["CTranslate2"], str):
        write_ctranslate2(model, scratch)
    if not isinstance(found["llama.cpp"], str):
        write_ggufs(model, scratch)
    return found


# -- the table


def table(
    found: Sequence[Measurement], cases: Sequence[Case], bounds: dict[str, float]
) -> list[str]:
    """The lines of a Markdown table: a row for each system in each number format."""
    *decodes, prefill = [case for case in cases if case.dtype == cases[0].dtype]
    heads = ["", "system", *(f"decode, {case.rows_text}" for case in decodes), "of the bound"]
    heads += [f"prefill of {prefill.prompt_tokens:,}", "first token, ms", "memory, MB"]
    heads += [f"ratio, {case.rows_text}" for case in decodes] + ["same tokens"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for dtype in dict.fromkeys(case.dtype for case in cases):
        *decodes, prefill = [case for case in cases if case.dtype == dtype]
        for system in dict.fromkeys(each.system for each in found if each.case.dtype == dtype):
            cells = row(found, system, decodes, prefill, bounds[dtype])
            lines.append(f"| {' | '.join([dtype, system, *cells])} |")
    return lines


def row(
    found: Sequence[Measurement],
    system: str,
    decodes: Sequence[Case],
    prefill: Case,
    bound: float,
) -> list[str]:
    """The cells of one system in one number format."""
    speed, measured = "decode_tokens_per_second", [*decodes, prefill]
    rounds = {case: by_round(found, system, case) for case in measured}
    failed = [f["error"] for figures in rounds.values() for f in figures if "error" in f]
    if failed:
        return [f"failed: {failed[0]}"]

    def spread(case: Case, figure: str) -> Spread:
        return Spread.of([figures[figure] for figures in rounds[case]])

    ratios, same = [], "-"
    for case in decodes:
        ours = by_round(found, OURS, case)
        known = system != OURS and ours and not any("error" in figures for figures in ours)
        pair = ([f[speed] for f in figures] for figures in (ours, rounds[case]))
        ratios.append(str(paired_ratio(*pair)) if known else "-")
        if known and case == decodes[0]:
            place = first_difference(ours[0]["tokens"], rounds[case][0]["tokens"])
            same = "yes" if place is None else f"differ from token {place}"
    alone = decodes[0]
    return [
        *(str(spread(case, speed)) for case in decodes),
        f"{spread(alone, speed).median / bound / alone.rows:.0%}",
        str(spread(prefill, "prefill_tokens_per_second")),
        str(spread(alone, "first_token_milliseconds")),
        three_digits(spread(alone, "peak_memory_megabytes").median),
        *ratios,
        same,
    ]


def report(
    options: argparse.Namespace,
    machines: Sequence[Figures],
    missing: dict[str, str],
    found: Sequence[Measurement],
    cases: Sequence[Case],
) -> str:
    """The whole report, in Markdown."""
    config = CONFIGS[options.preset]
    rates = {name: Spread.of([each[name] for each in machines]) for name in machines[0]}
    memory = rates["gigabytes_per_second"].highest * 1e9
    read = cost.multiplied_parameters(config)
    bounds = {dtype: memory / (read * bytes) for dtype, bytes in BYTES.items()}
    decode = cases[0]
    return "\n".join(
        [
            f"{options.preset}, {cost.parameter_count(config):,} parameters, random weights; "
            f"prompt {decode.prompt_tokens}, {decode.max_tokens} new tokens, greedy; tokens/s; "
            f"{options.threads} threads; rounds: {options.rounds}, medians and ranges.",
            "",
            *table(found, cases, bounds),
            *(f"\n{name}: {why}" for name, why in missing.items()),
            "",
            f"The machine, before and after: it reads {rates['gigabytes_per_second']} GB/s, and "
            f"multiplies {rates['float32_gigaflops']} GFLOP/s in float32, "
            f"{rates['bf16_gigaflops']} in bf16. Reading {read:,} weights at its best bounds one "
            "row to "
            + ", ".join(f"{three_digits(bounds[dtype])} ({dtype})" for dtype in bounds)
            + " tokens/s.",
            "",
            "; ".join(f"{name} {version(name)}" for name in installed()),
            "",
        ]
    )


def installed() -> list[str]:
    """The packages that took part."""
    packages = {package for needed in PACKAGES.values() for package in needed}
    return ["torch", *sorted(package for package in packages if find_spec(package))]


# -- the run


def with_failures(system: System) -> System:
    """A system whose failure is a figure too, rather than the end of the run."""

    def measure(case: Case) -> Figures:
        try:
            return system.measure(case)
        except ValueError as error:
            return {"error": str(error)}

    return replace(system, measure=measure)


def run(options: argparse.Namespace) -> None:
    """Measure all, and write the report."""
    config = CONFIGS[options.preset]
    prompt, new = fitting(config, None, None)
    new = min(new, config.context_length - prompt)  # llama.cpp reads the last token too
    long = config.context_length - max(1, config.context_length // 64)  # and wants room behind it
    asked = [(count, prompt, new) for count in options.rows] + [(1, long, 1)]
    cases = [
        Case(dtype=dtype, rows=count, prompt_tokens=prompt, max_tokens=new)
        for dtype in options.dtypes
        for count, prompt, new in asked
    ]
    question = {"who": "machine", "threads": options.threads, "summed": options.summed}
    rates = somebody_else("machine", ("float32",), *PROGRAM, **question)
    with tempfile.TemporaryDirectory() as scratch:
        everyone = contestants(config, Path(scratch), options.threads)
        chosen = {n: s for n, s in everyone.items() if not options.only or n in options.only}
        systems = [with_failures(s) for s in chosen.values() if isinstance(s, System)]
        missing = {name: why for name, why in chosen.items() if isinstance(why, str)}
        machines = [rates.measure(cases[0])]
        found = list(in_turn(systems, cases, options.rounds, lambda line: print(line, flush=True)))
        machines.append(rates.measure(cases[0]))
    measured = [{"round": m.round, "system": m.system, **vars(m.case), **m.figures} for m in found]
    packages = {name: version(name) for name in installed()}
    whole = {"machine": machines, "missing": missing, "packages": packages}
    write_json(options.out.with_suffix(".json"), {**whole, "measurements": measured})
    text = report(options, machines, missing, found, cases)
    options.out.write_text(text)
    print(f"\n{text}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=CONFIGS, default="gpt2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="a Markdown file, and a .json")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtypes", nargs="+", choices=BYTES, default=list(BYTES))
    parser.add_argument("--only", nargs="+", metavar="SYSTEM", help="as the table calls them")
    parser.add_argument("--threads", type=int, default=environment.cores())
    parser.add_argument("--summed", type=int, default=SUMMED, help="numbers of the memory test")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
