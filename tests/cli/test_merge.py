"""`merge`, `--base` and `describe --lora` as typed."""

import json
from pathlib import Path

import pytest
import torch

import gptsmith
from gptsmith import GPTConfig, describe
from gptsmith.cli.main import main
from gptsmith.config import cost
from gptsmith.config.finetune import FinetuneSettings
from gptsmith.config.lora import LoRASettings, learned_count
from gptsmith.config.model import PRESETS
from gptsmith.model.lora import add_lora, lora_parameters
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled

TOKENS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 35]])


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """With a base beside it, under a name that the adapter does not have."""
    tokenizer = byte_tokenizer()
    sizes = {**TINY, "vocab_size": tokenizer.vocab_size, "tie_weights": request.param}
    model = scrambled(GPTConfig(**sizes))
    gptsmith.save(model, tokenizer, tmp_path / "base")
    add_lora(model, LoRASettings(rank=3, alpha=5, base="gone"))
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(0, 0.3)
    gptsmith.save(model, tokenizer, tmp_path / "adapter")
    torch.save(model(TOKENS).logits.detach(), tmp_path / "logits")
    return tmp_path / "adapter"


def test_merge_writes_the_model_and_reports_the_logits(
    adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["merge", str(adapter), str(tmp_path / "out"), "--json"]
    assert main(words) == 2
    assert "its base 'gone' is not there: name it with --base" in capfd.readouterr().err
    assert main([*words, "--base", str(tmp_path / "base")]) == 0
    report = json.loads(capfd.readouterr().out)
    assert 0 < report["largest_logit_difference"] < 1e-4
    assert report["target"]["dtype"] == "float32"
    logits = torch.load(tmp_path / "logits")
    merged, tokenizer = gptsmith.load(tmp_path / "out")
    assert tokenizer is not None
    torch.testing.assert_close(merged(TOKENS).logits, logits, atol=1e-4, rtol=0)
    assert main([*words, "--base", str(tmp_path / "base")]) == 2
    assert "already exists" in capfd.readouterr().err
    assert main(["merge", str(tmp_path / "base"), str(tmp_path / "more")]) == 2
    assert "is a whole model: an adapter is needed" in capfd.readouterr().err


@pytest.mark.slow
def test_transformers_reads_the_merged_model(adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = ["--base", str(tmp_path / "base")]
    assert main(["merge", str(adapter), str(tmp_path / "out"), *base]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(TOKENS).logits
    torch.testing.assert_close(theirs, torch.load(tmp_path / "logits"), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_an_adapter_is_a_model_for_every_verb(
    adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the merged model says, the adapter says."""
    base = ["--base", str(tmp_path / "base")]
    assert main(["merge", str(adapter), str(tmp_path / "out"), *base]) == 0
    (tmp_path / "text").write_text("to be or not to be " * 9)

    def said(verb: str, *words: str) -> list[str]:
        capfd.readouterr()
        found = []
        for model in ([str(adapter), *words, *base], [str(tmp_path / "out"), *words]):
            assert main([verb, *model]) == 0, capfd.readouterr().err
            found.append(capfd.readouterr().out.replace(model[0], "MODEL"))
        return found

    for verb, *words in (
        ["sample", "--prompt", "to be", "--seed", "3", "--max-tokens", "5"],
        ["evaluate", "--data", str(tmp_path / "text"), "--json"],
    ):
        one, other = said(verb, *words)
        assert one == other
    one, other = said("describe")
    assert f"LoRA of rank 3 on {tmp_path / 'base'}" in one
    assert one.splitlines()[3:] == other.splitlines()[3:]
    out = ["export", str(adapter), str(tmp_path / "exported"), "--to", "huggingface", *base]
    assert main(out) == 0
    one, other = ((tmp_path / name / "model.safetensors") for name in ("exported", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_describe_shows_the_arithmetic_of_adapters(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "gpt2", "--lora", "16"]) == 0
    page = capfd.readouterr().out
    for figure in ("2,359,296", "12 x 16 x (768 + 2,304)", "589,824", "1,536"):
        assert figure in page
    assert main(["describe", "gpt2", "--lora", "0"]) == 2
    assert "--lora is 0" in capfd.readouterr().err
    assert main(["describe", "gpt2", "--lora", "16", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["lora"]["learned"] == 2_359_296
    saved = describe("gpt2-xl", lora=16).to_json()["lora"]["memory"]["saved"]
    assert saved == 12 * (cost.parameter_count(PRESETS["gpt2-xl"]) - 16 * 48 * 16 * 1600)
    assert 18e9 < saved < 19e9


def test_what_learns_is_what_the_memory_is_counted_for() -> None:
    config = PRESETS["gpt2"]
    count = cost.parameter_count(config)
    assert learned_count(config, FinetuneSettings()) == count
    assert learned_count(config, FinetuneSettings(lora=16), labels=2) == 2_359_296 + 1_536
    frozen = learned_count(config, FinetuneSettings(freeze="all-but-last-1"), labels=2)
    assert frozen == cost.block_count(config) + 2 * 768 + 1_536
    whole, less = (cost.training_memory(config, 1, learned=n) for n in (count, frozen))
    assert whole == cost.training_memory(config, 1)
    assert whole - less == 12 * (count - frozen)
