"""Adapters compute what the formula says on every path, and frozen weights cost no products."""

import ctypes
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.config.fields import SettingError
from gptsmith.config.lora import LoRASettings, adapter_count
from gptsmith.config.model import PRESETS
from gptsmith.generation.compiled import open_decoder
from gptsmith.machine.native import open_library
from gptsmith.model.attention import WAYS
from gptsmith.model.dropout import Window, dropout_seeds, is_kept
from gptsmith.model.fused import SOURCE, fuse
from gptsmith.model.lora import adapter_seeds, add_lora, lora_layers, lora_parameters, merge_lora
from tests.conftest import scrambled

pytestmark = pytest.mark.usefixtures("own_cache", "one_thread")

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "context_length": 23,
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 33,
}
ROWS = torch.tensor([7, 9])  # of a batch, for dropout


@pytest.fixture
def library(own_cache: None) -> ctypes.CDLL:
    return open_library(SOURCE)


def adapted(dropout: float = 0.0, *, of_model: float = 0.0, **settings: Any) -> GPT:
    """A small model whose adapters have learned something."""
    model = scrambled(GPTConfig(**SIZES, dropout=of_model)).train()
    lora = {"rank": 4, "alpha": 6, "dropout": dropout, **settings}
    add_lora(model, LoRASettings(**lora), seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.5
        for _, layer in lora_layers(model):
            torch.nn.init.normal_(layer.lora_B, std=0.2, generator=generator)
    return model


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(37, (2, 23), generator=generator)
    return tokens, torch.randint(-1, 37, (2, 23), generator=generator)


def gradients(model: GPT, *, bf16: bool = False, seeded: bool = True) -> dict[str, Tensor]:
    """The loss, and the gradients of what learns, in float64."""
    model.zero_grad()
    seeds = dropout_seeds(5, 3, ROWS, 2) if seeded else None
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model.loss(*batch(), seeds)
    loss.backward()
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double(), **found}


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys()
    one, other = (torch.cat([each.flatten() for each in d.values()]) for d in (found, exact))
    return float((one - other).norm() / other.norm())


def test_it_begins_as_the_model_was() -> None:
    model = scrambled(GPTConfig(**SIZES)).eval()
    before = model(batch()[0]).logits
    add_lora(model, LoRASettings(rank=4, alpha=6))
    assert torch.equal(model(batch()[0]).logits, before)
    bound = 1 / 33**0.5  # of the uniform distribution that PEFT draws A from
    (_, layer), *_ = lora_layers(model)
    assert 0.9 * bound < layer.lora_A.abs().max() <= bound


def test_the_same_seed_gives_the_same_adapters() -> None:
    models = [scrambled(GPTConfig(**SIZES)) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        add_lora(model, LoRASettings(rank=4, alpha=6), seed=seed)
    one, same, other = (next(lora_layers(model))[1].lora_A for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_only_the_adapters_learn() -> None:
    model = adapted()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"lora_A", "lora_B"}
    assert len(names) == 2 * 4 * 2
    assert gradients(model).keys() - {"loss"} == names


def test_parameters_of_gpt2_are_as_counted() -> None:
    """Rank 16 on all four layers of 12 blocks: 12 x 16 x 12,288."""
    lora = LoRASettings(rank=16, alpha=32)
    assert adapter_count(PRESETS["gpt2"], lora) == 2_359_296
    model = adapted()
    counted = adapter_count(model.config, LoRASettings(rank=4, alpha=6))
    assert sum(p.numel() for p in lora_parameters(model)) == counted


def test_targets_choose_the_layers() -> None:
    names = [name for name, _ in lora_layers(adapted(targets=("mlp.c_proj", "c_attn")))]
    assert names == [f"h.{n}.{part}" for n in (0, 1) for part in ("attn.c_attn", "mlp.c_proj")]
    with pytest.raises(ValueError, match="no layer of the model's blocks is named c_fcc"):
        adapted(targets=("c_fcc",))
    with pytest.raises(ValueError, match="rank 0: at least 1 is needed"):
        LoRASettings(rank=0, alpha=1)


def test_the_formula() -> None:
    """Merged by hand, in float64, from the definition."""
    model = adapted(ranks={"h.1.mlp.c_fc": 5}, alphas={"c_proj": 3}, rank_stabilized=True).eval()
    plain = GPT(model.config).double().eval()
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    for n in (0, 1):
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            a, b = (state.pop(f"h.{n}.{part}.lora_{each}") for each in "AB")
            rank = 5 if (n, part) == (1, "mlp.c_fc") else 4
            alpha = 3 if part.endswith("c_proj") else 6
            assert a.shape[0] == rank
            state[f"h.{n}.{part}.weight"] += b @ a * alpha / rank**0.5
    plain.load_state_dict(state)
    wanted, got = plain(batch()[0]).logits, model(batch()[0]).logits
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)
    merge_lora(model)
    assert model.lora is None
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(batch()[0]).logits.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("of_model", [0.0, 0.2])
def test_the_fused_block_and_every_attention_agree(
    dropout: float, of_model: float, library: ctypes.CDLL
) -> None:
    model = adapted(dropout, of_model=of_model)
    exact = gradients(deepcopy(model).double())
    plain = {bf16: error(gradients(model, bf16=bf16), exact) for bf16 in (False, True)}
    model.attend_by(WAYS["blocks"])
    assert error(gradients(model), exact) < 5e-6
    fuse(model, library)
    assert error(gradients(model), exact) < max(5e-6, 2 * plain[False])
    assert error(gradients(model, bf16=True), exact) < 1.5 * plain[True]


