"""What this machine does with a model: training and generation, timed.

Fresh weights and random tokens, which cost what real ones do; knows nothing of runs.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from . import accounting, devices
from .config import GPTConfig
from .data.batches import Batches
from .decode import open_decoder
from .generate import generate
from .model import GPT
from .packed import pack_model
from .settings import GREEDY, MachineSettings, TrainingSettings
from .training.loop import Trainer
from .training.optimizers import make_optimizers

WARM_UP = 2  # steps that also set things up, and are not counted


class RandomTokens:
    """A stream of tokens that no text needs to be prepared for."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, vocab_size, length)

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` up to `stop`."""
        return self.tokens[start:stop]


def bench_train(
    config: GPTConfig,
    settings: MachineSettings,
    *,
    rows: int,
    steps: int,
    optimizer: Literal["adamw", "muon"] = "adamw",
) -> dict[str, Any]:
    """Time whole optimizer steps on `rows` windows of the context length."""
    machine = devices.choose_to_learn(replace(settings, micro_batch=rows))
    trainer = make_trainer(config, machine, rows=rows, steps=steps + WARM_UP, optimizer=optimizer)
    seconds = [trainer.step(done).seconds for done in range(steps + WARM_UP)][WARM_UP:]
    return training_figures(config, machine, trainer, seconds)


def make_trainer(
    config: GPTConfig,
    machine: MachineSettings,
    *,
    rows: int,
    steps: int,
    optimizer: Literal["adamw", "muon"],
) -> Trainer:
    """Fresh weights and random tokens, ready to step; `machine` is chosen already."""
    device = devices.prepare_machine(machine)
    torch.manual_seed(0)
    model = GPT(config).to(device)
    devices.prepare_model(model, machine)
    how = machine.compile
    if how == "auto":  # as long runs find
        how = "yes" if device.type == "cuda" else "no"
    T = config.context_length
    training = TrainingSettings(steps=steps, batch_tokens=rows * T, optimizer=optimizer)
    stream = RandomTokens(config.vocab_size, T * rows * 4 + 1)
    return Trainer(
        model=model.train(),
        optimizers=make_optimizers(model, training),
        batches=Batches(stream, T, rows, seed=0),
        settings=training,
        device=device,
        dtype=machine.dtype,
        micro_batch=rows,
        scaler=torch.amp.GradScaler(device.type, enabled=machine.dtype == "fp16"),
        compiled=how,
    )


def training_figures(
    config: GPTConfig, machine: MachineSettings, trainer: Trainer, seconds: Sequence[float]
) -> dict[str, Any]:
    """What steps that took so many seconds each say of the machine."""
    tokens = trainer.settings.batch_tokens
    median = statistics.median(seconds)
    peak = devices.peak_flops(trainer.device)
    flops = accounting.flops_per_token(config, training=True) * tokens / median
    return {
        "device": str(trainer.device),
        "dtype": machine.dtype,
        "threads": machine.threads,
        "compiled": trainer.compiled != "no",
        "parameters": accounting.parameter_count(config),
        "batch_tokens": tokens,
        "tokens_per_second": tokens / median,
        "step_milliseconds": median * 1000,
        "slowest_step_milliseconds": max(seconds) * 1000,
        "model_gigaflops_per_second": flops / 1e9,
        "mfu": None if peak is None else flops / peak,
        "peak_memory_megabytes": devices.peak_memory(trainer.device) / 1e6,
    }


def bench_generate(
    config: GPTConfig,
    settings: MachineSettings,
    *,
    rows: int,
    prompt_tokens: int,
    max_tokens: int,
) -> dict[str, Any]:
    """Time greedy generation: the first token (prefill), and those after it (decode)."""
    if prompt_tokens + max_tokens > config.context_length:
        raise ValueError(
            f"{prompt_tokens} prompt and {max_tokens} new tokens are more than the context_length "
            f"{config.context_length}: lower --max-tokens"
        )
    if settings.dtype == "auto":
        settings = replace(settings, dtype="float32")
    machine = devices.choose(settings)
    device = devices.prepare_machine(machine)
    torch.manual_seed(0)
    model = GPT(config).to(device, devices.weight_dtype(machine.dtype, device)).eval()
    if bits := devices.BITS.get(machine.dtype):
        pack_model(model, bits)
    prompt = torch.randint(config.vocab_size, (rows, prompt_tokens), device=device)
    decoder = None
    if rows == 1 and machine.compile != "no":
        decoder = open_decoder(model, compile=machine.compile == "yes")
    list(generate(model, prompt, min(8, max_tokens), sampling=GREEDY, decoder=decoder))
    times = [time.perf_counter()]
    for _ in generate(model, prompt, max_tokens, sampling=GREEDY, decoder=decoder):
        devices.synchronize(device)
        times.append(time.perf_counter())
    decode = times[-1] - times[1]
    return {
        "device": str(device),
        "dtype": machine.dtype,
        "threads": machine.threads,
        "compiled": decoder is not None,
        "parameters": accounting.parameter_count(config),
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": max_tokens,
        "prefill_tokens_per_second": rows * prompt_tokens / (times[1] - times[0]),
        "decode_tokens_per_second": rows * (max_tokens - 1) / decode if decode else None,
        "first_token_milliseconds": (times[1] - times[0]) * 1000,
        "peak_memory_megabytes": devices.peak_memory(device) / 1e6,
    }
