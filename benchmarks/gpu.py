"""What one GPU does with GPT-2: a plain nanoGPT-style step, and gptsmith's in the same minutes.

    python benchmarks/gpu.py --data TEXT    one GPU, under ten minutes on an NVIDIA H200
    python benchmarks/gpu.py --toy          the same at toy size on a CPU, under a minute

Also nanoGPT's GPU recipe for Shakespeare as a command, the chip's own matrix rate, and a check of
loss and gradients. Each case is a process with a time limit, so that what fails or hangs costs only
its row. Random tokens cost what real ones do.

Shapes:  B batch    T tokens    C channels    H heads    D channels per head    V vocabulary
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import torch.nn.functional as F
from results import Results, Row, carry_out, parser
from torch import Tensor, nn

from gptsmith.cli.timing import fresh_trainer
from gptsmith.config import cost
from gptsmith.config.model import PRESETS, GPTConfig
from gptsmith.config.settings import MachineSettings
from gptsmith.machine import devices, environment
from gptsmith.model.gpt import GPT
from gptsmith.model.loss import NOT_LEARNED

Step = Callable[[int], float | Tensor]  # the steps done -> the loss

RATIO_GOAL, SHARE_GOAL = 1.5, 0.5  # of the plain step's tokens/s; of the measured bf16 matrix rate
LOSS_GOAL, SECONDS_GOAL = 1.4697, 20.0  # the loss: nanoGPT's README, of its character model
CASE_SECONDS = 150.0  # the longest that a case may take; compiling is most of it
SHAKESPEARE = {  # further flags of `gptsmith train shakespeare-gpu`
    "the recipe": "",
    "muon, 1,000 steps": "--optimizer muon --steps 1000 --evaluate-every 250 --sample-tokens 0",
    "muon, 2,000 steps": "--optimizer muon --steps 2000 --evaluate-every 250 --sample-tokens 0",
}
TOY_SHAKESPEARE = {
    "toy": "--n-layer 1 --n-head 2 --n-embd 16 --context-length 16 --batch-tokens 64 --steps 6 "
    "--evaluate-every 3 --sample-tokens 5 --warmup-steps 1 --dtype float32 --device cpu",
}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is."""

    device: torch.device
    config: GPTConfig
    checked: GPTConfig  # what is compared with float64
    batch_rows: int  # of a step, in micro-batches
    first: tuple[int, ...]  # micro-batches that are compared first, in rows
    later: tuple[int, ...]  # and once all else was measured
    square: int  # side of the matrices whose product is the matrix rate
    warm_up: int  # steps, at least 1; CUDA graphs are recorded in the third
    steps: int  # timed
    least_seconds: float  # with less left, no case is begun


FULL = Scale(
    device=torch.device("cuda"),
    config=PRESETS["nanogpt"],
    # So many logits that the loss is computed in several parts.
    checked=GPTConfig(context_length=512, n_layer=2, n_head=4, n_embd=128),
    batch_rows=128,  # a quarter of the gpt2-124m recipe's: the optimizer weighs four times as much
    first=(64, 32),
    later=(16,),
    square=8192,
    warm_up=4,
    steps=10,
    least_seconds=20.0,
)
TINY = GPTConfig(vocab_size=97, context_length=16, n_layer=2, n_head=2, n_embd=32)
TOY = Scale(
    device=torch.device("cpu"),
    config=replace(TINY, bias=False, activation="gelu_erf"),
    checked=TINY,
    batch_rows=4,
    first=(2,),
    later=(),
    square=128,
    warm_up=1,
    steps=3,
    least_seconds=3.0,
)


# -- the two steps


class PlainBlock(nn.Module):
    """(B, T, C) -> (B, T, C)"""

    def __init__(self, C: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.wide, self.narrow = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm_1(x)).chunk(3, dim=2)  # (B, T, C) each
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(self.norm_2(x))))


