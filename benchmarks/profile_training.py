"""Where a training step's time goes, by part of the model, forward and backward.

    python benchmarks/profile_training.py gpt2 --rows 4 --steps 10
    python benchmarks/profile_training.py RECIPE --optimizer muon --dtype bf16 --device cuda

Steps with and without the clock take turns, so that a machine that slows down slows both. A clock
is told whenever another part begins, so that the parts divide a step without gap or overlap.

PyTorch's backward pass runs the nodes of the graph in the reverse of the order in which the forward
pass made them, on one thread. So a node that does nothing, put where the forward pass goes from one
part to the next, marks the same border on the way back.
"""

# Letters:  C channels    T context    M matrices of one shape, R their shorter side

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import Any, Literal

import torch
from results import Results, carry_out, parser
from torch import Tensor

from gptsmith.checkpoint.described import described_config
from gptsmith.cli.bench import figures_text
from gptsmith.cli.flags import add_flags, chosen
from gptsmith.cli.timing import WARM_UP, fresh_trainer, training_figures
from gptsmith.config import cost
from gptsmith.config.model import GPTConfig
from gptsmith.config.settings import MachineSettings
from gptsmith.config.tables import columns
from gptsmith.machine import devices
from gptsmith.model.gpt import GPT
from gptsmith.training.loop import Trainer
from gptsmith.training.muon import ITERATIONS, Muon

# The parts, as they are shown. Weights have the names that cost.block_components gives them.
EMBEDDINGS, NORMS, ATTENTION, ACTIVATION = "embeddings", "norms", "attention", "activation"
QUERY_KEY_VALUE, HEADS_TO_STREAM = "attn.c_attn", "attn.c_proj"
STREAM_TO_MLP, MLP_TO_STREAM = "mlp.c_fc", "mlp.c_proj"
HEAD, CLIPPING, LOADING = "head and loss", "gradient clipping", "batch loading"
REST = "everything else"  # residual sums, dropout, seeding, and what lies between the passes
INSIDE = [EMBEDDINGS, NORMS, QUERY_KEY_VALUE, ATTENTION, HEADS_TO_STREAM]
INSIDE += [STREAM_TO_MLP, ACTIVATION, MLP_TO_STREAM, HEAD]

Way = Literal["forward", "backward", "neither"]
WAYS: tuple[Way, ...] = ("forward", "backward", "neither")
Times = dict[tuple[str, Way], float]  # seconds by part and direction

LONG_ENOUGH, LARGEST_SIDE = 0.02, 8192  # seconds and rows of the product that gives the matrix rate
REPETITIONS = 5


# ---- The clock -----------------------------------------------------------------------------------


class Clock:
    """Marks in the time of one step; from each to the next, the time belongs to a part.

    On CUDA the marks are events in the stream, so the time is the GPU's and nothing waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.now: tuple[str, Way] = (REST, "neither")
        self.marks: list[tuple[tuple[str, Way], Any]] = []

    def start(self) -> None:
        """Forget the last step and begin another."""
        devices.synchronize(self.device)
        self.marks.clear()
        self.switch(REST, "neither")

    def switch(self, part: str, way: Way) -> None:
        """From here on, the time belongs to this part."""
        self.now = (part, way)
        self.marks.append((self.now, self.mark()))

    def stop(self) -> Times:
        """The seconds of each part since `start`; together they are the time since then."""
        marks = [*self.marks, (self.now, self.mark())]
        devices.synchronize(self.device)
        times: Times = {}
        for (key, before), (_, after) in pairwise(marks):
            times[key] = times.get(key, 0.0) + self.between(before, after)
        return times

    def mark(self) -> Any:
        """This moment: an event in CUDA's stream; elsewhere a number of seconds."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        devices.synchronize(self.device)
        return time.perf_counter()

    def between(self, before: Any, after: Any) -> float:
        """Seconds from one mark to another, once both are past."""
        if self.device.type == "cuda":
            return float(before.elapsed_time(after)) / 1000
        return float(after - before)


