"""Choose what is automatic in how a run computes, by timing its own micro-batches in every way.

These are the precision, the implementation of attention and the size of a micro-batch. The run does
not change: gradients are discarded, and each step seeds its own random numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from ..config.model import GPTConfig
from ..config.settings import MachineSettings
from ..machine import devices
from ..machine.chooser import Choice, choose, once, timed
from ..machine.environment import world_size
from ..machine.processes import from_first_process, sum_of_numbers
from .loop import Trainer
from .memory import learned_in, micro_batch_rows
from .trainer import choose_fused, use

SECONDS = 1.5  # of measuring a choice, if two passes of each candidate take no longer
SHARE = 0.03  # of the run's tokens, that measuring may compute
PASS_TOKENS = 1024  # of a timed pass on a CPU, where more would change the order of few candidates
LEAST_TOKENS = 64  # of a timed pass in a very short run
LEAST_MICRO_BATCH = 2048  # tokens; below, a CPU's many small operations take longer
MOST_SIZES = 3  # of micro-batches that are compared
SHOWN = 2  # other candidates in the plan; all are recorded

Ways = Mapping[str, MachineSettings]  # candidates by name, in the order of preference


class Measured(NamedTuple):
    """A choice, and the tokens of a timed pass that its seconds are for."""

    what: str
    choice: Choice
    tokens: int

    @property
    def speeds(self) -> dict[str, float]:
        """Tokens per second of each candidate, forward and backward."""
        return {name: round(self.tokens / each, 1) for name, each in self.choice.seconds.items()}

    def __str__(self) -> str:
        """Say what was chosen: "precision: float32, 13,100 tokens/s (bf16 7,900)"."""
        chosen, speeds = self.choice.name, self.speeds
        others = sorted(speeds.keys() - {chosen}, key=lambda name: -speeds[name])
        shown = [f"{name} {speeds[name]:,.0f}" for name in others[:SHOWN]]
        if len(others) > SHOWN:
            shown.append(f"{len(others) - SHOWN} slower")
        earlier = ", measured earlier" if self.choice.remembered else ""
        return (
            f"{self.what}: {chosen}, {speeds[chosen]:,.0f} tokens/s ({'; '.join(shown)}){earlier}"
        )


def possible(machine: MachineSettings, config: GPTConfig, device: torch.device) -> MachineSettings:
    """Return the settings with `fused` "auto" only where both ways can run, or SettingError.

    The pieces attend in their own way, so that a named attention means to do without them.
    """
    if machine.fused == "auto" and machine.attention != "auto":
        machine = replace(machine, fused="no")
    can = choose_fused(machine, config, device).fused == "yes"
    return machine if can else replace(machine, fused="no")


def ways(
    machine: MachineSettings,
    config: GPTConfig,
    rows: int,
    device: torch.device,
    learned: int | None = None,
) -> dict[str, MachineSettings]:
    """Return the ways to compute a batch of `rows` on a device, without an "auto" but for compile.

    `learned` parameters learn (default: all), on which the memory of a micro-batch depends.

    The order is that of preference: float32 first, which is more exact, and PyTorch's attention.
    The fused pieces have an attention of their own. `machine` must be `possible`.
    """
    dtypes: Any = devices.precisions(device) if machine.dtype == "auto" else [machine.dtype]
    if machine.shard == "yes":  # each process would scale the gradients of its rows
        dtypes = [dtype for dtype in dtypes if dtype != "fp16"]
    attentions: list[Any] = [machine.attention]
    if machine.attention == "auto":  # only a CPU has room for the weights that blocks keep
        attentions = ["kernel", "blocks"] if device.type == "cpu" else ["kernel"]
    paths: dict[str, dict[str, Any]] = {}
    if machine.fused != "yes":
        paths = {name: {"attention": name, "fused": "no"} for name in attentions}
    if machine.fused != "no":
        paths["fused"] = {"attention": attentions[0], "fused": "yes"}
    found = {}
    for dtype, path in product(dtypes, paths):
        parts = [dtype] * (len(dtypes) > 1) + [path] * (len(paths) > 1)
        way = replace(machine, dtype=dtype, **paths[path])
        micro_batch = micro_batch_rows(way, config, rows, device, learned)
        found[", ".join(parts)] = replace(way, micro_batch=micro_batch)
    return found


def question(candidates: Ways) -> str:
    """Return what differs between candidates, in words."""
    fields: dict[str, set[Any]] = {"precision": {way.dtype for way in candidates.values()}}
    fields["attention"] = {(way.attention, way.fused) for way in candidates.values()}
    return " and ".join(name for name, values in fields.items() if len(values) > 1)


def sizes(way: MachineSettings, context_length: int) -> dict[str, MachineSettings]:
    """Return the same way with micro-batches of half its rows, a quarter and so on, by name."""
    rows, found = way.micro_batch or 1, dict[str, MachineSettings]()
    while len(found) < MOST_SIZES and (not found or rows * context_length >= LEAST_MICRO_BATCH):
        found[f"{rows} rows"] = replace(way, micro_batch=rows)
        if rows == 1:
            break
        rows = -(-rows // 2)
    return found


def choose_ways(
    trainer: Trainer, asked: MachineSettings, steps: int
) -> tuple[MachineSettings, list[Measured]]:
    """Choose what is automatic in the settings `asked`, and let the trainer compute that way.

    The run has so many steps. Returns the settings without an "auto" but for compile, and what was
    measured.
    """
    compiled = trainer.compiled
    trainer.compile("no")  # compiling every way would take minutes
    T, rows = trainer.batches.row_tokens, trainer.batches.rows
    run_tokens = steps * T * rows / world_size()
    timing = Timing(trainer, tokens_left=int(SHARE * run_tokens))
    config = replace(trainer.model.config, context_length=T)
    candidates = ways(asked, config, rows, trainer.device, learned_in(trainer.model))
    on_cpu = trainer.device.type == "cpu"
    few = max(1, PASS_TOKENS // T) if on_cpu else rows
    found = [timing.choose_way(question(candidates), candidates, few)]
    chosen = candidates[found[0].choice.name]
    if asked.micro_batch is None and on_cpu:
        # What memory is free may differ between processes, and all must measure the same.
        rows = from_first_process(chosen.micro_batch or rows)
        candidates = sizes(replace(chosen, micro_batch=rows), T)
        found.append(timing.choose_size(candidates, rows))
        chosen = candidates[found[1].choice.name]
    use(trainer, chosen)
    trainer.model.zero_grad()
    trainer.compile(compiled)
    return chosen, [each for each in found if each.choice.seconds]


@dataclass
class Timing:
    """Times passes of a trainer: forward and backward of some rows of its first batch."""

    trainer: Trainer
    tokens_left: int  # that may still be computed, on this process

    def choose_way(self, what: str, candidates: Ways, rows: int) -> Measured:
        """Choose among candidates by passes of so many rows, or of all that a process has.

        Where a run is so short that two such passes of each would take too large a share of it,
        passes are smaller, and what they show is not remembered.
        """
        tokens, most = self.pass_tokens(rows), self.tokens_left // (2 * len(candidates))
        lasting = tokens <= most or len(candidates) == 1
        if not lasting:
            tokens = max(most, LEAST_TOKENS)
        return self.choose(what, candidates, tokens, self.measured, lasting=lasting)

    def choose_size(self, candidates: Ways, rows: int) -> Measured:
        """Choose the micro-batch by passes of so many rows, but the first one in a short run."""
        tokens = self.pass_tokens(rows)
        if tokens * 2 * len(candidates) > self.tokens_left:
            return Measured("micro-batch", Choice(next(iter(candidates))), tokens)
        return self.choose("micro-batch", candidates, tokens, self.measured_if_quick)

    def pass_tokens(self, rows: int) -> int:
        """Return the tokens of a pass of so many rows, or of all that each process has."""
        rows = min(rows, self.trainer.batches.rows // world_size())
        return rows * self.trainer.batches.row_tokens

    def choose(
        self,
        what: str,
        candidates: Ways,
        tokens: int,
        measured: Callable[[Ways, int], Choice],
        *,
        lasting: bool = True,
    ) -> Measured:
        """Choose by passes of so many tokens; what is `lasting` is remembered."""
        names = list(candidates)
        if len(names) == 1:
            choice = Choice(names[0])
        elif not lasting:
            choice = measured(candidates, tokens)
        else:
            # Not `init`, which says how weights are drawn.
            config = replace(self.trainer.model.config, init="gpt2")
            about = (
                asdict(config),
                asdict(candidates[names[0]]),
                tokens,
                type(self.trainer.objective).__name__,
                learned_in(self.trainer.model),
                world_size(),
            )
            work = partial(measured, candidates, tokens)
            choice = once(what.replace(" ", "-"), about, names, work)
        return Measured(what, choice, tokens * world_size())

    def measured_if_quick(self, candidates: Ways, tokens: int) -> Choice:
        """As `measured`, but take the first where passes take seconds: size matters little then."""
        first, few = next(iter(candidates)), min(tokens, PASS_TOKENS)
        if self.seconds(candidates[first], few) * tokens / few > SECONDS:
            return Choice(first)
        return self.measured(candidates, tokens)

    def measured(self, candidates: Ways, tokens: int) -> Choice:
        """Measure the candidates by passes of so many tokens.

        Where these take seconds, small passes warm the machine up, and each is timed once.
        """
        names, few, budget = list(candidates), min(tokens, 2 * LEAST_TOKENS), 0.0
        self.seconds(candidates[names[0]], few)
        if self.seconds(candidates[names[0]], few) * tokens / few > SECONDS:
            for name in names[1:]:
                self.seconds(candidates[name], few)
        else:
            first = self.seconds(candidates[names[0]], tokens)
            passes = min(max(SECONDS / first, len(names)), self.tokens_left / tokens - len(names))
            budget = passes * first
        return choose(names, lambda name: self.seconds(candidates[name], tokens), budget=budget)

    def seconds(self, way: MachineSettings, tokens: int) -> float:
        """Return the seconds of a pass of so many tokens; the mean over the processes."""
        trainer = self.trainer
        T = trainer.batches.row_tokens
        rows, length = max(1, tokens // T), min(T, tokens)
        batch = [part[:rows, ..., :length].contiguous() for part in trainer.load(0)]
        trainer.model.train()
        use(trainer, way)
        self.tokens_left -= tokens

        def work() -> None:
            trainer.gradient_in_memory(*batch)
            devices.synchronize(trainer.device)

        return sum_of_numbers([timed(work)], trainer.device)[0] / world_size()
