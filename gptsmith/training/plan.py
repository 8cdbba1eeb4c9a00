"""The plan of a run, shown before its first step: its sizes, memory and time.

The time is measured on this machine, and the memory estimated. The run itself does not change.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ..config import cost
from ..config.fitting import Devices, Way, sent_bytes, ways
from ..machine import devices
from ..machine.chooser import Choice, choose, timed
from ..machine.environment import world_size
from ..machine.processes import sum_of_numbers
from ..machine.terminal import Display, count, duration, size
from .choices import Measured
from .loop import Trainer
from .memory import all_learn, learned_in, needed_memory, needed_parts, obstacle
from .run import Run
from .sharding import local

LEAST_TRIALS, MOST_TRIALS = 2, 8
# Seconds that a run must take for torch.compile, which takes half a minute, to pay off: it saves a
# third of a step on a GPU; on a CPU a sixth where matrix products are small, and little elsewhere.
WORTH_COMPILING = {"cuda": 120.0, "cpu": 600.0}
GAIN = 0.05  # of a step's time, below which the different rounding is not worth it


@dataclass(frozen=True)
class Trial:
    """Measured seconds of the two parts of a step."""

    gradient: float  # forward and backward of this process's rows
    update: float  # gradient clipping and the optimizers
    choice: Choice | None = field(default=None, compare=False)  # of whether to compile, if tried

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.gradient + self.update


def show_plan(run: Run, trial: Trial, measured: Sequence[Measured]) -> None:
    """Show the plan of a run, and what was measured to choose how it computes."""
    settings, trainer = run.settings, run.trainer
    config, machine, training = trainer.model.config, settings.machine, settings.training
    assert machine.micro_batch is not None
    assert machine.threads is not None
    left, yes_or_no = training.steps - run.done, "yes" if trainer.sharded else "no"
    rows = {
        "model": f"{cost.parameter_count(config):,} parameters: "
        f"{count(config.n_layer, 'layer')}, {count(config.n_head, 'head')}, "
        f"{count(config.n_embd, 'channel')}, context {config.context_length}, "
        f"vocabulary {config.vocab_size:,}",
        **run.task.plan(run.done),
        "machine": f"{trainer.device}, {machine.dtype}, {count(machine.threads, 'thread')}, "
        f"micro-batch of {count(machine.micro_batch, 'row')}"
        + ("" if machine.compile == "no" else ", compiled")
        + (", activations recomputed" if machine.recompute == "yes" else "")
        + (f", {world_size()} processes" if world_size() > 1 else ""),
        **({"fastest": "; ".join(map(str, measured))} if measured else {}),
        **({"sharded": f"{yes_or_no}: {run.sharding.reason}"} if world_size() > 1 else {}),
        **memory_rows(run),
        "time": f"about {duration(run_seconds(run, trial))} for {count(left, 'step')}",
        "run": str(run.folder),
    }
    title = "Resuming" if run.done else "Training"
    run.display.table(title, rows)


def memory_rows(run: Run) -> dict[str, str]:
    """Return the rows of the memory that each process needs, what for, and what other ways need."""
    machine, trainer = run.settings.machine, run.trainer
    assert machine.micro_batch is not None
    config = replace(trainer.model.config, context_length=trainer.batches.row_tokens)
    rows, learned = machine.micro_batch, learned_in(trainer.model)
    may_shard = world_size() > 1 and all_learn(trainer.model)
    may_shard = may_shard and obstacle(machine, trainer.device, compile=False, fused=False) is None
    own = replace(machine, shard="yes" if trainer.sharded else "no")
    parts, others = needed_parts(own, config, rows, learned), []
    for way in ways():
        wanted: dict[str, Any] = {
            "shard": "yes" if way.sharded else "no",
            "recompute": "yes" if way.recomputed else "no",
        }
        changed = {name: word for name, word in wanted.items() if word != getattr(own, name)}
        if changed and (may_shard or not way.sharded):
            other_way = replace(own, **changed)
            if way.sharded:  # which cannot go with the fused pieces
                other_way = replace(other_way, fused="no")
            other = needed_memory(other_way, config, rows, learned)
            flags = " ".join(f"--{name} {word}" for name, word in changed.items())
            others.append(f"{size(other)} with {flags}")
    where = "in each process" if world_size() > 1 else "on the device"
    found = {
        "memory": f"about {size(sum(parts.values()))} {where}, in addition to PyTorch itself",
        "of that": ", ".join(f"{name} {size(part)}" for name, part in parts.items() if part),
        "otherwise": ", ".join(others),
    }
    if may_shard:
        way = Way(sharded=trainer.sharded, recomputed=False)
        sent, each = sent_bytes(config, Devices(count=world_size()), way), "step"
        if trainer.sharded:  # gathers and sums in every pass
            each = "micro-batch"
        found["sent"] = f"{size(sent)} by each process in a {each}"
    return found


def try_out(trainer: Trainer, display: Display) -> Trial:
    """Measure the parts of a step by running those of the first step a few times.

    The run does not change: gradients and updates are discarded, and each step seeds its own random
    numbers. Call this before loading the optimizers' state. A micro-batch that is too large for the
    GPU is halved; where torch.compile fails (as without a C++ compiler), a line says so and the run
    is not compiled.
    """
    rows = len(trainer.batches.mine)
    batch = [part[: trainer.micro_batch] for part in trainer.load(0)]
    trainer.model.train()
    if trainer.compiled != "no":
        try:
            trainer.gradient_in_memory(*batch)
        except Exception as error:  # the compiler's errors have no class in common
            do_without_compiler(trainer, display, error)
    micro_batch = seconds_of(lambda: trainer.gradient_in_memory(*batch), trainer.device)
    update = seconds_of(partial(dry_update, trainer), trainer.device)
    for optimizer in trainer.optimizers:
        optimizer.state.clear()
    trainer.model.zero_grad()
    seconds = micro_batch * -(-rows // trainer.micro_batch), update
    # The mean over the processes, so that all make the same choices.
    totals = sum_of_numbers(seconds, trainer.device)
    gradient, update = (total / world_size() for total in totals)
    return Trial(gradient, update)


def do_without_compiler(trainer: Trainer, display: Display, error: Exception) -> None:
    """Turn torch.compile off, and say why."""
    trainer.compile("no")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    display.say(f"torch.compile failed, so the run is not compiled: {reason}")


@torch.no_grad()
def dry_update(trainer: Trainer) -> None:
    """Clip the gradients and update the weights as a step does, then restore the weights."""
    weights = [*map(local, trainer.parameters)]
    originals = [weight.clone() for weight in weights]
    trainer.clip()
    for optimizer in trainer.optimizers:
        optimizer.step()
    torch._foreach_copy_(weights, originals)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a few calls, after a first one that warms up."""
    seconds: list[float] = []
    # All processes must call it equally often, as the gradients are summed over them.
    most = MOST_TRIALS if world_size() == 1 else LEAST_TRIALS
    while len(seconds) < LEAST_TRIALS or (sum(seconds) < 0.3 and len(seconds) < most):

        def waited() -> None:
            work()
            devices.synchronize(device)

        seconds.append(timed(waited))
    return statistics.median(seconds[1:])


