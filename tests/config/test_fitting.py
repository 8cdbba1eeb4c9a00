"""What each of N devices needs to train a model: the sums, and what PyTorch allocates."""

import gc
import json
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gptsmith import GPT, GPTConfig
from gptsmith.cli.main import main
from gptsmith.config import cost
from gptsmith.config.fitting import (
    MEMORY_SHARE,
    Devices,
    Way,
    largest_micro_batch,
    memory_parts,
    sent_bytes,
    ways,
)
from gptsmith.config.model import PRESETS
from tests.config.test_cost import SMALL, peak_allocation

XL = PRESETS["gpt2-xl"]


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_on_one_device_the_parts_are_the_memory_of_training(dtype: Any, recomputed: bool) -> None:
    parts = memory_parts(
        XL, 3, Devices(count=1, dtype=dtype), Way(sharded=False, recomputed=recomputed)
    )
    width = {"float32": 4, "bf16": 2}[dtype]
    whole = cost.training_memory(XL, 3, cost.Pass(dtype_bytes=width, recompute=recomputed))
    assert sum(parts.values()) == whole
    assert parts["weights"] == 4 * 1_557_611_200
    alone = memory_parts(
        XL, 3, Devices(count=1, dtype=dtype), Way(sharded=True, recomputed=recomputed)
    )
    assert alone == parts


def test_what_does_not_learn_has_no_gradients() -> None:
    parts = memory_parts(XL, 3, Devices(count=1), Way(sharded=False, recomputed=False), learned=7)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (4 * 1_557_611_200, 28, 56)
    assert sum(parts.values()) == cost.training_memory(XL, 3, cost.Pass(dtype_bytes=2), learned=7)


def test_sharded_each_device_has_its_part_and_what_it_gathers() -> None:
    whole, sharded = (
        memory_parts(XL, 3, Devices(count=8), Way(sharded=sharded, recomputed=False))
        for sharded in (False, True)
    )
    for part in ("weights", "gradients", "optimizer"):
        assert sharded[part] == whole[part] / 8
    for part in ("activations", "loss", "fragmentation"):
        assert sharded[part] == whole[part]
    assert whole["gathered"] == 0
    # Token and position embeddings and the final norm; three of 48 blocks.
    outside = 50257 * 1600 + 1024 * 1600 + 2 * 1600
    assert sharded["gathered"] == 4 * (2 * outside + 3 * (1_557_611_200 - outside) // 48)


@pytest.mark.parametrize(("count", "whole", "sharded"), [(1, 0, 0), (2, 1, 1.5), (4, 1.5, 2.25)])
def test_what_is_sent_as_a_multiple_of_the_weights(
    count: int, whole: float, sharded: float
) -> None:
    devices = Devices(count=count)
    for way in ways():
        times = sharded if way.sharded else whole
        assert sent_bytes(XL, devices, way) == times * cost.weight_bytes(XL)


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    devices = Devices(count=8, memory=80 * 10**9)
    found = []
    for way in ways():
        rows = largest_micro_batch(XL, devices, way)
        needed = [sum(memory_parts(XL, n, devices, way).values()) for n in (rows, rows + 1)]
        assert needed[0] <= MEMORY_SHARE * 80e9 < needed[1]
        found.append(rows)
    assert found[3] > found[1] > found[2] > found[0] > 0
    small = Devices(count=8, memory=10**9)
    assert [largest_micro_batch(XL, small, way) for way in ways()] == [0, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_allocates_what_is_predicted(dtype: Any, recomputed: bool) -> None:
    """All tensors from the fresh model to the second update, whose gradients are added to those
    of the first; PyTorch does not see the heap's fragmentation."""
    config = GPTConfig(**SMALL, context_length=128)

    def two_steps() -> None:
        model = GPT(config)
        for block in model.h if recomputed else []:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        tokens = torch.zeros(4, config.context_length, dtype=torch.long)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
                loss = model.loss(tokens, tokens)
            loss.backward()
            optimizer.step()

    parts = memory_parts(
        config, 4, Devices(count=1, dtype=dtype), Way(sharded=False, recomputed=recomputed)
    )
    predicted = sum(parts.values()) - parts["fragmentation"]
    gc.collect()  # or what others leave is freed while this is measured
    assert predicted == pytest.approx(peak_allocation(two_steps), rel=0.15)


def test_describe_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "gpt2-xl", "--devices", "8", "--memory", "80GB"]) == 0
    page = capsys.readouterr().out
    assert "DEVICES  8 with 74.5 GiB each; training in bf16, one context of 1,024 tokens" in page
    assert "largest micro-batch" in page
    assert max(map(len, page.splitlines())) <= 100
    words = ["--devices", "8", "--dtype", "float32", "--json"]
    assert main(["describe", "gpt2-xl", *words]) == 0
    found = json.loads(capsys.readouterr().out)["devices"]
    assert (found["count"], found["memory"], found["dtype"]) == (8, None, "float32")
    assert len(found["ways"]) == 4
    for way in found["ways"]:
        *parts, total = way["memory"].values()
        assert sum(parts) == total
    assert found["ways"][0]["memory"]["total"] == cost.training_memory(XL, 1)
    assert main(["describe", "gpt2", "--memory", "4GB"]) == 0  # of one device
    assert "DEVICES  1 with 3.7 GiB each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--dtype", "bf16"], "--dtype has no effect on its own: add --devices 8"),
        (["--devices", "0"], "--devices is 0: at least 1 is needed"),
        (["--memory", "lots"], "--memory is 'lots': a size such as 500MB or 5GB is needed"),
    ],
)
def test_bad_devices(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "gpt2", *words]) == 2
    assert line in capsys.readouterr().err
