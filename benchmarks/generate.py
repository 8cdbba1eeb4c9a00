"""How fast GPT-2 generates: gptsmith, transformers, CTranslate2 and llama.cpp, in turn.

    python benchmarks/generate.py gpt2                        on the CPU, in four number formats
    python benchmarks/generate.py gpt2 --systems "gptsmith, compiled" transformers --dtypes bf16
    python benchmarks/generate.py gpt2 --device cuda --dtypes bf16 --rows 1 8 64

All have the same weights (a preset has random ones), prompts, threads and environment, and decode
greedily. Each measurement is a process of its own. What is not installed is listed as such:
CTranslate2 needs `pip install ctranslate2`, llama.cpp `pip install xllamacpp gguf`.

The table is in Markdown: tokens per second, medians over the rounds and ranges. *Decode* is what
comes after the first token. The *bound* is how often a second the machine can read the weights of
the blocks and the head. *Memory* is the most that was resident of the process, Python, libraries
and mapped files included. A *ratio* is compiled gptsmith's speed divided by this system's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from results import Results, carry_out, over, parser, ratios
from torch import Tensor, nn

from gptsmith.checkpoint import opening, saving
from gptsmith.checkpoint.described import described_config
from gptsmith.cli.bench import rows_text
from gptsmith.cli.timing import (
    WARM_UP_TOKENS,
    alone,
    fitting,
    fresh_model,
    generation_figures,
    random_prompt,
)
from gptsmith.config import cost
from gptsmith.config.model import GPTConfig
from gptsmith.config.tables import three_digits
from gptsmith.convert import gguf
from gptsmith.machine import devices, environment
from gptsmith.machine.files import read_json, write_json
from gptsmith.model.gpt import GPT
from gptsmith.tokenizers import byte_tokenizer, gpt2_tokenizer

Figures = dict[str, Any]

BYTES = {"float32": 4, "bf16": 2, "int8": 1, "int4": 0.5}  # of a number
TORCH_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
LLAMA_DTYPES = {"float32": "float32", "bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
LLAMA_BATCH = 256  # positions; llama.cpp rounds its context up to these
SUMMED, MEMORY_RATE = 100_000_000, "gigabytes_per_second"  # float32 numbers, and what they give
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a system is asked for in a process of its own."""

    dtype: str
    rows: int
    prompt_tokens: int
    max_tokens: int

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens} + {self.max_tokens} tokens"
        return f"{self.dtype}, {rows_text(self.rows)}, {tokens}"


@dataclass(frozen=True)
class Place:
    """Where every system finds its files, and what it may use."""

    model: str  # a folder
    scratch: str  # a folder with the same model as other systems read it
    device: str
    threads: int


# -- the systems, each measured in a process of its own
#
# Shapes:  B rows    T prompt tokens


def prompt_of(case: Case, vocab_size: int) -> Tensor:
    """The prompts of a case, (B, T): the same for every system."""
    return random_prompt(vocab_size, case.rows, case.prompt_tokens)


def ours(case: Case, place: Place, *, compile: str) -> Figures:
    """`gptsmith bench generate`."""
    machine = {"device": place.device, "threads": place.threads, "compile": compile}
    return alone(place.model, machine | asdict(case))


def transformers(case: Case, place: Place, *, compiled: bool = False) -> Figures:
    """transformers as its own users call it, with the model in the wanted precision."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(place.threads)
    dtype = TORCH_DTYPES[case.dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(place.model, dtype=dtype)
    model = model.eval().to(place.device)
    prompt = prompt_of(case, model.config.vocab_size).to(place.device)
    return time_transformers(model, prompt, case.max_tokens, compiled=compiled)


def transformers_int8(case: Case, place: Place) -> Figures:
    """transformers with PyTorch's dynamic quantization of every linear layer."""
    from torch.ao.quantization import quantize_dynamic
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    torch.set_num_threads(place.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(place.model).eval()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, Conv1D):  # a linear layer that PyTorch does not know as one
                linear = nn.Linear(*child.weight.shape)
                linear.weight.data = child.weight.data.T.contiguous()
                linear.bias.data = child.bias.data
                setattr(module, name, linear)
    model = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    return time_transformers(model, prompt_of(case, model.config.vocab_size), case.max_tokens)