def compile_if_it_pays(trainer: Trainer, display: Display, left: int, eager: Trial) -> Trial:
    """Compile if the `left` steps take long enough, and keep it if that is faster.

    Returns the trial of the choice.
    """
    if eager.step * left < WORTH_COMPILING.get(trainer.device.type, math.inf):
        return eager
    display.say("trying torch.compile, since the run is long")
    trials = {"no": eager}

    def measure(mode: str) -> float:
        if mode == "no":
            return eager.step
        try:
            trainer.compile("yes")
        except Exception as error:  # it imports the compiler, which looks at the system
            do_without_compiler(trainer, display, error)
            return math.inf
        trials["yes"] = try_out(trainer, display)
        return trials["yes"].step if trainer.compiled == "yes" else math.inf

    choice = choose(["no", "yes"], measure, budget=0.0, close=GAIN)
    if choice.name == "no":
        trainer.compile("no")
    return replace(trials[choice.name], choice=choice)


def run_seconds(run: Run, trial: Trial) -> float:
    """Estimate the seconds left in a run: its steps and its evaluations.

    Per token, an evaluation costs a third of a step, as it has no backward pass.
    """
    settings, batches = run.settings, run.trainer.batches
    left = settings.training.steps - run.done
    evaluations = -(-left // settings.report.evaluate_every)
    share = run.task.held_out / (batches.rows * batches.row_tokens)
    return trial.step * left + trial.gradient / 3 * share * evaluations
