"""The accounts against the published counts, the real model, and PyTorch's meters."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from gptsmith import GPT, GPTConfig
from gptsmith.config import cost
from gptsmith.config.model import PRESETS
from gptsmith.machine.native import open_library
from gptsmith.model import fused
from gptsmith.model.attention import WAYS
from gptsmith.model.cache import KVCache
from gptsmith.model.dropout import dropout_seeds
from gptsmith.model.recompute import recompute_blocks
from tests.conftest import TINY

BOOK = PRESETS["book"]
BOOK_TIED = GPTConfig(qkv_bias=False)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"qkv_bias": False, "tie_weights": False},
    {"bias": False, "qkv_bias": True, "n_inner": 31},
    {"n_layer": 1, "n_head": 1, "tie_weights": False, "n_inner": 5},
    {"block": "modern", "n_inner": 31},
    {"block": "modern", "n_head": 6, "n_embd": 24, "n_kv_head": 1},
    {"block": "modern", "n_head": 6, "n_embd": 24, "n_kv_head": 2, "n_inner": 31},
    {"block": "modern", "n_head": 6, "n_embd": 24, "n_kv_head": 3, "tie_weights": False},
]

# Where the activations of the blocks, and the logits, take the most memory.
SMALL: dict[str, Any] = {"vocab_size": 65, "n_layer": 5, "n_embd": 96, "n_head": 4}
LONG: dict[str, Any] = SMALL | {"n_layer": 3, "context_length": 300}
LARGE_VOCABULARY: dict[str, Any] = {"vocab_size": 9000, "n_layer": 2, "n_embd": 48, "n_head": 3}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (PRESETS["gpt2"], 124_439_808),
        (PRESETS["gpt2-medium"], 354_823_168),
        (PRESETS["gpt2-large"], 774_030_080),
        (PRESETS["gpt2-xl"], 1_557_611_200),
        (PRESETS["nanogpt"], 124_337_664),
        (BOOK, 163_009_536),
        (BOOK_TIED, 124_412_160),
    ],
)
def test_published_parameter_counts(config: GPTConfig, expected: int) -> None:
    assert cost.parameter_count(config) == expected


def test_the_books_count_line_by_line() -> None:
    count = {part.name: part.count for part in cost.components(BOOK)}
    attention = [value for name, value in count.items() if name.startswith("h.7.attn.")]
    mlp = [value for name, value in count.items() if name.startswith("h.7.mlp.")]
    norms = [value for name, value in count.items() if name.startswith("h.7.ln_")]
    assert count["wte.weight"] == 38_597_376
    assert count["wpe.weight"] == 786_432
    assert count["h.7.attn.c_attn.weight"] == 3 * 589_824
    assert count["h.7.attn.c_attn.bias"] == 0
    assert count["h.7.attn.c_proj.weight"] + count["h.7.attn.c_proj.bias"] == 590_592
    assert sum(attention) == 2_360_064
    assert count["h.7.mlp.c_fc.weight"] + count["h.7.mlp.c_fc.bias"] == 2_362_368
    assert count["h.7.mlp.c_proj.weight"] + count["h.7.mlp.c_proj.bias"] == 2_360_064
    assert sum(mlp) == 4_722_432
    assert sum(norms) == 3_072
    assert cost.block_count(BOOK) == sum(attention + mlp + norms) == 7_085_568
    assert sum(value for name, value in count.items() if name.startswith("h.")) == 85_026_816
    assert count["ln_f.weight"] + count["ln_f.bias"] == 1_536
    assert count["lm_head.weight"] == 38_597_376


@pytest.mark.parametrize("variant", VARIANTS)
def test_components_are_the_models_parameters(variant: dict[str, Any]) -> None:
    config = GPTConfig(**{**TINY, **variant})
    model = GPT(config)
    real = [(name, tuple(p.shape)) for name, p in model.named_parameters(remove_duplicate=False)]
    parts = cost.components(config)
    assert [(part.name, part.shape) for part in parts if not part.absent] == real
    assert cost.parameter_count(config) == sum(p.numel() for p in model.parameters())
    assert any(part.tied for part in parts) == config.tie_weights
    assert cost.weight_bytes(config) == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_formula_gives_its_count(variant: dict[str, Any]) -> None:
    config = GPTConfig(**{**TINY, **variant})
    letters = cost.sizes(config)
    for part in cost.components(config):
        expected = 0 if part.tied or part.absent else eval(part.formula, {}, dict(letters))
        assert part.count == expected, part


@pytest.mark.parametrize("variant", VARIANTS)
def test_kv_cache_is_the_caches_size(variant: dict[str, Any]) -> None:
    config = GPTConfig(**{**TINY, **variant})
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(config, 1, capacity=7, dtype=dtype)
        real = cache.keys.nbytes + cache.values.nbytes
        assert cost.kv_cache_bytes(config, 7, dtype.itemsize) == real


def test_kv_cache_of_gpt2() -> None:
    assert cost.kv_cache_bytes(PRESETS["gpt2"], 1) == 72 * 1024


def test_optimizer_is_adamws_state() -> None:
    config = GPTConfig(**TINY)
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)).loss.backward()
    optimizer.step()
    kept = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert cost.memory(config)["optimizer"] == sum(tensor.nbytes for tensor in kept)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_pytorch_counts(variant: dict[str, Any]) -> None:
    config = GPTConfig(**{**TINY, **variant})
    model, T = GPT(config), config.context_length
    tokens = torch.zeros(2, T, dtype=torch.long)
    forward, training = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):  # the path whose matrix products the counter sees
        with forward, torch.no_grad():
            model(tokens)
        with training:
            model(tokens, tokens).loss.backward()
    per_token = 1 / tokens.numel()
    assert forward.get_total_flops() * per_token == cost.flops_per_token(config, training=False)
    assert training.get_total_flops() * per_token == cost.flops_per_token(config, training=True)


def test_flops_of_gpt2() -> None:
    blocks, head, context = 12 * 12 * 768**2, 50257 * 768, 1024
    expected = 6 * (blocks + head) + 12 * 12 * 768 * context
    assert cost.flops_per_token(PRESETS["gpt2"], training=True) == expected


def peak_allocation(step: Callable[[], Any]) -> int:
    """The most bytes that PyTorch held during a step, above what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = peak = 0
    kineto = profiler.profiler
    assert kineto is not None
    assert kineto.kineto_results is not None
    for event in kineto.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert peak > 0
    return peak