def test_dropout_by_seeds_is_that_of_the_input(library: ctypes.CDLL) -> None:
    """A layer alone, against the mask's definition."""
    model = adapted(0.3)
    layer = model.h[0].attn.c_proj
    x, seeds = torch.randn(2, 23, 33), torch.tensor([5, -8], dtype=torch.int32)
    layer.seeds = adapter_seeds(seeds, 1)
    kept = is_kept(0.3, layer.seeds, Window(1, 23, 33, 0), 23, 33).view_as(x)
    wanted = x @ layer.weight.T + layer.bias
    wanted = wanted + (kept * x / 0.7) @ layer.lora_A.T @ layer.lora_B.T * 1.5
    torch.testing.assert_close(layer(x), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.equal(adapter_seeds(seeds, 0), adapter_seeds(seeds, 1))


def test_dropout_does_not_depend_on_the_division(library: ctypes.CDLL) -> None:
    model = adapted(0.3)
    fuse(model, library)
    tokens, targets = batch()
    targets = targets.clamp(min=0)  # so that both rows count the same
    seeds = dropout_seeds(5, 3, ROWS, 2)
    whole = model.loss(tokens, targets, seeds)
    rows = [model.loss(tokens[n : n + 1], targets[n : n + 1], seeds[n : n + 1]) for n in (0, 1)]
    torch.testing.assert_close(whole, sum(rows) / 2)
    assert not torch.equal(whole, model.loss(tokens, targets, dropout_seeds(5, 4, ROWS, 2)))


class Counted(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket._qualified_op_name.split("::")[1] in ("mm", "addmm", "addmm_"):
            left = args[-2] if "addmm" in str(function) else args[0]
            self.sum += out.numel() * left.shape[1]
        return out


def multiplications(model: GPT) -> int:
    with Counted() as counted:
        gradients(model, seeded=False)
    return counted.sum


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_weights_cost_no_product(fused: bool, library: ctypes.CDLL) -> None:
    """By the operations that PyTorch is asked for: forward, and the gradients of inputs."""
    C, M, V, N, R = 33, 132, 37, 46, 4
    block = 3 * C * C + C * C + 2 * C * M
    low = R * (4 * C + 2 * C + 2 * (C + M))
    model = adapted()
    if fused:
        fuse(model, library)
    forward, inputs = 2 * (block + low) + C * V, 2 * (block + low) + C * V
    inputs -= 3 * C * C + R * C  # nothing before the first c_attn learns
    assert multiplications(model) == N * (forward + inputs + 2 * low)


@pytest.mark.parametrize("fused", [False, True])
def test_frozen_first_blocks_have_no_backward_pass(fused: bool, library: ctypes.CDLL) -> None:
    """All but the last block, the last norm and an untied head are frozen."""
    C, M, V, N = 33, 132, 37, 46
    model = scrambled(GPTConfig(**SIZES, tie_weights=False)).train()
    model.requires_grad_(False)
    for part in (model.h[1], model.ln_f, model.lm_head):
        part.requires_grad_(True)
    exact = gradients(deepcopy(model).double(), seeded=False)
    if fused:
        fuse(model, library)
    block = 4 * C * C + 2 * C * M
    assert multiplications(model) == N * (2 * block + C * V + 2 * (block + C * V))
    names = {n for n in exact if n.startswith(("h.1.", "ln_f.", "lm_head."))}
    assert exact.keys() == names | {"loss"}
    assert error(gradients(model, seeded=False), exact) < 5e-6


def test_the_compiled_step_does_without_adapters() -> None:
    """It reads the weights alone, and would leave them out."""
    assert open_decoder(adapted().eval()) is None
    with pytest.raises(SettingError, match="knows no adapters: merge them"):
        open_decoder(adapted().eval(), "yes")


def test_learned_tokens_are_rows_of_embedding_and_head() -> None:
    model = adapted(tokens=(36, 4))
    before = model.wte.weight.detach().clone()
    assert model.wte.rows is model.lm_head.rows
    with torch.no_grad():
        model.wte.rows += 1
    after = model.wte.weight.detach()
    changed = (after != before).any(1).nonzero().flatten().tolist()
    assert changed == [4, 36]
    assert torch.equal(model.lm_head.weight, after)
    found = gradients(model)
    exact = gradients(deepcopy(model).double())
    assert "wte.rows" in found
    assert error(found, exact) < 5e-6
    wanted = model(batch()[0]).logits
    merge_lora(model)
    torch.testing.assert_close(model(batch()[0]).logits, wanted)
    assert model.lm_head.weight is model.wte.weight
