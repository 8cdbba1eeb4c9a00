"""What this machine does with a model: training and generation, timed.

Fresh weights and random tokens, which cost what real ones do; knows nothing of runs.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..checkpoint.saved import load_folder
from ..config import cost
from ..config.model import GPTConfig
from ..config.settings import GREEDY, MachineSettings, TrainingSettings
from ..data.batches import Batches
from ..generation.compiled import open_decoder
from ..generation.writing import generate_tokens
from ..machine import devices
from ..model.gpt import GPT
from ..model.quantized import pack_model
from ..training.float8 import prepare_model
from ..training.loop import Trainer
from ..training.optimizers import make_optimizers

WARM_UP = 2  # steps that also set things up, and are not counted
WARM_UP_TOKENS = 8
PROMPT_TOKENS, NEW_TOKENS = 32, 128  # where the context has room for them


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
    model = fresh_model(config).to(device)
    prepare_model(model, machine)
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
    flops = cost.flops_per_token(config, training=True) * tokens / median
    return {
        "device": str(trainer.device),
        "dtype": machine.dtype,
        "threads": machine.threads,
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
    fitting(config, prompt_tokens, max_tokens)
    if settings.dtype == "auto":
        settings = replace(settings, dtype="float32")
    machine = devices.choose(settings)
    device = devices.prepare_machine(machine)
    how = devices.loading(machine.dtype, device)
    if folder is None:
        model = fresh_model(config).to(device, how["dtype"]).eval()
        if how["bits"] is not None:
            pack_model(model, how["bits"])
    else:
        model, _ = load_folder(folder, **how)
    prepare_model(model, machine)
    prompt = random_prompt(config.vocab_size, rows, prompt_tokens).to(device)
    decoder = open_decoder(model, settings.compile)
    list(
        generate_tokens(
            model, prompt, min(WARM_UP_TOKENS, max_tokens), sampling=GREEDY, decoder=decoder
        )
    )
    times, steps = [time.perf_counter()], []
    for step in generate_tokens(model, prompt, max_tokens, sampling=GREEDY, decoder=decoder):
        devices.synchronize(device)
        times.append(time.perf_counter())
        steps.append(step)
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
        "tokens": torch.stack(steps, dim=1).tolist(),
    }


def fitting(config: GPTConfig, prompt: int | None, new: int | None) -> tuple[int, int]:
    """Prompt and new tokens: as asked for, else the usual numbers or what the context holds.

    ValueError where what is asked for does not fit.
    """
    room = config.context_length + 1  # the last new token is never read
    if prompt is None:
        prompt = max(1, min(PROMPT_TOKENS, room // 4, room - (new or 1)))
    if new is None:
        new = max(1, min(NEW_TOKENS, room - prompt))
    if prompt + new > room:
        raise ValueError(
            f"{prompt} prompt and {new} new tokens are more than the context_length "
            f"{config.context_length}: lower --max-tokens"
        )
    return prompt, new


def fresh_model(config: GPTConfig) -> GPT:
    """A model that was taught nothing: the same weights every time."""
    torch.manual_seed(0)
    return GPT(config)


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


def random_prompt(vocab_size: int, rows: int, length: int) -> Tensor:
    """Tokens to continue, (rows, length): the same for every system that is timed."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (rows, length), generator=generator)


def generation_figures(
    times: Sequence[float], rows: int, prompt_tokens: int
) -> dict[str, float | None]:
    """Speeds from the seconds at which generation began and at which each token was there.

    Decoding is what comes after the first token, so one token alone tells nothing of it.
    """
    first, decode = times[1] - times[0], times[-1] - times[1]
    return {
        "prefill_tokens_per_second": rows * prompt_tokens / first,
        "decode_tokens_per_second": rows * (len(times) - 2) / decode if decode else None,
        "first_token_milliseconds": first * 1000,
    }
