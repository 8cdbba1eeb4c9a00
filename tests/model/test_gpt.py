"""The model against the two published systems, against itself cached, and at the edges."""

import math
from dataclasses import replace

import pytest
import torch

from gptsmith import GPT, PRESETS, GPTConfig, generate_greedy
from gptsmith.checkpoint.config_json import to_hugging_face
from gptsmith.model.cache import KVCache
from tests.conftest import TINY, scrambled, some_tokens
from tests.references import BookModel, nanogpt_forward

BOOK = {
    "vocab_size": 50257,
    "context_length": 1024,
    "emb_dim": 768,
    "n_heads": 12,
    "n_layers": 12,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_nanogpts(bias: bool) -> None:
    config = GPTConfig(**TINY, bias=bias, activation="gelu_erf")
    model = scrambled(config)
    expected = nanogpt_forward(dict(model.state_dict()), some_tokens(), n_layer=2, n_head=3)
    torch.testing.assert_close(model(some_tokens()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_forward_is_the_books(qkv_bias: bool) -> None:
    settings = {**BOOK, "vocab_size": 37, "context_length": 11, "emb_dim": 12, "n_heads": 3}
    settings |= {"n_layers": 2, "qkv_bias": qkv_bias}
    reference = BookModel(settings)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = GPT(GPTConfig.from_book(settings)).eval()
    model.load_state_dict(reference.weights_in_our_names())
    expected = reference(some_tokens())
    torch.testing.assert_close(model(some_tokens()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_books_first_text() -> None:
    """The untrained model of chapter 4 continues "Hello, I am" with six known tokens: the three
    lines that a reader types."""
    prompt = torch.tensor([[15496, 11, 314, 716]])  # "Hello, I am"
    torch.manual_seed(123)
    model = GPT(GPTConfig.from_book(BOOK)).eval()
    tokens = generate_greedy(model, prompt, max_new_tokens=6)
    assert tokens.tolist() == [[15496, 11, 314, 716, 27018, 24086, 47843, 30961, 42348, 7267]]


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_fresh_weights_are_the_books_to_the_bit(qkv_bias: bool) -> None:
    settings = {**BOOK, "vocab_size": 37, "context_length": 11, "emb_dim": 12, "n_heads": 3}
    settings |= {"n_layers": 2, "qkv_bias": qkv_bias}
    torch.manual_seed(5)
    expected = BookModel(settings).weights_in_our_names()
    torch.manual_seed(5)
    found = GPT(GPTConfig.from_book(settings)).state_dict()
    assert {*found} == {*expected}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_how_weights_are_drawn_is_no_part_of_the_architecture() -> None:
    config = GPTConfig.from_book(BOOK)
    assert (config.init, PRESETS["book"].init, GPTConfig().init) == ("book", "book", "gpt2")
    assert replace(config, init="gpt2") == config == PRESETS["book"]
    assert "init" not in to_hugging_face(config)


def test_loss_is_a_mean_over_counted_targets() -> None:
    model, tokens = scrambled(GPTConfig(**TINY)), some_tokens()
    targets = some_tokens().roll(1, dims=1)
    targets[0, 1:4] = -1
    logits, loss = model(tokens, targets)
    picked = [(b, t) for b in range(2) for t in range(5) if targets[b, t] != -1]
    each = [-logits[b, t].double().log_softmax(-1)[targets[b, t]].item() for b, t in picked]
    assert loss.item() == pytest.approx(sum(each) / len(each), rel=1e-6)


def test_nothing_to_learn_is_no_loss() -> None:
    model = scrambled(GPTConfig(**TINY))
    loss = model(some_tokens(), torch.full((2, 5), -1)).loss
    loss.backward()
    assert loss.item() == 0
    assert all(torch.all(p.grad == 0) for p in model.parameters())


def test_without_targets_the_loss_is_none() -> None:
    output = GPT(GPTConfig(**TINY))(some_tokens())
    assert output.loss is None
    assert output.logits.shape == (2, 5, 37)


@pytest.mark.parametrize("chunks", [(11,), (1,) * 11, (4, 1, 1, 3, 2), (10, 1), (2, 9)])
def test_any_way_through_the_cache_agrees(chunks: tuple[int, ...]) -> None:
    model, tokens = scrambled(GPTConfig(**TINY)), some_tokens(length=11)
    whole = model(tokens).logits
    cache, parts, seen = KVCache(model.config, 2), [], 0
    for length in chunks:
        parts.append(model(tokens[:, seen : seen + length], cache=cache).logits)
        seen += length
    pieced = torch.cat(parts, dim=1)
    assert ((pieced - whole).norm() / whole.norm()).item() < 1e-5


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = scrambled(GPTConfig(**TINY)), some_tokens(length=7)
    other = tokens.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 37
    before, after = model(tokens).logits, model(other).logits
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize(("cached", "new"), [(0, 12), (11, 1), (6, 6)])
def test_the_context_limit_is_an_error_not_a_wrong_index(cached: int, new: int) -> None:
    model, cache = GPT(GPTConfig(**TINY)), KVCache(GPTConfig(**TINY), 1)
    if cached:
        model(some_tokens(1, cached), cache=cache)
    with pytest.raises(ValueError, match="12 tokens are more than the context_length of 11"):
        model(some_tokens(1, new), cache=cache)


def test_a_small_cache_refuses_to_overflow() -> None:
    model, cache = GPT(GPTConfig(**TINY)), KVCache(GPTConfig(**TINY), 1, capacity=4)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of 4"):
        model(some_tokens(1, 5), cache=cache)


def test_fresh_weights_are_gpt2s() -> None:
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=997, context_length=64, n_layer=8, n_head=4, n_embd=128)
    model = GPT(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert torch.all(parameter == 0), name
        elif "ln_" in name:
            assert torch.all(parameter == 1), name
        else:
            expected = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert abs(parameter.mean().item()) < expected / 20, name
    assert model.lm_head.weight is model.wte.weight


def test_fresh_model_predicts_uniformly() -> None:
    """Also for the book's configuration: its loss starts near log V, not at that of N(0, 1)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY, tie_weights=False, qkv_bias=False, init="gpt2"))
    loss = model(some_tokens(8, 11), some_tokens(8, 11)).loss
    assert loss.item() == pytest.approx(math.log(37), abs=0.1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("nanogpt", 124_337_664),
        ("book", 163_009_536),
    ],
)
def test_parameter_counts_of_the_presets(name: str, expected: int) -> None:
    with torch.device("meta"):
        model = GPT(PRESETS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


def test_dropout_sits_where_both_systems_have_it() -> None:
    """With everything dropped on one branch, what is left shows where the branch was."""
    config = GPTConfig(**TINY, dropout=0.5)
    model = scrambled(config).train()
    drops = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)]
    assert drops == ["drop", "h.0.attn.drop", "h.0.mlp.drop", "h.1.attn.drop", "h.1.mlp.drop"]
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    torch.manual_seed(0)
    attention_only = model(some_tokens()).logits
    assert not torch.allclose(attention_only, model.eval()(some_tokens()).logits)
    model.train()
    for block in model.h:
        block.attn.dropout = 0.0
        block.attn.drop.p = block.mlp.drop.p = 1.0  # both branches add nothing
    x = model.wte(some_tokens()) + model.wpe(torch.arange(5))
    expected = model.lm_head(model.ln_f(x))
    torch.testing.assert_close(model(some_tokens()).logits, expected)
