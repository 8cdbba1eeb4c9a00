"""The modern block: NanoChat as transformers has it, and everything that GPT-2's block can do."""

import json
import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import gptsmith
from gptsmith import GPT, PRESETS, GPTConfig, describe, generate_greedy
from gptsmith.checkpoint.config_json import from_hugging_face
from gptsmith.checkpoint.finding import checkpoints
from gptsmith.cli.main import main
from gptsmith.config import cost
from gptsmith.config.describe import forward_stages
from gptsmith.config.model import MODERN
from gptsmith.config.recipe import read_toml, updated
from gptsmith.config.settings import TrainingSettings
from gptsmith.data.shards import Dataset
from gptsmith.model.attention import WAYS
from gptsmith.model.cache import KVCache
from gptsmith.model.modern import rotate, rotation_at
from gptsmith.model.trace import render, trace
from gptsmith.tokenizers import char_tokenizer
from gptsmith.training.muon import Muon
from gptsmith.training.optimizers import make_optimizers
from tests.config.test_describe import check_arithmetic
from tests.conftest import scrambled, some_tokens

TINY: dict[str, Any] = {
    **MODERN,
    "vocab_size": 37,
    "context_length": 11,
    "n_layer": 2,
    "n_head": 6,
    "n_embd": 24,
    "n_inner": 31,
    "norm_eps": 1e-3,
}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"n_kv_head": 2},
    "one key": {"n_kv_head": 1, "n_inner": None},
    "untied": {"n_kv_head": 3, "tie_weights": False},
}
TEXT = "the quick brown fox jumps over lazy dogs; " * 40
WORDS = (
    "--tokenizer char --n-layer 2 --n-head 4 --n-kv-head 2 --n-embd 16 --context-length 8 "
    "--block modern --dropout 0.1 "
    "--batch-tokens 48 --warmup-steps 2 --evaluate-every 4 --sample-tokens 5 --threads 1 "
    "--dtype float32 --attention kernel --keep 2 --steps 8"
).split()

parametrize_forms = pytest.mark.parametrize("form", FORMS)


def config_of(form: str) -> GPTConfig:
    return GPTConfig(**(TINY | FORMS[form]))


# -- NanoChat, as transformers has it


