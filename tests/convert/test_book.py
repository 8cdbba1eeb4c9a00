"""The book's GPTModel, against a restatement of it that takes our state dict strictly."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith import GPTConfig, generate_greedy
from gptsmith.cli.main import main
from gptsmith.convert import export_model, import_model
from tests.conftest import TINY, scrambled, some_tokens
from tests.references import BookModel

BOOK: dict[str, Any] = {
    "vocab_size": 37,
    "context_length": 11,
    "emb_dim": 12,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.1,
    "qkv_bias": False,
}


def saved(folder: Path, **changes: Any) -> BookModel:
    """A model as the book's readers keep one: a state dict, its configuration beside it."""
    torch.manual_seed(5)
    settings = BOOK | changes
    model = BookModel(settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / "gpt.pth")
    (folder / "settings.json").write_text(json.dumps(settings))
    return model


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_a_state_dict_becomes_the_same_model(
    qkv_bias: bool, with_optimizer: bool, tmp_path: Path
) -> None:
    reference = saved(tmp_path / "book", qkv_bias=qkv_bias)
    if with_optimizer:
        optimizer = torch.optim.AdamW(reference.parameters())
        reference(some_tokens(length=7)).sum().backward()
        optimizer.step()
        both = {"model_state_dict": reference.state_dict()}
        both["optimizer_state_dict"] = optimizer.state_dict()
        torch.save(both, tmp_path / "book" / "gpt.pth")
    source = tmp_path / "book" / ("gpt.pth" if with_optimizer else "")
    report = import_model(source, tmp_path / "out")
    assert report.source_format == "GPTModel of the book"
    assert report.difference == 0
    assert report.tensors.ignored == {
        f"trf_blocks.{layer}.att.mask": "a causal mask, not a weight" for layer in range(2)
    }
    model, tokenizer = gptsmith.load(tmp_path / "out")
    assert tokenizer is None
    assert (model.config.has_qkv_bias, model.config.tie_weights) == (qkv_bias, False)
    tokens = some_tokens(length=7)
    assert (model(tokens).logits - reference(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize(
    "form",
    [{}, {"qkv_bias": False, "tie_weights": False}, {"bias": False, "tie_weights": False}],
)
@pytest.mark.parametrize("dtype", ["float32", "fp16"])
def test_the_book_takes_what_we_write_strictly(
    form: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    model = scrambled(GPTConfig(**TINY, **form, dropout=0.2))
    gptsmith.save(model, None, tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "out", to="book", dtype=dtype)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings == BOOK | {"drop_rate": 0.2, "qkv_bias": model.config.has_qkv_bias}
    theirs = BookModel(settings)
    state = torch.load(tmp_path / "out" / "model.pth", weights_only=True)
    theirs.load_state_dict(state, strict=True)
    tokens = some_tokens(length=7)
    difference = float((model(tokens).logits - theirs(tokens)).detach().abs().max())
    assert difference < (1e-4 if dtype == "float32" else 0.05)


@pytest.mark.slow
def test_there_and_back_is_the_same(tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**TINY, qkv_bias=False, tie_weights=False))
    gptsmith.save(model, None, tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "there", to="book")
    import_model(tmp_path / "there", tmp_path / "back")
    back, _ = gptsmith.load(tmp_path / "back")
    assert back.config == model.config
    for (name, one), other in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(one, other), name
    tokens = some_tokens(length=7)
    assert torch.equal(generate_greedy(model, tokens, 3), generate_greedy(back, tokens, 3))


def test_gpt2s_vocabulary_brings_gpt2s_tokenizer(tmp_path: Path) -> None:
    saved(tmp_path / "book", vocab_size=50257, emb_dim=6)
    model, tokenizer = gptsmith.convert.read(tmp_path / "book")
    assert tokenizer is not None
    assert tokenizer.vocab_size == model.config.vocab_size == 50257


def test_what_the_book_cannot_say(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = scrambled(GPTConfig(**TINY, activation="gelu_erf"))
    gptsmith.save(model, None, tmp_path / "model")
    words = ["export", str(tmp_path / "model"), str(tmp_path / "out"), "--to", "book"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "cannot express activation gelu_erf (it has gelu_tanh)" in said
    assert main([*words, "--approximate"]) == 0
    assert "activation gelu_erf (it has gelu_tanh)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "settings.json").unlink(), "holds 0 JSON files with the book's config"),
        (lambda f: (f / "b.json").write_text('{"emb_dim": 3}'), "holds 2 JSON files"),
        (lambda f: edit(f, n_heads=None), "n_head is None"),
        (lambda f: edit(f, heads=3), "'heads' is not a key of the book's configuration"),
        (lambda f: edit(f, n_layers=3), "has 2 layers, but its configuration calls for 3"),
        (lambda f: edit(f, qkv_bias=True), "lacks 6 tensors of a the book's GPTModel"),
        (lambda f: edit(f, context_length=12), r"pos_emb.weight is \(11, 12\), but .* \(12, 12\)"),
    ],
)
def test_what_does_not_fit_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "book")
    damage(tmp_path / "book")
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "book" / "gpt.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def edit(folder: Path, **changes: Any) -> None:
    (folder / "settings.json").write_text(json.dumps(BOOK | changes))