def time_transformers(
    model: Any, prompt: Tensor, max_tokens: int, *, compiled: bool = False
) -> Figures:
    """Time `generate` of a model of transformers: figures of (B, T), new tokens as lists.

    With its dynamic cache, or with its static one and the step compiled, the weights frozen into
    it; transformers never compiles the pass over the prompt.
    """
    from transformers import StoppingCriteria

    class Clock(StoppingCriteria):
        """Asked after each token whether to stop, it looks at the time."""

        def __init__(self) -> None:
            devices.synchronize(prompt.device)
            self.times = [time.perf_counter()]

        def __call__(self, tokens: Tensor, scores: Tensor, **more: Any) -> Tensor:
            devices.synchronize(tokens.device)
            self.times.append(time.perf_counter())
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

    B, T = prompt.shape
    # Without an end of text, so that every row is as long as was asked for.
    how: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if compiled:
        how |= static_cache(model, T + max_tokens)
    for count in (min(WARM_UP_TOKENS, max_tokens), max_tokens):
        if compiled:
            how["past_key_values"].reset()
        clock = Clock()
        given = {"attention_mask": torch.ones_like(prompt), "stopping_criteria": [clock]}
        tokens = model.generate(prompt, max_new_tokens=count, **given, **how)
    return {
        **generation_figures(clock.times, B, T),
        "peak_memory_megabytes": devices.peak_memory(prompt.device) / 1e6,
        "tokens": tokens[:, T:].tolist(),
    }


def static_cache(model: Any, length: int) -> dict[str, Any]:
    """What lets `generate` compile its step, on a CPU too; the cache is frozen in: reset it."""
    import torch._inductor.config
    from transformers import CompileConfig, StaticCache

    torch._inductor.config.freezing = True
    compile: Any = CompileConfig(mode="default")
    compile._compile_all_devices = True
    cache = StaticCache(config=model.config, max_cache_len=length)
    return {"past_key_values": cache, "compile_config": compile}


def ctranslate2(case: Case, place: Place) -> Figures:
    """CTranslate2; it tells of every token of every row."""
    import ctranslate2

    folder = Path(place.scratch, f"ctranslate2-{case.dtype}")
    settings = {"compute_type": case.dtype, "inter_threads": 1, "intra_threads": place.threads}
    generator = ctranslate2.Generator(str(folder), device="cpu", **settings)
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    words = [[vocabulary[id] for id in row] for row in prompt_of(case, len(vocabulary)).tolist()]
    for count in (min(WARM_UP_TOKENS, case.max_tokens), case.max_tokens):
        times = [time.perf_counter()] + [0.0] * count

        def note(step: Any, times: list[float] = times) -> bool:
            times[step.step + 1] = time.perf_counter()
            return False

        length = {"max_length": count, "min_length": count, "include_prompt_in_result": False}
        results = generator.generate_batch(words, sampling_topk=1, callback=note, **length)
    figures = generation_figures(times, case.rows, case.prompt_tokens)
    return {**figures, "tokens": [result.sequences_ids[0] for result in results]}


def llama_cpp(case: Case, place: Place) -> Figures:
    """llama.cpp's server with all rows in one request; the times are by its own clock."""
    import xllamacpp

    said = xllamacpp.CommonParams()
    said.model.path = str(Path(place.scratch, f"{LLAMA_DTYPES[case.dtype]}.gguf"))
    said.n_parallel = case.rows
    length = case.prompt_tokens + case.max_tokens
    said.n_ctx = case.rows * -(-length // LLAMA_BATCH) * LLAMA_BATCH
    said.cpuparams.n_threads = said.cpuparams_batch.n_threads = place.threads
    said.n_gpu_layers = said.cache_ram_mib = 0
    said.fit_params = False
    server = xllamacpp.Server(said)
    vocab_size = read_json(Path(place.model, "config.json"))["vocab_size"]
    question = {"prompt": prompt_of(case, vocab_size).tolist(), "cache_prompt": False}
    question |= {"temperature": 0, "samplers": ["temperature"], "ignore_eos": True}
    for count in (min(WARM_UP_TOKENS, case.max_tokens), case.max_tokens):
        question |= {"n_predict": count, "return_tokens": True}
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found = json.load(answer)
    rows = sorted(found if isinstance(found, list) else [found], key=lambda row: row["index"])
    if any(len(row["tokens"]) != count for row in rows):
        raise ValueError(f"llama.cpp wrote fewer than {count} tokens: its context was too small")
    first = max(row["timings"]["prompt_ms"] for row in rows)
    decode = max(row["timings"]["predicted_ms"] for row in rows)
    return {
        "prefill_tokens_per_second": 1000 * case.rows * case.prompt_tokens / first,
        "decode_tokens_per_second": 1000 * case.rows * (count - 1) / decode if count > 1 else None,
        "first_token_milliseconds": first,
        "tokens": [row["tokens"] for row in rows],
    }


def memory(case: Case, place: Place) -> Figures:
    """The machine itself: how fast it reads, found by adding up more numbers than a cache holds."""
    torch.set_num_threads(place.threads)
    numbers, seconds = torch.ones(SUMMED), []
    for _ in range(10):
        begin = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begin)
    return {MEMORY_RATE: 4 * SUMMED / min(seconds) / 1e9}