@parametrize_forms
def test_transformers_reads_what_we_save(form: str, tmp_path: Path, said: Callable) -> None:
    model, tokens = scrambled(config_of(form)), some_tokens(length=11)
    tokenizer = char_tokenizer(TEXT)
    gptsmith.save(model, tokenizer, tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        other = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert type(read) is transformers.NanoChatForCausalLM
    assert (read(tokens).logits - model(tokens).logits).abs().max() < 1e-4
    prompt = tokens[:, :4]
    greedy = read.generate(prompt, max_new_tokens=7, do_sample=False, pad_token_id=0)
    assert greedy.tolist() == generate_greedy(model, prompt, 7).tolist()
    assert other(TEXT[:9])["input_ids"] == tokenizer.encode(TEXT[:9])
    assert said() == []
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tied = {"lm_head.weight"} if model.config.tie_weights else set()
    assert tensors.keys() == read.state_dict().keys() - tied


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_we_read_what_transformers_saves(tie: bool, kv_heads: int, tmp_path: Path) -> None:
    config = transformers.NanoChatConfig(
        vocab_size=37,
        max_position_embeddings=11,
        hidden_size=24,
        intermediate_size=31,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=kv_heads,
        final_logit_softcapping=None,
        tie_word_embeddings=tie,
    )
    reference = transformers.NanoChatForCausalLM(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(tmp_path)
    model, tokens = gptsmith.load(tmp_path)[0], some_tokens()
    assert model.config.norm_eps == 1e-6
    assert (reference(tokens).logits - model(tokens).logits).abs().max() < 1e-4


@parametrize_forms
def test_saving_and_loading_changes_nothing(form: str, tmp_path: Path) -> None:
    model = scrambled(config_of(form))
    gptsmith.save(model, None, tmp_path / "model")
    read, _ = gptsmith.load(tmp_path / "model")
    assert read.config == model.config
    assert read.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(v, read.state_dict()[k]) for k, v in model.state_dict().items())
    assert (read.lm_head.weight is read.wte.weight) == model.config.tie_weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_logit_softcapping": 15.0}, "final_logit_softcapping 15.0: only None"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_theta 500000.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn"}}, "rope_type 'yarn'"),
        ({"rope_parameters": 3}, "an object is needed"),
        ({"hidden_act": "silu"}, "hidden_act 'silu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"head_dim": 5}, "head_dim 5"),
        ({"num_key_value_heads": 4}, "n_kv_head 4 must divide n_head 6"),
        ({"num_hidden_layers": 3}, "has 2 layers, but config.json calls for 3"),
        ({"vocab_size": 36}, r"embed_tokens.weight is \(37, 24\), but .* \(36, 24\)"),
        ({"num_key_value_heads": 3}, r"k_proj.weight is \(8, 24\), but .* \(12, 24\)"),
    ],
)
def test_another_nanochat_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    gptsmith.save(scrambled(config_of("grouped")), None, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as caught:
        gptsmith.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_a_softcap_that_is_not_mentioned_is_nanochats_own() -> None:
    with pytest.raises(ValueError, match=r"final_logit_softcapping 15.0"):
        from_hugging_face({"model_type": "nanochat"})


@pytest.mark.parametrize(
    ("drop", "extra", "message"),
    [
        (
            "self_attn.k_proj.weight",
            {},
            "lacks 2 tensors of a NanoChat, model.layers.0.self",
        ),
        ("", {"model.layers.0.mlp.fc1.bias": torch.ones(31)}, "has 1 tensors no NanoChat has"),
    ],
)
def test_missing_and_unknown_tensors_are_named(
    drop: str, extra: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    gptsmith.save(scrambled(config_of("plain")), None, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    path = tmp_path / "model" / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if not (drop and k.endswith(drop))}
    save_file(tensors | extra, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        gptsmith.load(tmp_path / "model")


# -- the configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "gpt2"}, "activation is relu2, which is the modern block's: add block modern"),
        ({"activation": "gelu_tanh"}, "activation is gelu_tanh: the modern block has relu2"),
        ({"bias": True}, "the modern block has no biases"),
        ({"qkv_bias": True}, "the modern block has no biases"),
        ({"init": "book"}, "init is book, which is for block gpt2"),
        ({"block": "modem"}, "block is 'modem': one of gpt2, modern is needed"),
        ({"n_embd": 30}, "5 channels per head"),
        ({"n_kv_head": 4}, "n_kv_head 4 must divide n_head 6"),
        ({"n_kv_head": 0}, "n_kv_head is 0: a whole number"),
    ],
)
def test_a_mixture_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        GPTConfig(**(TINY | changes))
    assert "\n" not in str(caught.value)


def test_fewer_keys_are_of_the_modern_block() -> None:
    message = "n_kv_head 3 is below n_head 12, which only the modern block can have"
    with pytest.raises(ValueError, match=message):
        GPTConfig(n_kv_head=3)
    assert GPTConfig(n_kv_head=12).kv_heads == 12


def test_the_preset_is_gpt2_with_another_block() -> None:
    modern = PRESETS["modern"]
    assert replace(PRESETS["gpt2"], **MODERN) == modern
    # GPT-2's 124,337,664 without biases, less positions and 25 norms.
    assert cost.parameter_count(modern) == 124_337_664 - 1024 * 768 - 25 * 768


FORMER = {"position": "rotary", "norm": "rms", "qk_norm": True}


def test_former_switches_are_understood_and_todays_setting_is_named(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    path.write_text(
        '[model]\nposition = "rotary"\nnorm = "rms"\nqk_norm = true\nactivation = "relu2"\n'
        "bias = false\nn_layer = 3\n",
        encoding="utf-8",
    )
    with pytest.warns(UserWarning, match="position, norm, qk_norm: now one setting, block modern"):
        assert read_toml(path).model == GPTConfig(block="modern", n_layer=3)
    path.write_text('[model]\nposition = "learned"\nnorm = "layer"\nqk_norm = false\n')
    with pytest.warns(UserWarning, match="now one setting, block gpt2"):
        assert read_toml(path).model == GPTConfig()
    with pytest.warns(UserWarning, match="block modern"):
        assert updated(PRESETS["nanogpt"], FORMER) == PRESETS["modern"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (FORMER | {"norm": "layer"}, "the modern block needs all of: position rotary, norm rms"),
        ({"qk_norm": True}, "the modern block needs all of"),
        (FORMER | {"norm": "none"}, "norm is 'none': one of layer, rms is needed"),
        (FORMER | {"position": "alibi"}, "one of learned, rotary is needed"),
        (FORMER | {"qk_norm": 1}, "qk_norm is 1: one of false, true is needed"),
        (FORMER | {"activation": "gelu_erf"}, "the modern block has relu2"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*now one setting")
def test_former_switches_that_do_not_fit_are_refused(words: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        updated(GPTConfig(), words)


def test_another_block_brings_its_own_activation_and_biases() -> None:
    assert updated(PRESETS["nanogpt"], {"block": "modern"}) == PRESETS["modern"]
    assert updated(PRESETS["nanogpt"], {"block": "gpt2"}) == PRESETS["nanogpt"]
    assert updated(PRESETS["modern"], {"block": "gpt2"}) == GPTConfig()


# -- the mathematics


def test_only_distances_count() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8).double()

    def score(here: int, there: int) -> float:
        at = rotation_at(torch.tensor([here, there]), 8).double()
        turned_q, turned_k = rotate(q, at[:, :1]), rotate(k, at[:, 1:])
        return (turned_q * turned_k).sum().item()

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-2
    assert score(0, 0) == pytest.approx((q * k).sum().item())


@parametrize_forms
@pytest.mark.parametrize("chunks", [(1,) * 11, (4, 1, 1, 3, 2), (2, 9)])
def test_any_way_through_the_cache_agrees(form: str, chunks: tuple[int, ...]) -> None:
    model, tokens = scrambled(config_of(form)), some_tokens(length=11)
    whole = model(tokens).logits
    cache, parts = KVCache(model.config, 2), []
    for part in tokens.split(chunks, dim=1):
        parts.append(model(part, cache=cache).logits)
    pieced = torch.cat(parts, dim=1)
    assert ((pieced - whole).norm() / whole.norm()).item() < 1e-5
    assert cache.keys.shape == (2, 2, 11, model.config.kv_heads, 4)


@parametrize_forms
def test_blocks_of_queries_agree_with_the_kernel(form: str) -> None:
    gradients = []
    for way in WAYS.values():
        model = scrambled(config_of(form))
        model.attend_by(way)
        model(some_tokens(), some_tokens().roll(1, 1)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_fresh_weights_are_small_and_the_model_knows_nothing() -> None:
    torch.manual_seed(0)
    model = GPT(config_of("untied"))
    assert len(list(model.parameters())) == 2 + 2 * 4
    loss = model(some_tokens(8, 11), some_tokens(8, 11)).loss
    assert loss.item() == pytest.approx(math.log(37), abs=0.1)


# -- how it looks


@parametrize_forms
def test_the_page_adds_up_and_the_trace_agrees(form: str) -> None:
    config = replace(config_of(form), n_layer=1)
    check_arithmetic(config)
    assert max(map(len, str(describe(config, title="a title")).splitlines())) <= 88
    lines = list(trace(config, 2, 5))
    assert max(map(len, render(lines).splitlines())) <= 100
    H, G, D, M = 6, config.kv_heads, 4, config.mlp_size
    letters = {"B": 2, "T": 5, "V": 37, "C": 24, "3C": 72, "C+2GD": 24 + 2 * G * D}
    letters |= {"H": H, "D": D, "M": M, "2H": 2 * H, "H+G": H + G}
    stages = [tuple(letters[x] for x in s.shape[1:-1].split(", ")) for s in forward_stages(config)]
    assert stages[1:] == [line.output for line in lines if line.name != "  heads joined"]


# -- a whole run


def test_muons_pieces_are_of_one_shape_and_everything_learns() -> None:
    model = GPT(config_of("grouped"))
    muon = make_optimizers(model, TrainingSettings(optimizer="muon"))[1]
    assert isinstance(muon, Muon)
    shapes = muon.by_shape(muon.param_groups[0]["params"])
    # Keys and values are (2 heads * 4, 24); the queries of 6 heads are three such pieces.
    assert {shape: len(members) for shape, members in shapes.items()} == {
        (8, 24): 2,
        (24, 24): 2,
        (31, 24): 2,
        (24, 31): 2,
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [(), ("--optimizer", "muon", "--dtype", "bf16", "--attention", "blocks")]
)
def test_a_run_goes_on_bit_for_bit_and_is_a_nanochat(
    how: tuple[str, ...], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out, more in (("through", ()), ("half", ("--save-every", "3"))):
        assert main(["train", "text.txt", *WORDS, *how, *more, "--out", out]) == 0
    for path in checkpoints(Path("half"))[:1]:  # as if killed after step 6
        shutil.rmtree(path)
    assert main(["train", "--resume", "half"]) == 0
    last = "checkpoints/step-00000008"
    one, other = (load_file(Path(run, last, "model.safetensors")) for run in ("through", "half"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)

    stream = Dataset.open(here / "through" / "data").validation
    assert stream is not None
    tokens = torch.from_numpy(stream.read(0, 9))[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(here / "through" / last).eval()
    ours, _ = gptsmith.load(here / "through" / last)
    assert (theirs(tokens[:, :8]).logits - ours(tokens[:, :8]).logits).abs().max() < 1e-4

    capsys.readouterr()
    assert main(["describe", "through", "--trace", "2x4"]) == 0
    page = capsys.readouterr().out
    assert "h.attn.qk_norm" in page
    assert "G heads of keys and values 2" in page
    assert main(["sample", "through", "--prompt", "the", "--max-tokens", "12"]) == 0
    assert len(capsys.readouterr().out) > 3
    assert main(["evaluate", "through", "--data", "through/data"]) == 0
