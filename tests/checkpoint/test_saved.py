"""A model is one folder: Hugging Face reads it, we read Hugging Face's, and damage is found."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gptsmith
from gptsmith import GPT, GPTConfig, generate_greedy
from gptsmith.checkpoint.saving import save as save_checkpoint
from gptsmith.checkpoint.training_state import load_training
from gptsmith.checkpoint.verifying import verify
from gptsmith.cli.main import main
from gptsmith.machine.files import DamagedError, written_whole
from gptsmith.tokenizers import Tokenizer, byte_tokenizer, char_tokenizer, gpt2_tokenizer, learn_bpe
from tests.advice import cured, refusal
from tests.conftest import TINY, scrambled
from tests.versions import Ask

TEXT = "To be, or not to be: that is the question.\n\nHAMLET:\nWhether 'tis nobler — naïve 🙂\n"
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: char_tokenizer(TEXT),
    "byte": byte_tokenizer,
    "gpt2": gpt2_tokenizer,
    "learned": lambda: learn_bpe([TEXT] * 3, 300),
}
ROOMY = TINY | {"context_length": 300}  # longer than TEXT in any tokens
FORMS = {
    "gpt2": {},
    "nanogpt": {"bias": False, "activation": "gelu_erf"},
    "book": {"qkv_bias": False, "tie_weights": False},
    "odd": {"bias": False, "qkv_bias": True, "n_inner": 20, "norm_eps": 1e-3},
}


def tokens_of(model: GPT) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(model.config.vocab_size, (2, 5), generator=generator)


def their_gpt2(*, tie: bool = True, activation: str = "gelu_new") -> transformers.GPT2LMHeadModel:
    """A GPT-2 of transformers' with large random weights, in evaluation mode."""
    config = transformers.GPT2Config(
        vocab_size=37,
        n_positions=11,
        n_embd=12,
        n_layer=2,
        n_head=3,
        activation_function=activation,
        tie_word_embeddings=tie,
    )
    reference = transformers.GPT2LMHeadModel(config).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return reference