class _Border(torch.autograd.Function):
    """The tensor itself; the clock is told when its gradient comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, part: str) -> Tensor:
        ctx.clock, ctx.part = clock, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.clock.switch(ctx.part, "backward")
        return grad, None, None


# ---- Watching a step -----------------------------------------------------------------------------


@contextmanager
def watched(trainer: Trainer, clock: Clock) -> Iterator[None]:
    """Within this, the trainer's steps tell the clock of every part that begins."""
    calls = [
        *((each, "step", optimizer_name(each), REST) for each in trainer.optimizers),
        (trainer, "load", LOADING, REST),
        # Clipping is all that a step does between undoing the scale and loading the next batch.
        (trainer.scaler, "unscale_", CLIPPING, CLIPPING),
    ]
    with ExitStack() as stack:
        for owner, name, part in [*model_parts(trainer.model), (trainer, "loss", HEAD)]:
            timed = both_ways(getattr(owner, name), part, clock)
            stack.enter_context(instead(owner, name, timed))
        for owner, name, part, then in calls:
            timed = one_way(getattr(owner, name), part, then, clock)
            stack.enter_context(instead(owner, name, timed))
        # The backward pass ends with the gradient of what the forward pass began with.
        end = trainer.model.wte.weight.register_post_accumulate_grad_hook(
            lambda _: clock.switch(REST, "neither")
        )
        stack.callback(end.remove)
        yield


def model_parts(model: GPT) -> list[tuple[Any, str, str]]:
    """The model's methods that take and return a tensor, as (owner, name, part)."""
    modules: list[tuple[Any, str]] = [(model.wte, EMBEDDINGS), (model.ln_f, NORMS)]
    modules += [(model.ln_0, NORMS)] if model.config.modern else [(model.wpe, EMBEDDINGS)]
    block: Any
    for block in model.h:
        modules += [
            (block.ln_1, NORMS),
            (block.attn, ATTENTION),  # less what lies inside it
            (block.attn.c_attn, QUERY_KEY_VALUE),
            (block.attn.c_proj, HEADS_TO_STREAM),
            (block.attn.drop, REST),
            (block.ln_2, NORMS),
            (block.mlp.c_fc, STREAM_TO_MLP),
            (block.mlp.activation, ACTIVATION),
            (block.mlp.c_proj, MLP_TO_STREAM),
        ]
    return [(model, "features", REST), *((module, "forward", part) for module, part in modules)]


def both_ways(method: Any, part: str, clock: Clock) -> Any:
    """A method that takes and returns a tensor, and tells the clock so in both passes.

    The borders lie outside of the part, which does not pay for them.
    """

    def timed(x: Tensor, *others: Any) -> Tensor:
        outside, way = clock.now
        x = _Border.apply(x, clock, outside)
        clock.switch(part, "forward")
        y = method(x, *others)
        clock.switch(outside, way)
        return _Border.apply(y, clock, part)

    return timed


def one_way(method: Any, part: str, then: str, clock: Clock) -> Any:
    """A method outside of both passes that tells the clock when it begins, and what follows it."""

    def timed(*values: Any, **named: Any) -> Any:
        clock.switch(part, "neither")
        result = method(*values, **named)
        clock.switch(then, "neither")
        return result

    return timed