class PlainModel(nn.Module):
    """nanoGPT's shape: no biases, a tied head, the vocabulary padded to a multiple of 64."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C, V = config.n_embd, -(-config.vocab_size // 64) * 64  # 50,257 becomes 50,304
        self.tokens, self.positions = nn.Embedding(V, C), nn.Embedding(config.context_length, C)
        self.blocks = nn.ModuleList(PlainBlock(C, config.n_head) for _ in range(config.n_layer))
        self.norm, self.head = nn.LayerNorm(C, bias=False), nn.Linear(C, V, bias=False)
        self.head.weight = self.tokens.weight
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """(B, T), (B, T) -> ()"""
        x = self.tokens(tokens) + self.positions(
            torch.arange(tokens.shape[1], device=tokens.device)
        )
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_LEARNED)


def plain_step(scale: Scale, micro: int, compiles: str) -> Step:
    """The step of nanoGPT's loop; its batch stays the same and costs only the copy to the GPU."""
    device, config = scale.device, scale.config
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model = PlainModel(config).to(device)
    loss_of = model if compiles == "no" else torch.compile(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    windows = torch.randint(config.vocab_size, (scale.batch_rows, config.context_length + 1))
    batch = [windows[:, :-1].contiguous(), windows[:, 1:].contiguous()]
    if device.type == "cuda":
        batch = [part.pin_memory() for part in batch]
    pairs = list(zip(*(part.split(micro) for part in batch), strict=True))

    def step(done: int) -> Tensor:
        for pair in pairs:
            tokens, targets = (part.to(device, non_blocking=True) for part in pair)
            with torch.autocast(device.type, torch.bfloat16):
                loss = loss_of(tokens, targets)
            (loss / len(pairs)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_step(scale: Scale, micro: int, compiles: str, dtype: str, optimizer: str) -> Step:
    """A step as `gptsmith train` does it; one that does other than asked is an error."""
    how: Any = {"device": scale.device.type, "dtype": dtype, "compile": compiles}
    trainer = fresh_trainer(
        scale.config,
        MachineSettings(micro_batch=micro, **how),
        rows=scale.batch_rows,
        steps=scale.warm_up + scale.steps,
        optimizer=optimizer,
        learning_rate=6e-4,
    )

    def step(done: int) -> float:
        report = trainer.step(done)
        if report.skipped or report.micro_batch != micro:
            raise RuntimeError(f"skipped: {report.skipped}; micro-batch: {report.micro_batch} rows")
        return report.loss

    return step


# -- the cases: each runs in a process of its own, and returns what is to be kept


def median_seconds(
    work: Callable[[int], Any], device: torch.device, warm_up: int, times: int
) -> tuple[float, Any]:
    """Median time of the last so many calls, and what the last returned.

    A GPU's own clock is read, between the calls, so that the processor never waits for it.
    """
    marks: list[Any] = []
    for number in range(warm_up + times):
        result = work(number)
        if device.type == "cuda":
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
    devices.synchronize(device)
    pairs = list(pairwise(marks))[-times:]
    if device.type == "cuda":
        return statistics.median(a.elapsed_time(b) / 1000 for a, b in pairs), result
    return statistics.median(b - a for a, b in pairs), result


def time_step(scale: Scale, *, who: str, micro: int, compiles: str, **ours: str) -> Row:
    """Whole optimizer steps: tokens per second, and peak memory."""
    torch.manual_seed(0)
    plain = who == "plain"
    step = plain_step(scale, micro, compiles) if plain else our_step(scale, micro, compiles, **ours)
    seconds, loss = median_seconds(step, scale.device, scale.warm_up, scale.steps)
    tokens = scale.batch_rows * scale.config.context_length
    flops = cost.flops_per_token(scale.config, training=True) * tokens
    return {
        "tokens_per_second": tokens / seconds,
        "milliseconds": seconds * 1000,
        "teraflops": flops / seconds / 1e12,
        "peak_gigabytes": devices.peak_memory(scale.device) / 1e9,
        "loss": float(loss),
    }


def matrix_rates(scale: Scale) -> Row:
    """TFLOP/s of products x @ W.T: a large square, and those of the model."""
    device, C, side = scale.device, scale.config.n_embd, scale.square
    N, V = scale.first[-1] * scale.config.context_length, -(-scale.config.vocab_size // 64) * 64
    model = [(N, C, 3 * C), (N, C, C), (N, C, 4 * C), (N, 4 * C, C), (N, C, V)]
    kinds = [("bf16", shape) for shape in ((side, side, side), *model)]
    rates = {}
    for kind, shape in [*kinds, ("tf32", (side, side, side)), ("float32", (side, side, side))]:
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        # Random numbers: a chip multiplies zeros faster, which need less power.
        x = torch.randn(shape[0], shape[1], device=device, dtype=dtype)
        weight = torch.randn(shape[2], shape[1], device=device, dtype=dtype)

        def ten_products(number: int, x: Tensor = x, weight: Tensor = weight) -> None:
            for _ in range(10):
                x @ weight.T

        flops = 20 * shape[0] * shape[1] * shape[2]
        rate = flops / median_seconds(ten_products, device, 3, 10)[0] / 1e12
        rates[f"{kind} " + " x ".join(map(str, shape))] = rate
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "teraflops": rates}


def check_loss(scale: Scale) -> Row:
    """Largest errors of the loss and of gradients against float64 on the CPU.

    A gradient's error is relative to the largest number in the same parameter's.
    """
    config, device = scale.checked, scale.device
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    model, exact, errors = GPT(config), GPT(config).double(), {}
    for parameter in model.parameters():  # large enough that attention is far from uniform
        nn.init.normal_(parameter, std=0.1)
    exact.load_state_dict(model.state_dict())
    tokens, targets = torch.randint(config.vocab_size, (2, 2, config.context_length))
    targets[0, 3] = NOT_LEARNED
    logits = exact(tokens).logits.flatten(0, 1)
    wanted = F.cross_entropy(logits, targets.flatten(), ignore_index=NOT_LEARNED)
    wanted.backward()
    model.to(device)
    names = ["float32", "bf16", *(["bf16 compiled"] if device.type == "cuda" else [])]
    for name in names:
        loss_of = torch.compile(model.loss) if "compiled" in name else model.loss
        with devices.autocast(device, name.split()[0]):
            loss = loss_of(tokens.to(device), targets.to(device))
        model.zero_grad(set_to_none=True)
        loss.backward()
        errors[f"{name} loss"] = abs(loss.item() / wanted.item() - 1)
        errors[f"{name} gradient"] = 0.0
        for got, right in zip(model.parameters(), exact.parameters(), strict=True):
            assert got.grad is not None
            assert right.grad is not None
            error = (got.grad.cpu().double() - right.grad).abs().max() / right.grad.abs().max()
            errors[f"{name} gradient"] = max(errors[f"{name} gradient"], error.item())
    return {"relative_error": errors}


def run_case(scale: Scale, kind: str, options: dict[str, Any]) -> Row:
    """What a case returns, or the first line of its error."""
    cases: dict[str, Callable[..., Row]]
    cases = {"step": time_step, "matrix": matrix_rates, "check": check_loss}
    try:
        return cases[kind](scale, **options)
    except Exception as error:  # whatever it is: it is what the row says
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


# -- processes


def run_command(
    words: list[str], seconds: float, watch: Callable[[float], None] = lambda elapsed: None
) -> tuple[str, str | None]:
    """What a command wrote, and what went wrong; at the limit it and its children are killed.

    `watch` is called ten times a second, and at the end, with the seconds since the start.
    """
    # Files, not pipes, which a compiler's worker that lives on would keep open.
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
    ):
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=err, process_group=0)
        try:
            while process.poll() is None and time.perf_counter() - started < seconds:
                time.sleep(0.1)
                watch(time.perf_counter() - started)
        finally:
            status = process.poll()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        watch(time.perf_counter() - started)
        out.seek(0)
        err.seek(0)
        last = next(reversed(err.read().strip().splitlines()), "")
        wrong = f"exit status {status}: {last}" if status else None
        return out.read(), f"stopped after {seconds:.0f} s" if status is None else wrong