def theirs(folder: Path) -> transformers.PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("form", FORMS)
def test_transformers_reads_what_we_save(form: str, tmp_path: Path, said: Callable) -> None:
    model = scrambled(GPTConfig(**(TINY | FORMS[form])))
    gptsmith.save(model, None, tmp_path / "model")
    read, tokens = theirs(tmp_path / "model"), tokens_of(model)
    assert type(read) is transformers.GPT2LMHeadModel
    assert (read(tokens).logits - model(tokens).logits).abs().max() < 1e-4
    greedy = read.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert greedy.tolist() == generate_greedy(model, tokens, 6).tolist()
    assert said() == []


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_we_read_what_transformers_saves(tie: bool, activation: str, tmp_path: Path) -> None:
    reference = their_gpt2(tie=tie, activation=activation)
    reference.save_pretrained(tmp_path)
    model, tokenizer = gptsmith.load(tmp_path)
    assert tokenizer is None
    tokens = tokens_of(model)
    assert (reference(tokens).logits - model(tokens).logits).abs().max() < 1e-4
    greedy = reference.generate(tokens, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert greedy.tolist() == generate_greedy(model, tokens, 6).tolist()


def test_sharded_bare_and_half_precision_folders_are_read(tmp_path: Path) -> None:
    """As published folders come: several files, no `transformer.` prefix, masks, float16."""
    model = scrambled(GPTConfig(**TINY))
    gptsmith.save(model, None, tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    bare = {k.removeprefix("transformer."): v.half() for k, v in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 11, 11).half()
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", folder)
    names = sorted(bare)
    index = {}
    for number, part in enumerate((names[:7], names[7:])):
        save_file({name: bare[name] for name in part}, folder / f"model-{number}.safetensors")
        index |= dict.fromkeys(part, f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    read, _ = gptsmith.load(folder)
    for (name, one), other in zip(model.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(one.half().float(), other), name


@pytest.mark.parametrize("form", FORMS)
def test_saving_and_loading_changes_nothing(form: str, tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**(TINY | FORMS[form])))
    gptsmith.save(model, None, tmp_path / "a")
    read, _ = gptsmith.load(tmp_path / "a")
    assert {k: v.tolist() for k, v in model.state_dict().items()} == {
        k: v.tolist() for k, v in read.state_dict().items()
    }
    assert read.config.has_qkv_bias == model.config.has_qkv_bias
    assert replace(read.config, qkv_bias=None) == replace(model.config, qkv_bias=None)
    assert (read.lm_head.weight is read.wte.weight) == model.config.tie_weights
    assert not read.training


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizer_travels_in_the_folder(kind: str, tmp_path: Path, said: Callable) -> None:
    tokenizer = KINDS[kind]()
    model = scrambled(GPTConfig(**(ROOMY | {"vocab_size": tokenizer.vocab_size})))
    gptsmith.save(model, tokenizer, tmp_path / "model")
    _, ours = gptsmith.load(tmp_path / "model")
    assert ours is not None
    assert ours.fingerprint == tokenizer.fingerprint
    assert ours.ends == tokenizer.ends == {tokenizer.end_of_text} - {None}
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert other.is_fast
    ids = tokenizer.encode(TEXT)
    assert other(TEXT, add_special_tokens=False)["input_ids"] == ids
    assert other.decode(ids) == TEXT == tokenizer.decode(ids)
    assert other.eos_token_id == tokenizer.end_of_text
    assert other.model_max_length == 300
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["eos_token_id"] == config["bos_token_id"] == tokenizer.end_of_text
    theirs(tmp_path / "model")
    assert said() == []


def test_biases_learned_elsewhere_are_found_and_said(tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**TINY, bias=False))
    gptsmith.save(model, None, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    (tmp_path / "model" / "manifest.json").unlink()  # as a folder saved elsewhere has none
    tensors = load_file(path)
    tensors["transformer.h.1.mlp.c_fc.bias"][3] = 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="has biases that its config.json calls absent"):
        read, _ = gptsmith.load(tmp_path / "model")
    assert read.config.bias
    assert not read.config.has_qkv_bias
    tokens = tokens_of(read)
    expected = theirs(tmp_path / "model")(tokens).logits
    assert (expected - read(tokens).logits).abs().max() < 1e-4


@pytest.mark.slow
def test_loading_waits_for_no_compiler(tmp_path: Path) -> None:
    gptsmith.save(scrambled(GPTConfig(**TINY)), None, tmp_path / "model")
    code = "import sys, gptsmith; gptsmith.load(sys.argv[1]); assert 'sympy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], check=True)


# -- damage


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    model = scrambled(GPTConfig(**(TINY | {"vocab_size": 257})))
    state = {"step": 7}
    save_checkpoint(
        model, tokenizer, tmp_path / "model", optimizer={"a": torch.ones(3)}, state=state
    )
    return tmp_path / "model"


def test_edited_text_is_used_and_named(saved: Path) -> None:
    settings = json.loads((saved / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0].content }}"
    (saved / "tokenizer_config.json").write_text(json.dumps(settings))
    (saved / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with pytest.warns(UserWarning, match="edited since it was written") as caught:
        _, tokenizer = gptsmith.load(saved)
    said = ": chat_template.jinja, tokenizer_config.json; used as it is now"
    assert [str(each.message).endswith(said) for each in caught] == [True]
    assert tokenizer is not None
    assert tokenizer.usage.templates == {"default": "{{ messages[-1].content }}"}


def test_a_tokenizer_that_does_something_else_is_refused(saved: Path) -> None:
    path = saved / "tokenizer.json"
    same = json.loads(path.read_text())
    path.write_text(json.dumps(same))  # other bytes
    with pytest.warns(UserWarning, match=r"tokenizer\.json"):
        _, tokenizer = gptsmith.load(saved)
    assert tokenizer is not None
    vocab = same["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(same))
    with (
        pytest.warns(UserWarning, match=r"tokenizer\.json"),
        pytest.raises(DamagedError, match="is not the model's tokenizer any more"),
    ):
        gptsmith.load(saved)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5", "4.57"])
def test_saved_again_by_transformers_it_is_still_ours(
    version: str, tmp_path: Path, ask: Ask
) -> None:
    """With the template that is added; the weights keep their bytes, so they match the manifest."""
    for kind, make in KINDS.items():
        tokenizer = make()
        model = scrambled(GPTConfig(**(ROOMY | {"vocab_size": tokenizer.vocab_size})))
        gptsmith.save(model, tokenizer, tmp_path / kind)
    ask(version, tmp_path, SAVED_AGAIN, *KINDS)
    for kind in KINDS:
        with pytest.warns(UserWarning, match=r"edited .*chat_template\.jinja, .*config\.json"):
            _, tokenizer = gptsmith.load(tmp_path / kind)
        assert tokenizer is not None
        assert tokenizer.usage.templates == {"default": "{{ 1 }}"}


def test_training_state_comes_back(saved: Path) -> None:
    tensors, state = load_training(saved)
    assert tensors["a"].tolist() == [1, 1, 1]
    assert state == {"step": 7}
    assert sorted(p.name for p in saved.glob("*.safetensors")) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: cut(f / "model.safetensors"), "model.safetensors has .* bytes, but was written"),
        (lambda f: flip(f / "model.safetensors"), "model.safetensors was changed"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda f: cut(f / "config.json"), "config.json is not valid JSON"),
        (lambda f: edit(f, n_layer=1), "has 2 layers, but config.json calls for 1"),
        (lambda f: cut(f / "tokenizer.json"), "tokenizer.json is not valid JSON"),
        (lambda f: cut(f / "manifest.json"), "manifest.json is not valid JSON"),
        (lambda f: (f / "manifest.json").write_text("{}"), "manifest.json lists no files"),
    ],
)
def test_damage_is_found(saved: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(saved)
    with pytest.raises(DamagedError, match=message):
        verify(saved)


@pytest.mark.parametrize("flipped", [True, False])
def test_load_reads_while_it_verifies_and_returns_nothing_damaged(
    flipped: bool, saved: Path
) -> None:
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content if flipped else content[:-99])
    with pytest.raises(DamagedError, match=r"its SHA-256 differs|but was written with"):
        gptsmith.load(saved)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_training_files_are_only_verified_for_training(saved: Path, name: str) -> None:
    flip(saved / "training" / name)
    gptsmith.load(saved)
    with pytest.raises(DamagedError, match=rf"{name} was changed"):
        verify(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: cut(f / "model.safetensors"), "is cut short"),
        (lambda f: (f / "model.safetensors").write_bytes(b"12"), "is cut short"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\2" + bytes(99)), "not a safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: edit(f, model_type="llama"), "model_type 'llama': only 'gpt2' and 'nanochat'"),
        (lambda f: edit(f, n_layer=3), "has 2 layers, but config.json calls for 3"),
        (lambda f: edit(f, n_layer=1), "has 2 layers, but config.json calls for 1"),
        (lambda f: edit(f, n_positions=10), r"wpe.weight is \(11, 12\), but .* calls for \(10"),
        (lambda f: edit(f, n_head=5), "n_embd 12 is not a multiple of n_head 5"),
        (lambda f: edit(f, activation_function="silu"), "activation_function 'silu' is unknown"),
        (lambda f: edit(f, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse"),
        (lambda f: cut(f / "config.json"), "config.json is not valid JSON"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json is not a tokenizer"),
        (lambda f: edit(f, vocab_size=200), r"wte.weight is \(257, 12\)"),
    ],
)
def test_a_foreign_folder_that_is_no_gpt2_is_refused(
    saved: Path, change: Callable[[Path], None], message: str
) -> None:
    (saved / "manifest.json").unlink()
    change(saved)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gptsmith.load(saved)


def test_a_tokenizer_too_large_for_the_model_is_refused(tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**TINY))
    with pytest.raises(ValueError, match="257 tokens, but the model's vocabulary only 37"):
        gptsmith.save(model, byte_tokenizer(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_never_overwritten(saved: Path) -> None:
    before = sorted(p.name for p in saved.parent.iterdir())
    with pytest.raises(ValueError, match="already exists"):
        gptsmith.save(scrambled(GPTConfig(**TINY)), None, saved)
    gptsmith.load(saved)
    assert sorted(p.name for p in saved.parent.iterdir()) == before


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def half_a_write() -> None:
        with written_whole(tmp_path / "out") as folder:
            (folder / "one").write_text("1")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"the disk is full: .*out was not written"):
        half_a_write()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_suggests(tmp_path: Path) -> None:
    (tmp_path / "plays").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no model at .*plais, did you mean 'plays'\?"):
        gptsmith.load(tmp_path / "plais")


# -- transformers, as people type it, in the version of today and in the older one

SOME = 40  # of the logits of GPT-2's vocabulary, which make half a megabyte of JSON for each token
USED = (
    f"SOME = {SOME}"
    + """
import json, sys, warnings
warnings.simplefilter("error")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__, pipeline
text, short, *folders = sys.argv[1:]
for folder in folders:
    m, t = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = {"version": __version__, "text": t.decode(t(text)["input_ids"])}
    with torch.no_grad():
        found["logits"] = m(**t(text, return_tensors="pt")).logits[0, :, :SOME].tolist()
        found["generated"] = m.generate(**t(short, return_tensors="pt")).tolist()
        t.pad_token = t.pad_token or " "
        batch = t([text, short], return_tensors="pt", padding=True)
        found["batch"] = m(**batch).logits[..., :SOME].tolist()
        t.padding_side = "left"
        batch = t([text, short], return_tensors="pt", padding=True)
        found["written"] = m.generate(**batch, max_new_tokens=7).tolist()
    pipeline("text-generation", model=folder)(short)
    likeliest = pipeline("text-generation", model=folder)(short, top_k=1)
    found["pipeline"] = likeliest[0]["generated_text"]
    print(json.dumps(found))
"""
)
SAVED_AGAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    m, t = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    t.chat_template = "{{ 1 }}"
    m.save_pretrained(folder)
    t.save_pretrained(folder)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5", "4.57"])
def test_the_shortest_idioms_do_what_we_do(version: str, tmp_path: Path, ask: Ask) -> None:
    """`m(**t(text))`, `m.generate(**t(text))`, batches padded right and left, and the pipeline."""
    short = "To be"
    saved = {}
    for kind, make in KINDS.items():
        tokenizer = make()
        sizes = TINY | {"vocab_size": tokenizer.vocab_size, "context_length": 128}
        model = scrambled(GPTConfig(**sizes))
        gptsmith.save(model, tokenizer, tmp_path / kind)
        saved[kind] = model, tokenizer
    lines = ask(version, tmp_path, USED, TEXT, short, *saved)
    for (model, tokenizer), line in zip(saved.values(), lines, strict=True):
        found = json.loads(line)
        assert found["version"].startswith(version)
        assert found["text"] == TEXT
        long, brief = (torch.tensor([tokenizer.encode(text)]) for text in (TEXT, short))
        logits, short_logits = (model(ids).logits[0, :, :SOME] for ids in (long, brief))
        assert difference(found["logits"], logits) < 1e-4
        assert difference(found["batch"][0], logits) < 1e-4
        assert difference(found["batch"][1][: brief.shape[1]], short_logits) < 1e-4
        end, half = tokenizer.end_of_text, model.config.context_length // 2
        assert found["generated"] == [written(model, brief, half, end)]
        for row, prompt in zip(found["written"], (long, brief), strict=True):
            ours = written(model, prompt, 7, end)
            padding = long.shape[1] - prompt.shape[1]
            assert row[padding:][: len(ours)] == ours
        text = tokenizer.decode(id for id in written(model, brief, half, end) if id != end)
        assert found["pipeline"] == text


def difference(theirs: list, ours: torch.Tensor) -> float:
    return float((torch.tensor(theirs) - ours).detach().abs().max())


def written(model: GPT, prompt: torch.Tensor, count: int, end: int | None) -> list[int]:
    """Our greedy continuation of a prompt (1, T), up to its end of text."""
    ids = generate_greedy(model, prompt, count)[0].tolist()
    new = ids[prompt.shape[1] :]
    return ids[: len(ids) - len(new) + new.index(end) + 1] if end in new else ids


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# -- what is advised


def test_what_is_advised_about_folders_works(
    toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cured("sample rum --seed 1 --max-tokens 2".split(), "did you mean 'run'?", capsys)
    folder = next(Path("run/checkpoints").iterdir())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    theirs.config.save_pretrained("old")
    torch.save(theirs.state_dict(), "old/pytorch_model.bin")
    capsys.readouterr()
    cured(["describe", "old"], "`gptsmith import old OUT` reads them", capsys)
    shutil.rmtree(folder / "training")
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="start from it with --from"):
        load_training(folder)
    words = f"train text.txt --out more --from {folder} --steps 1 --warmup-steps 0 --threads 1"
    assert main([*words.split(), "--batch-tokens", "32"]) == 0, capsys.readouterr().err


def test_what_is_advised_about_bits_works(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize = "quantize MODEL OUT --bits 8 --tokens 8"
    assert main(quantize.replace("MODEL", "run").replace("OUT", "small").split()) == 0
    said = refusal("sample small --dtype int4 --seed 1".split(), capsys)
    assert said.endswith("for 4 bits, use the original model")
    assert main("sample run --dtype int4 --seed 1 --max-tokens 2".split()) == 0
    config = Path("small/config.json")
    config.write_text(config.read_text().replace('"format": 1', '"format": 9'))
    Path("small/manifest.json").unlink()
    assert "quantize the original again, or update" in refusal(["describe", "small"], capsys)
    assert main(quantize.replace("MODEL", "run").replace("OUT", "again").split()) == 0
    assert main(["describe", "again"]) == 0