@contextmanager
def instead(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within this, this one object has another method of that name."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def optimizer_name(optimizer: Any) -> str:
    """What its row is called: `optimizer AdamW`."""
    return f"optimizer {type(optimizer).__name__}"


# ---- Arithmetic ----------------------------------------------------------------------------------


def training_flops(config: GPTConfig, tokens: int) -> dict[str, float]:
    """Of each part with matrix products, their FLOPs for so many tokens, forward and backward.

    Together they are cost.flops_per_token for each token: 6 for every weight, and for each
    block and each of T tokens 12 C, the half that causality hides included.
    """
    weights = {
        component.name.removesuffix(".weight"): config.n_layer * prod(component.shape)
        for component in cost.block_components(config)
        if len(component.shape) == 2
    }
    weights[HEAD] = config.vocab_size * config.n_embd
    flops = {part: 6.0 * count * tokens for part, count in weights.items()}
    block = 12.0 * config.n_embd * config.context_length
    return {**flops, ATTENTION: config.n_layer * block * tokens}


def muon_flops(muon: Muon) -> float:
    """Of the products that make Muon's matrices orthogonal, per step.

    Each iteration takes a matrix (R, C), R the smaller, to two products (R, C) with 2 R R C FLOPs
    each and one (R, R) with 2 R R R.
    """
    flops = 0
    for group in muon.param_groups:
        for shape, members in muon.by_shape(group["params"]).items():
            R, C = sorted(shape)
            M = sum(p.numel() for p in members) // (R * C)
            flops += ITERATIONS * M * (4 * R * R * C + 2 * R * R * R)
    return float(flops)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """FLOP/s of the fastest product of two squares in this precision, and their side.

    The side doubles until a product takes long enough to keep every core busy.
    """
    clock, side, seconds = Clock(device), 256, 0.0
    found = []
    while seconds < LONG_ENOUGH and side < LARGEST_SIDE:
        side *= 2
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(REPETITIONS):
            before = clock.mark()
            a @ b.T  # as a linear layer multiplies
            after = clock.mark()
            devices.synchronize(device)
            times.append(clock.between(before, after))
        seconds = min(times)
        found.append((2 * side**3 / seconds, side))
    return max(found)


# ---- The profile ---------------------------------------------------------------------------------


def profile(trainer: Trainer, steps: int) -> Iterator[tuple[float, Times]]:
    """Seconds of a step as it is, and the times of the parts of the next one, so many times."""
    clock = Clock(trainer.device)
    for done in range(WARM_UP):
        trainer.step(done)
    for pair in range(steps + 1):
        clock.start()
        trainer.step(WARM_UP + 2 * pair)
        plain = sum(clock.stop().values())
        with watched(trainer, clock):
            clock.start()
            trainer.step(WARM_UP + 2 * pair + 1)
            times = clock.stop()
        if pair:  # the first of them sets things up too
            yield plain, times


def summary(trainer: Trainer, found: Sequence[tuple[float, Times]]) -> dict[str, Any]:
    """What training steps are like, and under "profile" their parts: medians over the steps."""
    figures = training_figures(trainer, [plain for plain, _ in found])
    rate, side = matrix_rate(trainer.device, devices.torch_dtype(trainer.dtype))
    parts, whole = make_parts(trainer, [times for _, times in found], rate)
    profile = {
        "steps": len(found),
        "parts": parts,
        "sum": whole,
        "step_milliseconds": figures["step_milliseconds"],
        "overhead": whole["milliseconds"] / figures["step_milliseconds"] - 1,
        "matrix_gigaflops_per_second": rate / 1e9,
        "matrix_side": side,
        "matrix_dtype": trainer.dtype,
    }
    return {**figures, "profile": profile}


def make_parts(
    trainer: Trainer, steps: Sequence[Times], rate: float
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows and their sum, from the times of some steps: each time is the median over them."""
    flops = training_flops(trainer.model.config, trainer.settings.batch_tokens)
    optimizers = {optimizer_name(each): each for each in trainer.optimizers}
    rates: dict[str, float | None] = dict.fromkeys(flops, rate)
    for name, optimizer in optimizers.items():
        # PyTorch multiplies in bfloat16, whatever the run does; update.cpp as suits each shape.
        if isinstance(optimizer, Muon) and optimizer.compiled is None:
            flops[name] = muon_flops(optimizer)
            rates[name] = rate if trainer.dtype == "bf16" else None
    times = {
        name: [statistics.median(step.get((name, way), 0.0) for step in steps) for way in WAYS]
        for name in (*INSIDE, *optimizers, CLIPPING, LOADING, REST)
    }
    together = [sum(way) for way in zip(*times.values(), strict=True)]
    whole = sum(together)
    parts = [
        make_part(name, seconds, flops.get(name), rates.get(name), whole)
        for name, seconds in times.items()
    ]
    common = None if None in rates.values() else rate
    return parts, make_part("sum", together, sum(flops.values()), common, whole)


def make_part(
    name: str, seconds: Sequence[float], flops: float | None, rate: float | None, whole: float
) -> dict[str, Any]:
    """A row, from its seconds in each of WAYS and those of the whole step.

    Without matrix products there is no speed; without a rate in their precision, no share of it.
    """
    speed = flops / sum(seconds) if flops else None
    return {
        "part": name,
        "forward_milliseconds": 1000 * seconds[0],
        "backward_milliseconds": 1000 * seconds[1],
        "milliseconds": 1000 * sum(seconds),  # with what belongs to neither pass
        "share": sum(seconds) / whole,
        "gigaflops": (flops or 0.0) / 1e9,
        "gigaflops_per_second": None if speed is None else speed / 1e9,
        "of_matrix_rate": None if speed is None or rate is None else speed / rate,
    }


# ---- As a person reads it ------------------------------------------------------------------------

TITLES = ("", "forward ms", "backward ms", "ms", "share", "GFLOP", "GFLOP/s", "of matrix rate")
NOTES = (
    "What profiling costs is mostly in everything else, with residual sums and dropout.",
    "Attention's GFLOP count the half that causality hides, which its kernels may skip.",
    "The gradients of the head are found, and counted, in its forward pass.",
)


def render_profile(profile: dict[str, Any]) -> str:
    """The profile as a table."""
    parts = [*profile["parts"], profile["sum"]]
    names, forward, backward, both, shares, flops, speeds, of_rate = zip(
        *(part.values() for part in parts), strict=True
    )
    shown = [fixed(forward), fixed(backward), fixed(both), map(percent, shares)]
    shown += [fixed(flops), fixed(speeds), map(percent, of_rate)]
    lines = columns([TITLES, *zip(names, *shown, strict=True)], "<>>>>>>>")
    side, rate = profile["matrix_side"], profile["matrix_gigaflops_per_second"]
    lines += [
        "",
        f"matrix rate: {rate:,.0f} GFLOP/s, the fastest product of two squares in "
        f"{profile['matrix_dtype']}, of side {side}",
        f"step: {profile['step_milliseconds']:,.2f} ms without profiling, "
        f"{profile['sum']['milliseconds']:,.2f} ms with it ({profile['overhead']:+.1%}); "
        f"medians of {profile['steps']}",
        *NOTES,
    ]
    return "\n".join(lines)


def fixed(values: Sequence[float | None]) -> list[str]:
    """Numbers with as many decimals as give the largest four digits; nothing for 0 and None."""
    largest = max(value or 0.0 for value in values)
    decimals = sum(largest < limit for limit in (1, 10, 100, 1000))
    return [f"{value:,.{decimals}f}" if value else "" for value in values]


def percent(value: float | None) -> str:
    """0.125 -> "12.5%"; nothing for None."""
    return "" if value is None else f"{value:.1%}"


# ---- The program ---------------------------------------------------------------------------------


def main() -> None:
    """Profile the steps of fresh weights on random tokens."""
    known = parser(__doc__)
    known.add_argument("model", metavar="MODEL|PRESET|RECIPE")
    known.add_argument("--rows", type=int, default=4, help="of a step (default: 4)")
    known.add_argument("--steps", type=int, default=10, help="that are profiled (default: 10)")
    known.add_argument("--optimizer", default="adamw", choices=("adamw", "muon"))
    add_flags(known, MachineSettings, without=("compile", "fused", "micro_batch", "deterministic"))
    options = known.parse_args()
    if min(options.rows, options.steps) < 1:
        raise ValueError(f"{options.rows} rows, {options.steps} steps: at least 1 is needed")
    config, title, _ = described_config(options.model)
    machine = chosen(options, MachineSettings)
    trainer = fresh_trainer(
        config,
        # The parts of a compiled or fused model cannot be told apart.
        replace(machine, compile="no", fused="no"),
        rows=options.rows,
        optimizer=options.optimizer,
        # One more than are taken: a last step would load no batch, which has its row here.
        steps=WARM_UP + 2 * (options.steps + 1) + 1,
    )
    results, found = Results(options.out), []
    try:
        for plain, times in profile(trainer, options.steps):
            found.append((plain, times))
            parts = {" ".join(key): seconds for key, seconds in times.items()}
            results.add({"seconds": plain, "profiled_seconds": parts})
    finally:
        if found:
            whole = summary(trainer, found)
            results.add({"model": title, **whole})
            shown = render_profile(whole.pop("profile"))
            print(f"train: {title}\n{figures_text(whole)}\n\n{shown}")


if __name__ == "__main__":
    carry_out(main)
