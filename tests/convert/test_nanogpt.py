"""nanoGPT's checkpoints, against a restatement of its architecture that takes them strictly."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith import GPTConfig, generate_greedy
from gptsmith.cli.main import main
from gptsmith.convert import export_model, import_model
from gptsmith.tokenizers import char_tokenizer
from tests.conftest import TINY, scrambled, some_tokens
from tests.references import NanoGPT

ARGS: dict[str, Any] = {
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 12,
    "block_size": 11,
    "bias": True,
    "vocab_size": 37,
    "dropout": 0.1,
}
CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWX"


def checkpoint(path: Path, *, compiled: bool = False, **changes: Any) -> NanoGPT:
    """A checkpoint as nanoGPT's train.py saves one, and the model in it."""
    args = ARGS | changes
    torch.manual_seed(5)
    model = NanoGPT(**args)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    prefix = "_orig_mod." if compiled else ""
    optimizer = torch.optim.AdamW(model.parameters())
    loss = model(torch.zeros(1, 3, dtype=torch.long)).sum()
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    whole = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": 250,
        "best_val_loss": loss.detach(),
        "config": {"dataset": "plays", "learning_rate": 1e-3, "compile": compiled},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(whole, path)
    return model


def write_meta(path: Path, characters: str = CHARACTERS) -> None:
    """A meta.pkl as nanoGPT's prepare.py of characters writes it."""
    ids = {character: id for id, character in enumerate(characters)}
    meta = {"vocab_size": len(ids), "itos": {id: c for c, id in ids.items()}, "stoi": ids}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_checkpoint_becomes_the_same_model(bias: bool, compiled: bool, tmp_path: Path) -> None:
    reference = checkpoint(tmp_path / "any.name", bias=bias, compiled=compiled)
    report = import_model(tmp_path / "any.name", tmp_path / "out")
    assert report.source_format == "nanoGPT checkpoint"
    assert report.difference == 0
    model, _ = gptsmith.load(tmp_path / "out")
    assert model.config.activation == "gelu_erf"
    assert (model.config.bias, model.config.dropout) == (bias, 0.1)
    tokens = some_tokens(length=7)
    assert (model(tokens).logits - reference(tokens)).abs().max() < 1e-4
    assert set(report.tensors.ignored) == {"lm_head.weight"}


def test_older_checkpoints_carry_masks(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path / "ckpt.pt")
    whole = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 11, 11).tril() for i in range(2)}
    torch.save(whole | {"model": whole["model"] | masks}, tmp_path / "ckpt.pt")
    report = import_model(tmp_path, tmp_path / "out")  # the folder that holds it
    assert report.tensors.ignored["h.1.attn.bias"] == "a causal mask, not a weight"
    model, _ = gptsmith.load(tmp_path / "out")
    assert (
        model(some_tokens(length=7)).logits - reference(some_tokens(length=7))
    ).abs().max() < 1e-4


@pytest.mark.parametrize("place", ["out-plays/meta.pkl", "data/plays/meta.pkl"])
def test_characters_are_found_where_nanogpt_keeps_them(place: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "out-plays" / "ckpt.pt")
    write_meta(tmp_path / place)
    import_model(tmp_path / "out-plays", tmp_path / "out")
    _, tokenizer = gptsmith.load(tmp_path / "out")
    assert tokenizer is not None
    assert tokenizer.fingerprint == char_tokenizer(CHARACTERS).fingerprint
    assert tokenizer.encode("ABC") == [CHARACTERS.index(c) for c in "ABC"]


def test_characters_may_be_named_and_keep_their_ids(tmp_path: Path) -> None:
    checkpoint(tmp_path / "ckpt.pt")
    write_meta(tmp_path / "elsewhere" / "meta.pkl", CHARACTERS[::-1])
    meta = str(tmp_path / "elsewhere" / "meta.pkl")
    import_model(tmp_path / "ckpt.pt", tmp_path / "out", tokenizer=meta)
    _, tokenizer = gptsmith.load(tmp_path / "out")
    assert tokenizer is not None
    assert tokenizer.encode("\nX") == [36, 0]


@pytest.mark.slow
def test_a_padded_vocabulary_is_gpt2s(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path / "ckpt.pt", vocab_size=50304, n_embd=6)
    report = import_model(tmp_path / "ckpt.pt", tmp_path / "out")
    assert report.padding == 47
    model, tokenizer = gptsmith.load(tmp_path / "out")
    assert tokenizer is not None
    assert tokenizer.vocab_size == model.config.vocab_size == 50257
    tokens = some_tokens(length=7, vocab_size=50257)
    assert (model(tokens).logits - reference(tokens)[..., :50257]).abs().max() < 1e-4


