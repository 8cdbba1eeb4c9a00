"""Time training and generation, with random weights and tokens, which take as long as real ones.

Knows nothing of runs, flags or how figures are shown.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.building import load_folder
from ..config import cost
from ..config.model import GPTConfig
from ..config.settings import MachineSettings, RunSettings, TrainingSettings
from ..data.batches import Batches
from ..generation.compiled import CompiledDecoder, open_decoder
from ..generation.crossover import tune
from ..generation.writing import timed_tokens
from ..machine import devices
from ..machine.terminal import tell
from ..model.attention import WAYS
from ..model.fused import FusedBlock
from ..model.gpt import GPT
from ..model.quantized import pack_model
from ..training.choices import choose_ways, possible, ways
from ..training.loop import Trainer
from ..training.task import CountedTargets
from ..training.trainer import make_trainer

WARM_UP, WARM_UP_TOKENS = 2, 8  # steps and tokens that are not timed, since they allocate memory
LONG_RUN = 10_000  # steps, which allow for measuring
PROMPT_TOKENS, NEW_TOKENS = 32, 128  # by default, if the context has room for them


def fresh_model(config: GPTConfig) -> GPT:
    """Return an untrained model, with the same weights every time."""
    torch.manual_seed(0)
    return GPT(config)


# -- training


class RandomTokens:
    """A stream of random token ids, for timing without a dataset."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` up to `stop`: (stop - start,) int64."""
        return self.tokens[start:stop]


def fresh_trainer(
    config: GPTConfig, settings: MachineSettings, *, rows: int, **training: Any
) -> Trainer:
    """Return a trainer with random weights and tokens, whose steps take `rows` full windows.

    `training` are further TrainingSettings. Unless set, a micro-batch is the whole batch. Precision
    and attention are chosen as for a long run, by measuring, unless they are set; a line says so.
    """
    machine = devices.choose_to_learn(settings)
    device, compile = devices.prepare_machine(machine), machine.compile
    if compile == "auto":  # take what a long run would choose
        compile = "yes" if device.type == "cuda" else "no"
    machine = replace(machine, compile=compile, micro_batch=machine.micro_batch or rows)
    machine = possible(machine, config, device)
    *_, way = ways(machine, config, rows, device).values()
    run = RunSettings(
        model=config,
        training=TrainingSettings(batch_tokens=rows * config.context_length, **training),
        machine=way,
    )
    tokens = RandomTokens(config.vocab_size, 4 * run.training.batch_tokens + 1)
    batches = Batches(tokens, config.context_length, rows, seed=run.training.seed)
    model = fresh_model(config).to(device).train()
    trainer = make_trainer(model, run, batches, CountedTargets(), device)
    for measured in choose_ways(trainer, machine, LONG_RUN)[1]:
        tell(str(measured))
    return trainer


def bench_train(
    config: GPTConfig, settings: MachineSettings, *, rows: int, steps: int, **training: Any
) -> dict[str, Any]:
    """Time so many whole optimizer steps, as `fresh_trainer` makes them."""
    trainer = fresh_trainer(config, settings, rows=rows, steps=WARM_UP + steps, **training)
    seconds = [trainer.step(done).seconds for done in range(WARM_UP + steps)]
    return training_figures(trainer, seconds[WARM_UP:])


def attention_of(model: GPT) -> str:
    """Return the name in WAYS of the implementation of attention that a model uses."""
    return next(name for name, way in WAYS.items() if model.get_submodule("h.0.attn").attend is way)


def training_figures(trainer: Trainer, seconds: Sequence[float]) -> dict[str, Any]:
    """Return the figures of training, given the seconds of each step."""
    config, tokens = trainer.model.config, trainer.settings.batch_tokens
    median, peak = statistics.median(seconds), devices.peak_flops(trainer.device)
    flops = cost.flops_per_token(config, training=True) * tokens / median
    return {
        "device": str(trainer.device),
        "dtype": trainer.dtype,
        "attention": attention_of(trainer.model),
        "fused": isinstance(trainer.model.h[0], FusedBlock),
        "threads": torch.get_num_threads(),
        "compiled": trainer.compiled != "no",
        "parameters": cost.parameter_count(config),
        "batch_tokens": tokens,
        "tokens_per_second": tokens / median,
        "step_milliseconds": median * 1000,
        "slowest_step_milliseconds": max(seconds) * 1000,
        "model_gigaflops_per_second": flops / 1e9,
        "mfu": None if peak is None else flops / peak,
        "peak_memory_megabytes": devices.peak_memory(trainer.device) / 1e6,
    }