DROPPING, MODERN = {"dropout": 0.1}, {"block": "modern"}
NARROW, AGAIN = {"dtype_bytes": 2}, {"recompute": True}
FUSED, BLOCKS = {"fused": True}, {"blocks": True}


@pytest.mark.parametrize(
    ("sizes", "how"),
    [
        (SMALL, {}),
        (SMALL, NARROW),
        (SMALL, AGAIN),
        (SMALL, BLOCKS),
        (SMALL, FUSED),
        (SMALL, FUSED | NARROW),
        (SMALL, FUSED | AGAIN),
        (SMALL | {"n_inner": 200}, {}),
        (SMALL | {"n_inner": 200}, FUSED),
        (SMALL | DROPPING, BLOCKS),
        (SMALL | DROPPING, BLOCKS | NARROW),
        (SMALL | DROPPING, FUSED),
        (LONG | DROPPING, BLOCKS),
        (LONG | DROPPING, BLOCKS | NARROW | AGAIN),
        (LARGE_VOCABULARY, {}),
        (LARGE_VOCABULARY, NARROW),
        (LARGE_VOCABULARY, FUSED),
        (LARGE_VOCABULARY | DROPPING, BLOCKS | AGAIN),
        (SMALL | MODERN, {}),
        (SMALL | MODERN | DROPPING, BLOCKS),
        (SMALL | MODERN | DROPPING, BLOCKS | NARROW | AGAIN),
        (SMALL | MODERN | {"n_kv_head": 1}, {}),
        (SMALL | MODERN | {"n_kv_head": 2}, NARROW),
        (LARGE_VOCABULARY | MODERN, NARROW),
    ],
)
@pytest.mark.slow
def test_activations_are_what_pytorch_allocates(sizes: dict[str, Any], how: dict[str, Any]) -> None:
    """The estimate for 7 rows against the peak of a forward and backward pass as in training."""
    config, way = GPTConfig(**({"context_length": 128} | sizes)), cost.Pass(**how)
    model, tokens = GPT(config), torch.zeros(7, config.context_length, dtype=torch.long)
    model.attend_by(WAYS["blocks" if way.blocks else "kernel"])
    if way.fused:
        fused.fuse(model, open_library(fused.SOURCE))
    recompute_blocks(model, way.recompute)
    seeds = dropout_seeds(1, 0, torch.arange(7), config.n_layer) if config.dropout else None

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=way.dtype_bytes == 2):
            loss = model.loss(tokens, tokens, seeds)
        loss.backward()

    step()  # gradients exist from here on
    estimate = cost.activation_bytes(config, 7, way)
    assert estimate == pytest.approx(peak_allocation(step), rel=0.1)