def run_shakespeare(data: Path, folder: Path, flags: str, seconds: float) -> Row:
    """Train by the recipe; when, from the command's start, each validation loss was there."""
    words = [sys.executable, "-m", "gptsmith", "train", "shakespeare-gpu", "--data", str(data)]
    found: dict[int, Row] = {}
    metrics, row = folder / "metrics.jsonl", Row()

    def watch(elapsed: float) -> None:
        row["whole_seconds"] = elapsed
        text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
        for line in text.rpartition("\n")[0].splitlines():  # the last may be half written
            if '"validation_loss"' in line:
                record = json.loads(line)
                kept = {key: record[key] for key in ("step", "validation_loss", "seconds")}
                found.setdefault(record["step"], {**kept, "wall_seconds": elapsed})

    wrong = run_command([*words, "--out", str(folder), *flags.split()], seconds, watch)[1]
    row["evaluations"] = list(found.values())
    row["best"] = min(row["evaluations"], key=lambda e: e["validation_loss"], default=None)
    reached = (e for e in row["evaluations"] if e["validation_loss"] <= LOSS_GOAL)
    row["goal_reached"] = next(reached, None)
    return row if wrong is None else {**row, "error": wrong}


# -- the table


class Table:
    """The rows so far, shown and kept as they come; nothing is begun once the time is spent."""

    def __init__(self, scale: Scale, results: Results, seconds: float) -> None:
        self.scale, self.results = scale, results
        self.deadline = time.monotonic() + seconds
        self.matrix_rate: float | None = None  # TFLOP/s

    def add(self, section: str, name: str, measure: Callable[[float], Row]) -> Row:
        """Measure within the time that is left; keep the row."""
        row: Row = {"section": section, "name": name}
        left = self.deadline - time.monotonic()
        started = time.perf_counter()
        late = {"error": "skipped: the time is spent"}
        row |= measure(min(left, CASE_SECONDS)) if left > self.scale.least_seconds else late
        row["case_seconds"] = time.perf_counter() - started
        self.results.add(row)
        return row

    def case(self, kind: str, options: dict[str, Any], seconds: float) -> Row:
        """A case of this script, in a process of its own."""
        toy = ["--toy"] if self.scale is TOY else []
        words = [sys.executable, __file__, *toy, "--case", json.dumps([kind, options])]
        said, wrong = run_command(words, seconds)
        last = next(reversed(said.strip().splitlines()), "")
        # A result counts whatever went wrong after it, as when a compiler's workers do not end.
        return json.loads(last) if last.startswith("{") else {"error": wrong or "no result"}

    def steps(self, who: str, micro: int | None = None) -> list[Row]:
        """The steps of one of the two that were measured."""
        good = [row for row in self.results.rows if row.get("who") == who and "error" not in row]
        return [row for row in good if micro in (None, row["micro"])]

    def best_micro(self) -> int:
        """The micro-batch of our fastest step so far."""
        best = fastest(self.steps("gptsmith"))
        return best["micro"] if best else self.scale.first[0]

    def step(self, who: str, micro: int, **more: str) -> None:
        """Measure and show a step, its share of the matrix rate, and its ratio to a plain one."""
        options: dict[str, Any] = {"who": who, "micro": micro, "dtype": "bf16"}
        compiles = "no" if self.scale is TOY else "yes"  # it takes half a minute on a CPU
        options |= {"optimizer": "adamw", "compiles": compiles, **more}
        name = "{who}, {dtype}, {optimizer}, compile {compiles}".format(**options)

        def measure(seconds: float) -> Row:
            row = {**options, **self.case("step", options, seconds)}
            if self.matrix_rate and "teraflops" in row:
                row["share"] = row["teraflops"] / self.matrix_rate
            if "error" not in row and who != "plain" and (plain := self.steps("plain", micro)):
                row["ratio"] = row["tokens_per_second"] / plain[-1]["tokens_per_second"]
            return row

        row = self.add("step", name, measure)
        print(f"  {name:<46}{micro:>5}  {row.get('error') or figures(row)}", flush=True)


