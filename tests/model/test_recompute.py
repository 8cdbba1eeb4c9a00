"""Activation recomputation changes what is kept in memory, and nothing else."""

import pytest
import torch
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.machine.native import open_library
from gptsmith.model import fused
from gptsmith.model.dropout import dropout_seeds
from gptsmith.model.recompute import recompute_blocks
from tests.conftest import TINY, scrambled, some_tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(model: GPT, recompute: bool, *, seeded: bool) -> list[Tensor]:
    """The loss and the gradients of two rows; the elements dropped are the same each time."""
    recompute_blocks(model.train(), recompute)
    model.zero_grad()
    torch.manual_seed(3)
    tokens = some_tokens()
    seeds = dropout_seeds(1, 2, torch.arange(2), TINY["n_layer"]) if seeded else None
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, tokens.roll(-1, 1), seeds)
    loss.backward()
    return [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("kind", "seeded"), [("gpt2", True), ("gpt2", False), ("modern", True), ("fused", True)]
)
def test_recomputed_gradients_are_the_same_to_the_bit(
    kind: str, seeded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whether it is drawn from seeds or by PyTorch's generator, and in autocast."""
    block = "modern" if kind == "modern" else "gpt2"
    model = scrambled(GPTConfig(**(TINY | {"n_embd": 36}), block=block, dropout=0.3))
    if kind == "fused":
        fused.fuse(model, open_library(fused.SOURCE))
    kept, passes = gradients(model, False, seeded=seeded), list[int]()
    forward = type(model.h[0]).forward
    monkeypatch.setattr(
        type(model.h[0]), "forward", lambda *given: passes.append(1) or forward(*given)
    )
    again = gradients(model, True, seeded=seeded)
    assert len(passes) == 2 * TINY["n_layer"]
    assert len(kept) == len(again) > 9
    assert all(map(torch.equal, kept, again))
    passes.clear()
    with torch.no_grad():
        model.loss(some_tokens(), some_tokens())
    assert len(passes) == TINY["n_layer"]
    gradients(model, False, seeded=seeded)
    assert len(passes) == 2 * TINY["n_layer"]