def test_a_large_vocabulary_takes_its_logits_in_chunks() -> None:
    """At GPT-2's, the loss of more rows takes no more memory."""
    config = PRESETS["gpt2"]
    chunk = cost.LOGITS_AT_ONCE // 50257 * 50257
    assert cost.loss_bytes(config, 8) == cost.loss_bytes(config, 1) == 12 * chunk + 8 * 50257 * 768
    fused = cost.loss_bytes(config, 8, cost.Pass(fused=True, dtype_bytes=2))
    assert fused == 2 * chunk + 6 * 50257 * 768


STEP = """
import json, os, sys, torch, torch._dynamo  # which an optimizer imports
from gptsmith import GPT, GPTConfig

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

def steps(config, micro_batch):
    model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(config.vocab_size, (micro_batch, config.context_length))
    for _ in range(3):
        model.loss(tokens, tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

for sizes, micro_batch in json.loads(sys.argv[1]):  # each in a process of its own
    if os.fork() == 0:
        steps(GPTConfig(vocab_size=11, context_length=8, n_layer=1, n_head=2, n_embd=16), 2)
        before = status("VmRSS")
        steps(GPTConfig(**sizes), micro_batch)
        print(status("VmHWM") - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_training_memory_is_near_the_peak_of_a_process() -> None:
    models: list[tuple[dict[str, Any], int]] = [
        ({"vocab_size": 65, "context_length": 256, "n_layer": 6, "n_head": 6, "n_embd": 192}, 4),
        ({"vocab_size": 50257, "context_length": 256, "n_layer": 2, "n_head": 4, "n_embd": 128}, 2),
        ({"vocab_size": 8000, "context_length": 512, "n_layer": 3, "n_head": 8, "n_embd": 256}, 2),
    ]
    command = [sys.executable, "-c", STEP, json.dumps(models)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    peaks = [int(line) for line in done.stdout.splitlines()]
    for (sizes, micro_batch), peak in zip(models, peaks, strict=True):
        estimate = cost.training_memory(GPTConfig(**sizes), micro_batch)
        assert 0.7 < estimate / peak < 1.3, sizes


def test_training_memory_grows_with_each_row() -> None:
    config = PRESETS["gpt2"]
    one, two, three = (cost.training_memory(config, rows) for rows in (1, 2, 3))
    assert two - one == pytest.approx(three - two, abs=2)
    assert one > 4 * cost.weight_bytes(config)
    narrow = cost.Pass(dtype_bytes=2)
    assert cost.activation_bytes(config, 2, narrow) < cost.activation_bytes(config, 2)