def figures(row: Row) -> str:
    """The numbers of a step."""
    return (
        f"{row['tokens_per_second']:>11,.0f}{row['milliseconds']:>10.1f}"
        f"{row['peak_gigabytes']:>8.2f}{row.get('share', 0):>7.3f}{row.get('ratio', 1):>7.2f}"
    )


def fastest(rows: list[Row]) -> Row | None:
    """The row with the most tokens per second."""
    return max(rows, key=lambda row: row["tokens_per_second"], default=None)


def measure_matrices(table: Table) -> None:
    """The chip's own rate, which the steps are held against."""
    row = table.add("matrix", "products", lambda left: table.case("matrix", {}, left))
    print(row.get("error") or f"{row['device']}, torch {row['torch']}: TFLOP/s of products")
    for name, rate in row.get("teraflops", {}).items():
        table.matrix_rate = table.matrix_rate or rate  # the first is the large square in bf16
        print(f"  {name:<46}{rate:>9.2f}", flush=True)


def measure_steps(table: Table) -> None:
    """Plain and ours in turn, and the better micro-batch once more."""
    print(f"\nGPT-2, {table.scale.batch_rows} rows of {table.scale.config.context_length} a step")
    print(f"  {'':<46}micro     tokens/s   ms/step      GB  share  ratio")
    for micro in table.scale.first:
        table.step("plain", micro)
        table.step("gptsmith", micro)
    best = table.best_micro()
    table.step("plain", best)
    table.step("gptsmith", best)
    table.step("gptsmith", best, optimizer="muon")