@pytest.mark.parametrize(
    "form", [{}, {"bias": False}, {"bias": False, "qkv_bias": True}, {"qkv_bias": False}]
)
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_nanogpt_takes_what_we_write_strictly(
    form: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    config = GPTConfig(**TINY, **form, activation="gelu_erf", dropout=0.2)
    model = scrambled(config)
    gptsmith.save(model, char_tokenizer(CHARACTERS), tmp_path / "model")
    report = export_model(tmp_path / "model", tmp_path / "out", to="nanogpt", dtype=dtype)
    assert report.tokenizer == "char, 37 tokens"
    whole = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    theirs = NanoGPT(**whole["model_args"])
    theirs.load_state_dict(whole["model"], strict=True)
    assert theirs.state_dict().keys() == whole["model"].keys()
    tokens = some_tokens(length=7)
    difference = float((model(tokens).logits - theirs(tokens)).detach().abs().max())
    assert difference < (1e-4 if dtype == "float32" else 0.5)
    assert whole["model_args"]["dropout"] == 0.2
    meta = pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())
    assert "".join(meta["itos"][id] for id in range(37)) == CHARACTERS
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["ckpt.pt", "meta.pkl"]


@pytest.mark.parametrize("bias", [True, False])
def test_there_and_back_is_the_same(bias: bool, tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**TINY, bias=bias, activation="gelu_erf"))
    gptsmith.save(model, char_tokenizer(CHARACTERS), tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "there", to="nanogpt")
    import_model(tmp_path / "there", tmp_path / "back")
    back, tokenizer = gptsmith.load(tmp_path / "back")
    assert tokenizer is not None
    assert tokenizer.fingerprint == char_tokenizer(CHARACTERS).fingerprint
    for (name, one), other in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(one, other), name
    tokens = some_tokens(length=7)
    assert torch.equal(generate_greedy(model, tokens, 3), generate_greedy(back, tokens, 3))


def test_what_nanogpt_cannot_say(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    forms: dict[str, dict[str, Any]] = {
        "tanh": {},
        "untied": {"activation": "gelu_erf", "tie_weights": False},
        "eps": {"activation": "gelu_erf", "norm_eps": 1e-3},
        "inner": {"activation": "gelu_erf", "n_inner": 20},
    }
    said = {}
    for name, form in forms.items():
        gptsmith.save(scrambled(GPTConfig(**TINY, **form)), None, tmp_path / name)
        words = ["export", str(tmp_path / name), str(tmp_path / "out"), "--to", "nanogpt"]
        assert main(words) == 2
        said[name] = capsys.readouterr().err
        assert main([*words, "--approximate"]) == (2 if name == "inner" else 0)
        assert (tmp_path / "out").exists() == (name != "inner")
        if name != "inner":
            (tmp_path / "out").rename(tmp_path / f"out-{name}")
        capsys.readouterr()
    assert "cannot express activation gelu_tanh (it has gelu_erf)" in said["tanh"]
    assert "cannot express a head of its own (it has the embedding)" in said["untied"]
    assert "cannot express norm_eps 0.001 (it has 1e-05)" in said["eps"]
    assert "MLP has 48 channels (4 * n_embd), not 20" in said["inner"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c["model_args"].pop("n_head"), "model_args lacks n_head"),
        (
            lambda c: c["model_args"].update(rope=True),
            "model_args has rope, which nanoGPT does not know",
        ),
        (lambda c: c["model_args"].update(n_head=5), "n_embd 12 is not a multiple of n_head 5"),
        (lambda c: c["model_args"].update(n_layer="2"), "n_layer is '2': a whole number"),
        (lambda c: c["model_args"].update(n_layer=10**9), "has 2 layers, but its model_args calls"),
        (lambda c: c["model_args"].update(vocab_size=38), r"wte.weight is \(37, 12\), but .*\(38"),
        (lambda c: c["model_args"].update(bias=False), "tensors no nanoGPT has, h.0.attn.c_attn.b"),
        (lambda c: c.update(model_args=[1]), "model_args is list, not a dictionary"),
        (lambda c: c["model"].pop("transformer.wte.weight"), "lacks 1 tensors of a nanoGPT, wte"),
        (
            lambda c: c["model"].update({"lm_head.weight": torch.ones(37, 12)}),
            "should be tied to the embedding, but differs",
        ),
        (lambda c: c.update(model={}), "holds dict, where a state_dict is needed"),
    ],
)
def test_a_checkpoint_that_lies_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "ckpt.pt")
    whole = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    damage(whole)
    torch.save(whole, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "ckpt.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([1, 2]), "no 'stoi' that maps characters"),
        (
            pickle.dumps({"stoi": {"a": 0, "b": 2}}),
            "no 'stoi' that maps characters to consecutive ids from 0",
        ),
        (pickle.dumps({"stoi": {"a": 0, "bc": 1}}), "'bc' in 'stoi' is not a character"),
        (b"nonsense", "is not a plain pickle"),
        (pickle.dumps({"stoi": {"a": 0}})[:-3], "is not a plain pickle"),
        (pickle.dumps(Path("x")), "is not a plain pickle: it needs pathlib"),
    ],
)
def test_a_vocabulary_that_is_none_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    checkpoint(tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "ckpt.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
