"""PEFT folders both ways, with PEFT as the judge, and every refusal in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptsmith
from gptsmith import GPT, GPTConfig, Tokenizer
from gptsmith.checkpoint.building import load_adapted, load_model
from gptsmith.checkpoint.finding import find_base
from gptsmith.checkpoint.folder import read_bits, read_config
from gptsmith.checkpoint.training_state import load_training
from gptsmith.cli.main import main
from gptsmith.config.lora import LoRASettings
from gptsmith.config.model import MODERN
from gptsmith.model.classifier import Classifier
from gptsmith.model.lora import add_lora, lora_layers, lora_parameters
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled

CONFIG = GPTConfig(**TINY)
TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 35]])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    gptsmith.save(scrambled(CONFIG), None, tmp_path / "base")
    return tmp_path / "base"


def learned(parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.3, generator=generator)


def saved_adapter(base: Path, name: str = "adapter", **settings: Any) -> tuple[Path, Tensor]:
    """An adapter that has learned something, and the logits of its model."""
    tokens = settings.get("tokens", ())
    model = load_model(base, vocab_size=max(tokens, default=0) + 1)
    lora = {"rank": 4, "alpha": 6, "base": str(base), **settings}
    add_lora(model, LoRASettings(**lora))
    learned(lora_parameters(model))
    gptsmith.save(model, None, base.parent / name)
    return base.parent / name, model(TOKENS).logits.detach()


def of_peft(base: Path, adapter: Path, vocab_size: int = CONFIG.vocab_size) -> Tensor:
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(base)
    model.resize_token_embeddings(vocab_size)
    return PeftModel.from_pretrained(model, adapter).eval()(TOKENS).logits.detach()


def written_by_peft(base: Path, vocab_size: int = CONFIG.vocab_size, **settings: Any) -> Tensor:
    """Write an adapter with PEFT, and return the logits of its model."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(base)
    model.resize_token_embeddings(vocab_size)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    learned([parameter for parameter in model.parameters() if parameter.requires_grad])
    model.save_pretrained(base.parent / "theirs")
    return model(TOKENS).logits.detach()


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and float((one - other).abs().max()) < 1e-4