# -- generation


def fitting(config: GPTConfig, prompt: int | None, new: int | None) -> tuple[int, int]:
    """Return the numbers of prompt and new tokens: the given ones, or defaults that fit.

    ValueError if the given ones do not fit the context.
    """
    room = config.context_length + 1  # the last new token is never read
    if prompt is None:
        prompt = max(1, min(PROMPT_TOKENS, room // 4, room - (new or 1)))
    if new is None:
        new = max(1, min(NEW_TOKENS, room - prompt))
    if prompt + new > room:
        raise ValueError(
            f"{prompt} prompt and {new} new tokens do not fit the context_length "
            f"{config.context_length}: lower --max-tokens"
        )
    return prompt, new


def bench_generate(
    config: GPTConfig,
    settings: MachineSettings,
    *,
    rows: int,
    prompt_tokens: int,
    max_tokens: int,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Time greedy generation: the first token (prefill), and those after it (decode).

    With a `folder`, which `find_model` found, it is the model there, else one with fresh weights.
    """
    machine = devices.choose(settings)
    device = devices.prepare_machine(machine)
    model = model_to_time(config, machine, device, folder)
    prompt = random_prompt(config.vocab_size, rows, prompt_tokens).to(device)
    decoder = open_decoder(model, machine.compile)
    if isinstance(decoder, CompiledDecoder):
        tune(decoder)
    timed_tokens(model, prompt, min(WARM_UP_TOKENS, max_tokens), decoder=decoder)
    times, tokens = timed_tokens(model, prompt, max_tokens, decoder=decoder)
    return {
        "device": str(device),
        "dtype": machine.dtype,
        "threads": machine.threads,
        "compiled": decoder is not None and decoder.takes(rows),  # decoding
        "parameters": cost.parameter_count(config),
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": max_tokens,
        **generation_figures(times, rows, prompt_tokens),
        "peak_memory_megabytes": devices.peak_memory(device) / 1e6,
        "tokens": tokens.tolist(),
    }


def model_to_time(
    config: GPTConfig, machine: MachineSettings, device: torch.device, folder: Path | None
) -> GPT:
    """Return a folder's model, or an untrained one, with the dtype and attention of `machine`."""
    how = devices.loading(machine.dtype, device)
    if folder is not None:
        model, _ = load_folder(folder, **how)
    else:
        model = fresh_model(config).to(device, how["dtype"]).eval()
        if how["bits"] is not None:
            pack_model(model, how["bits"])
    model.attend_by(WAYS[machine.attention])
    return model


def random_prompt(vocab_size: int, rows: int, length: int) -> Tensor:
    """Return random prompts, (rows, length), the same for every system that is timed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (rows, length), generator=generator)


def generation_figures(
    times: Sequence[float], rows: int, prompt_tokens: int
) -> dict[str, float | None]:
    """Return the speeds, given the times of the start and of each token, in seconds.

    Decoding begins after the first token, so its speed is None if there is only one.
    """
    first, decode = times[1] - times[0], times[-1] - times[1]
    return {
        "prefill_tokens_per_second": rows * prompt_tokens / first,
        "decode_tokens_per_second": rows * (len(times) - 2) / decode if decode else None,
        "first_token_milliseconds": first * 1000,
    }


def alone(model: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `bench generate` finds in a process of its own, whose peak memory is then its own."""
    flags = [(f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items()]
    words = ["bench", "generate", model, "--json", *(word for pair in flags for word in pair)]
    command = [sys.executable, "-m", "gptsmith", *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or [f"a process ended with {done.returncode}"]
        raise ValueError(said[-1].removeprefix("gptsmith: "))
    return dict(json.loads(done.stdout))
