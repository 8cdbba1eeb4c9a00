"""How fast transformers generates with a folder's weights, as its own users call it.

`python -m gptsmith.cli.peers QUESTION` writes the answer to a file that the question names, since
what
a library may say on the way is no part of it. Knows nothing of our own model.

Shapes:  B rows    T prompt tokens
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..machine import devices
from ..machine.files import write_json
from .timing import WARM_UP_TOKENS, generation_figures, random_prompt

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def measure(
    folder: str,
    *,
    device: str,
    threads: int,
    compiled: bool,
    dtype: str,
    rows: int,
    prompt_tokens: int,
    max_tokens: int,
) -> dict[str, Any]:
    """Time the GPT-2 in a Hugging Face folder in this very process."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype])
    model = model.eval().to(device)
    prompt = random_prompt(model.config.vocab_size, rows, prompt_tokens).to(device)
    return time_generate(model, prompt, max_tokens, compiled=compiled)


def time_generate(model: Any, prompt: Tensor, max_tokens: int, *, compiled: bool) -> dict[str, Any]:
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


if __name__ == "__main__":
    question = json.loads(sys.argv[1])
    write_json(Path(question.pop("answer")), measure(**question))
