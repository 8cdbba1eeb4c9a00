"""What a folder says about using a model is carried: templates, end tokens, sampling defaults."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
import transformers

import gptsmith
from gptsmith import GPTConfig
from gptsmith.cli.main import main
from gptsmith.convert import export_model, import_model
from gptsmith.tokenizers import (
    Tokenizer,
    Usage,
    byte_tokenizer,
    char_tokenizer,
    load_tokenizer,
    read_usage,
)
from gptsmith.tokenizers.usage import write_templates
from tests.conftest import TINY, scrambled
from tests.convert.test_gguf import served

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
TEMPLATES = {"default": TEMPLATE, "tool_use": "{{ tools }}"}
GENERATION = {
    "eos_token_id": [256, 258],
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 30,
    "top_p": 0.95,
    "repetition_penalty": 1.1,
}
END, START, TURN, PAD = 256, 257, 258, 259


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model that was fine-tuned to chat, as transformers saves it."""
    backend = byte_tokenizer().backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    config = GPTConfig(**(TINY | {"vocab_size": 260, "context_length": 64, "n_embd": 24}))
    gptsmith.save(scrambled(config), None, tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    model.generation_config = transformers.GenerationConfig(**GENERATION)
    model.save_pretrained(tmp_path / "source")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        padding_side="left",
    )
    tokenizer.chat_template = TEMPLATES
    tokenizer.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def is_carried(folder: Path) -> None:
    """transformers finds in a folder what it saved in the source."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATES
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        *(END, TURN, PAD),
    )
    assert tokenizer.padding_side == "left"
    generation = transformers.GenerationConfig.from_pretrained(folder).to_diff_dict()
    assert generation.items() >= GENERATION.items()
    _, ours = gptsmith.load(folder)
    assert ours is not None
    assert ours.ends == {END, TURN}
    vocabulary = gguf.SpecialVocab(folder)  # as llama.cpp's converter reads a folder
    found = vocabulary.special_token_ids
    assert found.items() >= {"bos": END, "eos": TURN, "pad": PAD}.items()
    assert {each["name"]: each["template"] for each in vocabulary.chat_template} == TEMPLATES


def test_import_export_quantize_and_save_carry_all_of_it(source: Path, tmp_path: Path) -> None:
    report = import_model(source, tmp_path / "imported")
    assert report.lost == ()
    is_carried(tmp_path / "imported")
    report = export_model(tmp_path / "imported", tmp_path / "exported", to="huggingface")
    assert report.lost == ()
    is_carried(tmp_path / "exported")
    gptsmith.save(*gptsmith.load(tmp_path / "imported"), tmp_path / "saved")
    is_carried(tmp_path / "saved")
    words = ["quantize", "imported", "quantized", "--bits", "8", "--tokens", "8"]
    assert main([str(tmp_path / w) if w.endswith("ed") else w for w in words]) == 0
    assert read_usage(tmp_path / "quantized") == read_usage(tmp_path / "imported")


def test_our_own_text_ends_there_too() -> None:
    model = scrambled(GPTConfig(**(TINY | {"vocab_size": 257})))
    prompt = byte_tokenizer().encode("hi")
    new = gptsmith.generate_greedy(model, torch.tensor([prompt]), 6)[0, 2:].tolist()
    end = new[3]
    tokenizer = Tokenizer(byte_tokenizer().backend, Usage(generation={"eos_token_id": [end]}))
    text = "".join(gptsmith.stream(model, tokenizer, "hi", max_tokens=6, temperature=0))
    assert text == tokenizer.decode(new[: new.index(end)])


@pytest.mark.slow
def test_training_further_carries_it(source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be, or not to be. " * 200)
    words = f"train {tmp_path}/text.txt --from {source} --out {tmp_path}/run --steps 1 --seed 1"
    assert main([*words.split(), "--batch-tokens", "64", "--warmup-steps", "0"]) == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    is_carried(checkpoint)


@pytest.mark.slow
def test_a_gguf_holds_it_both_ways(source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "imported")
    report = export_model(tmp_path / "imported", tmp_path / "m.gguf", to="gguf")
    assert report.lost == ("padding_side left", "do_sample True")
    report = import_model(tmp_path / "m.gguf", tmp_path / "again")
    assert report.lost == ()
    usage, before = read_usage(tmp_path / "again"), read_usage(tmp_path / "imported")
    assert usage.templates == TEMPLATES
    assert usage.tokenizer.items() >= {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"}.items()
    said = {name: value for name, value in before.generation.items() if name != "do_sample"}
    assert {name: usage.generation[name] for name in said} == said


@pytest.mark.slow
def test_llama_cpp_does_what_the_gguf_says(source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "imported")
    export_model(tmp_path / "imported", tmp_path / "m.gguf", to="gguf")
    with served(tmp_path / "m.gguf") as server:
        chat = [{"role": "user", "content": "hi"}]
        prompt = server.ask("apply-template", messages=chat)["prompt"]
        assert prompt.startswith("<|im_start|>hi<|im_end|>")
        for end in (END, TURN):
            biased = {"logit_bias": [[end, 1000]], "n_predict": 5}
            assert server.ask("completion", prompt="hi", **biased)["stop_type"] == "eos"
        used = server.ask("completion", prompt="hi", n_predict=1)["generation_settings"]
    wanted = {"temperature": 0.7, "top_k": 30, "top_p": 0.95, "repeat_penalty": 1.1}
    assert {name: used[name] for name in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize("to", ["nanogpt", "book", "llmc"])
def test_what_a_format_has_no_place_for_is_reported(to: str, source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "imported")
    report = export_model(tmp_path / "imported", tmp_path / "out", to=to, approximate=True)
    said = {"chat template", "chat template tool_use", "end token 258", "temperature 0.7"}
    assert said <= set(report.lost)
    plain = replace(gptsmith.load(tmp_path / "plain")[0].config, vocab_size=257)
    gptsmith.save(scrambled(plain), byte_tokenizer(), tmp_path / "ours")
    report = export_model(tmp_path / "ours", tmp_path / "out2", to=to, approximate=True)
    assert [words for words in report.lost if "activation" not in words] == []


def test_an_onnx_folder_carries_it(source: Path, tmp_path: Path) -> None:
    import_model(source, tmp_path / "imported")
    assert export_model(tmp_path / "imported", tmp_path / "onnx", to="onnx").lost == ()
    assert read_usage(tmp_path / "onnx") == read_usage(tmp_path / "imported")


def test_a_folder_without_a_tokenizer_keeps_its_defaults(tmp_path: Path) -> None:
    gptsmith.save(scrambled(GPTConfig(**TINY)), None, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 36, 37], "temperature": 0.5}))
    (tmp_path / "model" / "manifest.json").unlink()
    assert import_model(tmp_path / "model", tmp_path / "out").lost == ()
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (said["eos_token_id"], said["temperature"]) == ([3, 36], 0.5)  # there is no 37


def test_another_tokenizer_keeps_what_it_can(source: Path, tmp_path: Path) -> None:
    """<|im_end|> and its id are not in it, and the report says so."""
    words = ("eos_token <|im_end|>", "pad_token <|pad|>")
    gptsmith.save(
        scrambled(GPTConfig(**(TINY | {"vocab_size": 257}))),
        Tokenizer(byte_tokenizer().backend, read_usage(source)),
        tmp_path / "smaller",
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "smaller")
    assert len(tokenizer) == 257
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == END
    (tmp_path / "smaller" / "tokenizer.json").unlink()
    (tmp_path / "smaller" / "manifest.json").unlink()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (tmp_path / "smaller" / "tokenizer_config.json").write_text(json.dumps(settings))
    report = import_model(tmp_path / "smaller", tmp_path / "out", tokenizer="byte")
    assert set(words) <= set(report.lost)
    assert load_tokenizer(tmp_path / "out").usage.templates == TEMPLATES


def test_vocabulary_files_with_added_tokens(tmp_path: Path) -> None:
    """As transformers wrote them before tokenizer.json."""
    vocab = byte_tokenizer().vocab
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    added = {"word": 259, "<b>": 258, "<a>": 257}
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    specials = {"eos_token": {"content": "<b>", "lstrip": False}}
    specials["additional_special_tokens"] = ["<a>"]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(specials))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.specials == {256: "<|endoftext|>", 257: "<a>", 258: "<b>"}
    assert tokenizer.encode("a word") == [*b"a ", 259]
    assert tokenizer.ends == {256, 258}
    described = {"257": {"content": "xx", "special": False}, "258": {"content": "yy"}}
    (tmp_path / "added_tokens.json").unlink()
    settings = {"added_tokens_decoder": described}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).encode("xxyy") == [257, 258]
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<a>": 300}))
    with pytest.raises(ValueError, match="added tokens do not follow"):
        load_tokenizer(tmp_path)


def test_a_template_cannot_be_written_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write_templates({"../../evil": "1"}, tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("context", "said"), [(1, 1), (11, 5), (128, 64), (511, 255), (512, None), (1024, None)]
)
def test_small_contexts_say_how_much_fits(context: int, said: int | None) -> None:
    found = Usage().generation_config(end=None, vocab_size=3, context_length=context)
    assert found.get("max_new_tokens") == said


def test_a_char_tokenizer_spares_no_character(tmp_path: Path, said: Callable) -> None:
    """One that padded would be special, and be missing from decoded text."""
    tokenizer = char_tokenizer("to be")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.special_tokens_map == {}
    theirs.pad_token = "o"
    assert theirs.decode(theirs("to be")["input_ids"], skip_special_tokens=True) == "to be"
    assert said() == []


EDITED = "was edited since it was written: chat_template.jinja; used as it is now"


@pytest.mark.slow
def test_every_command_uses_an_edited_folder_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be, or not to be. " * 300)
    config = GPTConfig(**(TINY | {"vocab_size": 257, "n_embd": 24}))
    gptsmith.save(scrambled(config), byte_tokenizer(), "model")
    Path("model/chat_template.jinja").write_text(TEMPLATE)
    steps = "--batch-tokens 66 --warmup-steps 0 --seed 1"
    for words in (
        "describe model",
        "sample model --prompt hi --max-tokens 2 --seed 1",
        "evaluate model --data text.txt",
        "quantize model quantized --bits 8 --tokens 8",
        "export model model.gguf --to gguf",
        "import model imported",
        f"train text.txt --from model --out run --steps 1 {steps}",
    ):
        assert main(words.split()) == 0, words
        assert capsys.readouterr().err.count(EDITED) == 1, words
    (checkpoint,) = Path("run/checkpoints").iterdir()
    assert (checkpoint / "chat_template.jinja").read_text() == TEMPLATE
    (checkpoint / "chat_template.jinja").write_text("{{ 1 }}")
    assert main("train --resume run".split()) == 0
    assert capsys.readouterr().err.count(EDITED) == 1