OURS: list[dict[str, Any]] = [
    {},
    {"targets": ("c_attn",), "rank": 2, "alpha": 2},
    {"rank_stabilized": True, "alpha": 5},
    {"ranks": {"h.1.mlp.c_fc": 3}, "alphas": {"c_proj": 1}},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", OURS)
def test_peft_loads_ours(base: Path, settings: dict[str, Any]) -> None:
    adapter, ours = saved_adapter(base, **settings)
    assert not close(ours, load_model(base)(TOKENS).logits)
    assert close(of_peft(base, adapter), ours)
    assert close(gptsmith.load(adapter)[0](TOKENS).logits, ours)
    assert torch.equal(load_adapted(adapter)(TOKENS).logits, ours)


THEIRS: list[dict[str, Any]] = [
    {},  # PEFT's defaults for GPT-2: c_attn alone, alpha 8
    {"target_modules": "all-linear", "fan_in_fan_out": True, "r": 3, "lora_alpha": 7},
    {"target_modules": ["c_attn", "c_proj"], "use_rslora": True, "rank_pattern": {"c_proj": 2}},
    {"target_modules": r".*\.mlp\.c_fc", "alpha_pattern": {"h.0.mlp.c_fc": 3}},
    {"target_modules": ["c_fc"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", THEIRS)
def test_ours_loads_pefts(base: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = written_by_peft(base, **settings)
    folder = tmp_path / "theirs"
    assert close(gptsmith.load(folder)[0](TOKENS).logits, theirs)
    model = load_adapted(folder)
    assert close(model(TOKENS).logits, theirs)
    gptsmith.save(model, None, tmp_path / "again")
    assert close(of_peft(base, tmp_path / "again"), theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_new_tokens_both_ways(base: Path, tmp_path: Path) -> None:
    V = CONFIG.vocab_size
    TOKENS[0, 2] = V - 1
    adapter, ours = saved_adapter(base, tokens=(V, V + 1))
    assert ours.shape[2] == V + 2
    assert read_config(adapter).vocab_size == V + 2
    assert close(of_peft(base, adapter, V + 2), ours)
    assert close(gptsmith.load(adapter)[0](TOKENS).logits, ours)
    assert torch.equal(load_adapted(adapter)(TOKENS).logits, ours)
    theirs = written_by_peft(base, V + 2, trainable_token_indices=[V, V + 1])
    assert close(gptsmith.load(tmp_path / "theirs")[0](TOKENS).logits, theirs)
    model = gptsmith.load(tmp_path / "theirs")[0]
    assert model.lm_head.weight is model.wte.weight


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_classifiers_both_ways(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2ForSequenceClassification

    def of_transformers() -> Any:
        how = {"num_labels": 3, "pad_token_id": 0}
        return GPT2ForSequenceClassification.from_pretrained(base, **how)

    model = Classifier.of(load_model(base), ("a", "b", "c"), 0).eval()
    add_lora(model, LoRASettings(rank=4, alpha=6, base=str(base)))
    assert model.lm_head.weight.requires_grad
    learned(lora_parameters(model))
    ours = model.scores(TOKENS).detach()
    gptsmith.save(model, None, tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    theirs = PeftModel.from_pretrained(of_transformers(), tmp_path / "ours").eval()
    assert close(theirs(TOKENS).logits, ours)
    for loaded in (gptsmith.load(tmp_path / "ours")[0], load_adapted(tmp_path / "ours")):
        assert isinstance(loaded, Classifier)
        assert loaded.labels == ("a", "b", "c")
        assert close(loaded.scores(TOKENS), ours)
    assert main(["merge", str(tmp_path / "ours"), str(tmp_path / "merged")]) == 0
    whole = GPT2ForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert close(whole(TOKENS).logits, ours)
    assert whole.config.id2label == {0: "a", 1: "b", 2: "c"}

    peft = get_peft_model(of_transformers(), LoraConfig(task_type="SEQ_CLS", r=3)).eval()
    learned([parameter for parameter in peft.parameters() if parameter.requires_grad])
    peft.save_pretrained(tmp_path / "theirs")
    loaded = gptsmith.load(tmp_path / "theirs")[0]
    assert isinstance(loaded, Classifier)
    assert loaded.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    for row, wanted in zip(TOKENS, peft(TOKENS).logits, strict=True):
        assert close(loaded.scores(row[None]), wanted[None])


def test_the_folder_has_what_peft_writes(base: Path) -> None:
    from safetensors.torch import load_file

    adapter, _ = saved_adapter(base, tokens=(37,))
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == str(base)
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["trainable_token_indices"] == [37]
    tensors = load_file(adapter / "adapter_model.safetensors")
    start = "base_model.model.transformer"
    assert tensors[f"{start}.h.0.attn.c_attn.lora_A.weight"].shape == (4, 12)
    assert tensors[f"{start}.h.0.attn.c_attn.lora_B.weight"].shape == (36, 4)
    assert tensors[f"{start}.wte.token_adapter.trainable_tokens_delta"].shape == (1, 12)
    assert len(tensors) == 2 * 4 * 2 + 1
    assert (adapter / "manifest.json").is_file()


def test_a_checkpoint_is_such_a_folder(base: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    gptsmith.save(scrambled(GPTConfig(**TINY | {"vocab_size": 257})), tokenizer, tmp_path / "b")
    model = load_model(tmp_path / "b")
    add_lora(model, LoRASettings(rank=2, alpha=4, base=str(tmp_path / "b")))
    state = {f"exp_avg.{name}": layer.lora_A for name, layer in lora_layers(model)}
    gptsmith.save(model, tokenizer, tmp_path / "c", optimizer=state, state={"done": 3})
    found, recorded = load_training(tmp_path / "c")
    assert found.keys() == state.keys()
    assert recorded == {"done": 3}
    loaded, its_tokenizer = gptsmith.load(tmp_path / "c")
    assert isinstance(its_tokenizer, Tokenizer)
    assert its_tokenizer.fingerprint == tokenizer.fingerprint
    assert isinstance(loaded, GPT)
    assert loaded.lora is None
    assert read_bits(tmp_path / "c") is None


def test_rows_that_nobody_learns_are_kept_too(base: Path, tmp_path: Path) -> None:
    """Those of a padding token, which no text is scored by."""
    model = load_model(base, vocab_size=40)
    add_lora(model, LoRASettings(rank=2, alpha=4, base=str(base)))
    gptsmith.save(model, None, tmp_path / "c")
    loaded = gptsmith.load(tmp_path / "c")[0]
    assert loaded.config.vocab_size == read_config(tmp_path / "c").vocab_size == 40
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


def test_the_base_is_found_where_it_may_be(base: Path, tmp_path: Path) -> None:
    adapter, ours = saved_adapter(base)
    assert find_base(adapter) == base
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(adapter, tmp_path / "elsewhere" / "adapter"))
    base_moved = Path(shutil.move(base, tmp_path / "elsewhere" / "base"))
    assert find_base(moved).resolve() == base_moved  # beside it
    renamed = Path(shutil.move(base_moved, tmp_path / "elsewhere" / "other"))
    with pytest.raises(FileNotFoundError, match=r"its base '.*base' is not there: name it with"):
        gptsmith.load(moved)
    assert close(gptsmith.load(moved, base=renamed)[0](TOKENS).logits, ours)
    with pytest.raises(ValueError, match="is a whole model, and no adapter: leave out the base"):
        gptsmith.load(renamed, base=renamed)
    shutil.move(renamed, tmp_path / "whole")
    with pytest.raises(ValueError, match="is an adapter itself: `gptsmith merge"):
        gptsmith.load(moved, base=shutil.copytree(moved, tmp_path / "copy"))


def change(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "is rank 0: at least 1 is needed"),
    ({"use_dora": True}, "use_dora True, but only plain LoRA is understood"),
    ({"bias": "all"}, "bias 'all', but only plain LoRA is understood"),
    ({"peft_type": "IA3"}, "peft_type 'IA3', but only plain LoRA is understood"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa', but only plain LoRA"),
    ({"modules_to_save": ["wte"]}, "modules_to_save \\['wte'\\], but only plain LoRA"),
    ({"lora_alpha": "2"}, "lora_alpha '2': a number is needed"),
    ({"trainable_token_indices": {"lm_head": [1]}}, "a list of token ids is needed"),
    ({"r": 5}, "an adapter for another base .*lora_A.weight is \\(4, 12\\), but \\(5, 12\\)"),
]


@pytest.mark.filterwarnings("ignore:.* was edited")
@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_is_not_plain_lora_is_refused(
    base: Path, fields: dict[str, Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = saved_adapter(base)
    change(adapter, **fields)
    with pytest.raises(ValueError, match=message):
        gptsmith.load(adapter)
    assert main(["describe", str(adapter)]) in (0, 2)  # reads no tensors
    assert main(["merge", str(adapter), str(base.parent / "out")]) == 2
    assert capfd.readouterr().err.strip().splitlines()[-1].startswith("gptsmith: ")
    assert not (base.parent / "out").exists()


def test_an_adapter_for_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    adapter, _ = saved_adapter(base)
    other = scrambled(CONFIG)
    with torch.no_grad():
        other.h[1].mlp.c_fc.weight *= 1.01
    gptsmith.save(other, None, tmp_path / "same-shapes")
    with pytest.raises(ValueError, match=r"another base than .*: its weights differ"):
        gptsmith.load(adapter, base=tmp_path / "same-shapes")
    with pytest.raises(ValueError, match=r"another base than .*: its weights differ"):
        load_adapted(adapter, base=tmp_path / "same-shapes")
    for name, sizes in {"wide": {"n_embd": 15}, "flat": {"n_layer": 1}}.items():
        gptsmith.save(GPT(GPTConfig(**TINY | sizes)), None, tmp_path / name)
        with pytest.raises(ValueError, match="is an adapter for another base than"):
            gptsmith.load(adapter, base=tmp_path / name)


def test_damaged_adapters_are_refused(base: Path) -> None:
    adapter, _ = saved_adapter(base)
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="bytes, but was written with"):
        gptsmith.load(adapter)
    path.unlink()
    with pytest.raises(ValueError, match="is missing, though the manifest lists it"):
        gptsmith.load(adapter)


def test_only_models_with_gpt2s_block_have_adapters() -> None:
    model = GPT(GPTConfig(**{**TINY, **MODERN}))
    with pytest.raises(ValueError, match="LoRA is for GPT-2's block"):
        add_lora(model, LoRASettings(rank=2, alpha=4))