# -- the files that they read


def write_ctranslate2(place: Place) -> None:
    """The model as CTranslate2 reads it, in float32 and int8."""
    from ctranslate2.converters import TransformersConverter

    for dtype in SYSTEMS["CTranslate2"].dtypes:
        out = Path(place.scratch, f"ctranslate2-{dtype}")
        TransformersConverter(place.model).convert(str(out), quantization=dtype)
        words = read_json(out / "config.json")
        # Our tokenizers have no word for what is unknown, and CTranslate2 wants one.
        write_json(out / "config.json", words | {"unk_token": words["eos_token"]})


def write_ggufs(place: Place) -> None:
    """The model as llama.cpp reads it."""
    stored, scratch = opening.open_folder(Path(place.model)), Path(place.scratch)
    for dtype in ("float32", "bf16", "q8_0"):
        gguf.write(stored, scratch / f"{dtype}.gguf", dtype)
    write_q4_0(scratch / "float32.gguf", scratch / "q4_0.gguf")


def write_q4_0(source: Path, out: Path) -> None:
    """A GGUF file with its matrices in Q4_0, by llama.cpp's own Python package.

    The embedding and the head too, for which llama.cpp's program takes more bits: less to read.
    """
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

    reader, writer = GGUFReader(source), GGUFWriter(out, gguf.ARCHITECTURE)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            inside = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=inside)
    q4_0 = GGMLQuantizationType.Q4_0
    for tensor in reader.tensors:
        if len(tensor.shape) == 1 or tensor.name == "position_embd.weight":
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, quants.quantize(tensor.data, q4_0), raw_dtype=q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class System(NamedTuple):
    """Something that generates: what measures it, where it can, and what it needs."""

    measure: Callable[..., Figures]
    dtypes: tuple[str, ...]
    packages: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)
    prepare: Callable[[Place], None] = lambda place: None


OURS, MEMORY = "gptsmith, compiled", "the machine's memory"
ANYWHERE = ("cpu", "cuda", "mps")
SYSTEMS = {
    OURS: System(partial(ours, compile="yes"), tuple(BYTES), (), ANYWHERE),
    "gptsmith, plain": System(partial(ours, compile="no"), tuple(BYTES), (), ANYWHERE),
    "transformers": System(transformers, tuple(TORCH_DTYPES), ("transformers",), ANYWHERE),
    "transformers, compiled": System(
        partial(transformers, compiled=True), ("bf16",), ("transformers",), ANYWHERE
    ),
    "transformers, dynamic int8": System(transformers_int8, ("int8",), ("transformers",)),
    "CTranslate2": System(
        ctranslate2,
        ("float32", "int8"),
        ("ctranslate2", "transformers"),
        prepare=write_ctranslate2,
    ),
    "llama.cpp": System(llama_cpp, tuple(LLAMA_DTYPES), ("xllamacpp", "gguf"), prepare=write_ggufs),
}


# -- processes


def variables_for_others() -> dict[str, str]:
    """The environment of a process that runs another library: offline, and set as well as ours.

    What gptsmith sets for PyTorch is set for it too, so that it is no less lucky on a busy machine.
    """
    return environment.FOR_TORCH | dict(os.environ) | OFFLINE


def in_a_process(name: str, case: Case, place: Place) -> Figures:
    """What a system does with a case; where it fails, its last complaint as `error`."""
    question = json.dumps([asdict(case), asdict(place)])
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name, question],
        capture_output=True,
        text=True,
        check=False,
        env=variables_for_others(),
    )
    if done.returncode == 0:
        return dict(json.loads(done.stdout))
    last = done.stderr.strip().splitlines() or [f"a process ended with {done.returncode}"]
    return {"error": last[-1].removeprefix("generate.py: ")}