def measure_shakespeare(table: Table, data: Path | None, folder: Path) -> None:
    """The recipe and its variants, as commands."""
    print("\nShakespeare, seconds from the command's start; the first run may fill the compiler's")
    print("cache, in which the others then find their work", flush=True)
    variants = TOY_SHAKESPEARE if table.scale is TOY else SHAKESPEARE
    for name, flags in variants.items():

        def measure(seconds: float, name: str = name, flags: str = flags) -> Row:
            if data is None or not data.is_file():
                return {"error": "the text is missing: give --data FILE"}
            return run_shakespeare(data.resolve(), folder / name.replace(" ", "-"), flags, seconds)

        row, said = table.add("shakespeare", name, measure), ""
        if best := row.get("best"):
            goal = row["goal_reached"]
            when = f"reached by {goal['wall_seconds']:.1f} s" if goal else "not reached"
            said = (
                f"best {best['validation_loss']:.4f} at step {best['step']:,}, "
                f"{best['wall_seconds']:.1f} s (steps alone {best['seconds']:.1f} s); "
                f"{LOSS_GOAL} {when}; whole command {row['whole_seconds']:.1f} s"
            )
        print(f"  {name:<20}{said}  {row.get('error', '')}".rstrip(), flush=True)


def measure_rest(table: Table) -> None:
    """The loss's exactness, then what else a step can be, at the micro-batch that was best."""
    name = "largest relative error of loss and gradients against float64"
    row = table.add("check", name, lambda left: table.case("check", {}, left))
    print(f"\n{name}  {row.get('error', '')}".rstrip())
    for part, error in row.get("relative_error", {}).items():
        print(f"  {part:<46}{error:>9.1e}")
    if table.scale is TOY:  # a CPU has no fp8, and nothing was compiled
        return
    print("\nother steps; the ratio is to the newest plain one of the same micro-batch", flush=True)
    best, offered = table.best_micro(), get_type_hints(MachineSettings)
    table.step("plain", best)
    if "fp8" in get_args(offered["dtype"]):
        table.step("gptsmith", best, dtype="fp8")
    if "max-autotune" in get_args(offered["compile"]):
        table.step("gptsmith", best, compiles="max-autotune")
    table.step("gptsmith", best, compiles="no")
    for micro in table.scale.later:
        table.step("plain", micro)
        table.step("gptsmith", micro)


def conclude(table: Table) -> None:
    """The goals, and what was reached: our best against the plain step's best."""
    print("\ngoals")
    plain, ours = fastest(table.steps("plain")), table.steps("gptsmith")
    like_plain = [r for r in ours if (r["dtype"], r["optimizer"]) == ("bf16", "adamw")]
    for what, best in {"bf16, adamw": fastest(like_plain), "any": fastest(ours)}.items():
        if plain is None or best is None:
            print(f"  {what}: not measured")
            continue
        ratio = best["tokens_per_second"] / plain["tokens_per_second"]
        print(f"  {what}: {best['name']}, {best['micro']} rows")
        print(f"    {ratio:.2f} times the plain step's best (goal {RATIO_GOAL})")
        print(f"    {best.get('share', 0):.3f} of the matrix rate (goal over {SHARE_GOAL})")
    walls = [r["goal_reached"]["wall_seconds"] for r in table.results.rows if r.get("goal_reached")]
    when = f"in {min(walls):.1f} s" if walls else "not reached"
    print(f"  Shakespeare at {LOSS_GOAL}: {when} (goal under {SECONDS_GOAL:.0f} s)", flush=True)


def toy_text(path: Path) -> Path:
    """A small text of random words."""
    draw = random.Random(0)
    words = (draw.choice(["to", "be", "or", "not\n"]) for _ in range(2000))
    path.write_text(" ".join(words), encoding="utf-8")
    return path


def main() -> None:
    """Measure everything or, as a process of its own, one case."""
    known = parser(__doc__)
    add = known.add_argument
    add("--toy", action="store_true", help="toy sizes, on the CPU")
    add("--seconds", type=float, default=540.0, help="time for everything (default: 540)")
    add("--data", type=Path, help="Shakespeare's text; without it, that part is left out")
    add("--case", help=argparse.SUPPRESS)
    options = known.parse_args()
    scale = TOY if options.toy else FULL
    if options.case:
        print("\n" + json.dumps(run_case(scale, *json.loads(options.case))))
        return
    if scale.device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("PyTorch finds no CUDA GPU here: try --toy")
    environment.share_cores()
    table = Table(scale, Results(options.out), options.seconds)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = options.data
            if options.toy and options.data is None:
                data = toy_text(Path(folder) / "text.txt")
            measure_matrices(table)
            measure_steps(table)
            measure_shakespeare(table, data, Path(folder))
            measure_rest(table)
    finally:
        conclude(table)


if __name__ == "__main__":
    carry_out(main)