def answer(name: str, question: str) -> None:
    """Measure a system in this process, and write its figures; nothing else goes to stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where libraries may write
    case, place = json.loads(question)
    measure = memory if name == MEMORY else SYSTEMS[name].measure
    found = measure(Case(**case), Place(**place))
    found.setdefault("peak_memory_megabytes", environment.peak_memory() / 1e6)
    out.write(json.dumps(found))
    out.flush()
    os._exit(0)  # llama.cpp's server has threads that do not end


# -- the table


def first_difference(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> int | None:
    """The first token, counted from 1, in which any row differs; None where none does."""
    places = [
        place
        for one, other in zip(ours, theirs, strict=True)
        for place, (a, b) in enumerate(zip(one, other, strict=True), start=1)
        if a != b
    ]
    return min(places, default=None)


def table(found: Sequence[Figures], cases: Sequence[Case], bounds: dict[str, float]) -> list[str]:
    """The lines of a Markdown table: a row for each system in each number format."""
    *decodes, prefill = [case for case in cases if case.dtype == cases[0].dtype]
    heads = ["", "system", *(f"decode, {rows_text(case.rows)}" for case in decodes)]
    heads += ["of the bound", f"prefill of {prefill.prompt_tokens:,}", "first token, ms"]
    heads += ["memory, MB", *(f"ratio, {rows_text(case.rows)}" for case in decodes), "same tokens"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for dtype in dict.fromkeys(case.dtype for case in cases):
        *decodes, prefill = [case for case in cases if case.dtype == dtype]
        for system in dict.fromkeys(each["system"] for each in found if each["dtype"] == dtype):
            cells = table_row(found, system, decodes, prefill, bounds.get(dtype))
            lines.append(f"| {' | '.join([dtype, system, *cells])} |")
    return lines


def table_row(
    found: Sequence[Figures],
    system: str,
    decodes: Sequence[Case],
    prefill: Case,
    bound: float | None,
) -> list[str]:
    """The cells of one system in one number format; "-" for what was not measured."""

    def rounds(case: Case, name: str = system) -> dict[int, Figures]:
        wanted = {"system": name, **asdict(case)}
        return {each["round"]: each for each in found if wanted.items() <= each.items()}

    def values(case: Case, figure: str, name: str = system) -> dict[int, float]:
        known = rounds(case, name).items()
        return {round: each[figure] for round, each in known if figure in each}

    failed = [f for case in (*decodes, prefill) for f in rounds(case).values() if "error" in f]
    if failed:
        return [f"failed: {failed[0]['error']}"]
    speed, alone = "decode_tokens_per_second", decodes[0]
    ratio, share, same = ["-"] * len(decodes), "-", "-"
    tokens, ours = values(alone, "tokens"), values(alone, "tokens", OURS)
    if both := [round for round in tokens if round in ours and system != OURS]:
        ratio = [over(ratios(values(case, speed, OURS), values(case, speed))) for case in decodes]
        place = first_difference(ours[both[0]], tokens[both[0]])
        same = "yes" if place is None else f"differ from token {place}"
    if bound and tokens:
        share = f"{median(values(alone, speed).values()) / bound / alone.rows:.0%}"
    return [
        *(over(values(case, speed).values()) for case in decodes),
        share,
        over(values(prefill, "prefill_tokens_per_second").values()),
        over(values(alone, "first_token_milliseconds").values()),
        over(values(alone, "peak_memory_megabytes").values()).partition(" ")[0],
        *ratio,
        same,
    ]


def report(
    title: str, config: GPTConfig, results: Results, cases: Sequence[Case], missing: dict[str, str]
) -> str:
    """Everything that was measured so far, in Markdown."""
    memory = [row[MEMORY_RATE] for row in results.rows if MEMORY_RATE in row]
    read, bounds, first = cost.multiplied_parameters(config), dict[str, float](), cases[0]
    said = []
    if memory:
        bounds = {name: max(memory) * 1e9 / (read * each) for name, each in BYTES.items()}
        shown = ", ".join(f"{three_digits(bounds[name])} ({name})" for name in bounds)
        said = [f"The machine reads {over(memory)} GB/s; {read:,} weights: {shown} tokens/s.\n"]
    packages = {"torch", *(name for system in SYSTEMS.values() for name in system.packages)}
    return "\n".join(
        [
            f"{title}, {cost.parameter_count(config):,} parameters; prompt {first.prompt_tokens}, "
            f"{first.max_tokens} new tokens, greedy; tokens/s.\n",
            *table([row for row in results.rows if "round" in row], cases, bounds),
            *(f"\n{name}: {why}" for name, why in missing.items()),
            "",
            *said,
            "; ".join(f"{name} {version(name)}" for name in sorted(packages) if find_spec(name)),
        ]
    )


# -- the program


def varied_model(config: GPTConfig) -> GPT:
    """A fresh model that does not repeat itself: equal tokens of two systems then mean something.

    Its blocks are large beside its embeddings, which else make the last token the likeliest.
    """
    model = fresh_model(config)
    with torch.no_grad():
        for parameter in model.h.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def write_model(config: GPTConfig, folder: Path) -> Path:
    """A model with random weights in a folder, with a tokenizer if its vocabulary has room."""
    known = {50257: gpt2_tokenizer, 257: byte_tokenizer}
    tokenizer = next((make() for size, make in known.items() if config.vocab_size >= size), None)
    saving.save(varied_model(config), tokenizer, folder)
    return folder


def cases_of(options: Any, config: GPTConfig) -> list[Case]:
    """Decoding each number of rows, and one row's long prompt, in each number format."""
    prompt, new = fitting(config, options.prompt_tokens, options.max_tokens)
    new = min(new, config.context_length - prompt)  # llama.cpp reads the last token too
    if new < 2:
        raise ValueError(f"{new} new tokens are no decoding: at least 2 are needed")
    long = config.context_length - max(1, config.context_length // 64)  # it wants room behind it
    shapes = [*((rows, prompt, new) for rows in options.rows), (1, long, 1)]
    return [
        Case(dtype=dtype, rows=rows, prompt_tokens=prompt, max_tokens=new)
        for dtype in options.dtypes
        for rows, prompt, new in shapes
    ]


def prepare(place: Place, names: Sequence[str]) -> dict[str, str]:
    """Write the files that these systems read; by name, why some cannot be measured."""
    missing = {}
    for name in names:
        system = SYSTEMS[name]
        lacking = [package for package in system.packages if find_spec(package) is None]
        if place.device.partition(":")[0] not in system.devices:
            missing[name] = f"not measured on {place.device}"
        elif lacking:
            missing[name] = f"not installed: {', '.join(lacking)}"
        else:
            try:
                system.prepare(place)
            except Exception as error:  # whatever another library finds wrong with the model
                missing[name] = f"cannot read the model: {error}"
    return missing


def main() -> None:
    """Let every system take its turn in every case of every round."""
    known = parser(__doc__)
    known.add_argument("model", metavar="MODEL|PRESET", nargs="?", default="gpt2")
    known.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    known.add_argument("--dtypes", nargs="+", choices=BYTES, default=list(BYTES))
    known.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    known.add_argument("--rounds", type=int, default=3)
    known.add_argument("--prompt-tokens", type=int)
    known.add_argument("--max-tokens", type=int)
    known.add_argument("--device", default="cpu")
    known.add_argument("--threads", type=int, default=environment.cores())
    known.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = known.parse_args()
    if options.measure:
        answer(*options.measure)
    config, title, folder = described_config(options.model)
    cases, results = cases_of(options, config), Results(options.out)
    with tempfile.TemporaryDirectory() as scratch:
        model = folder or write_model(config, Path(scratch, "model"))
        place = Place(str(model), scratch, options.device, options.threads)
        missing = prepare(place, options.systems)

        def measure_memory() -> None:
            if options.device == "cpu":
                results.add({"system": MEMORY, **in_a_process(MEMORY, cases[0], place)})

        try:
            measure_memory()
            names = [name for name in options.systems if name not in missing]
            for round, case, name in product(range(1, options.rounds + 1), cases, names):
                if case.dtype in SYSTEMS[name].dtypes:
                    print(f"round {round} of {options.rounds}: {name}, {case}", file=sys.stderr)
                    figures = asdict(case) | in_a_process(name, case, place)
                    results.add({"round": round, "system": name, **figures})
            measure_memory()
        finally:
            print(report(title, config, results, cases, missing), flush=True)


if __name__ == "__main__":
    carry_out(main)
