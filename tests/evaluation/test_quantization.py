"""Quantized folders: written, read, refused, measured, and chosen by `--dtype auto`."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
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
from gptsmith import GPT, GPTConfig
from gptsmith.checkpoint import saving
from gptsmith.cli.main import main
from gptsmith.config.cost import weight_bytes
from gptsmith.config.settings import MachineSettings
from gptsmith.evaluation import precision, quantization
from gptsmith.model.quantized import packed_bits
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import scrambled
from tests.model.test_quantized import MODELS

SIZES: dict[str, Any] = {
    "vocab_size": 257,
    "context_length": 19,
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 24,
}
TEXT = "To be, or not to be: that is the question.\n" * 9


@pytest.fixture(autouse=True)
def own_cache(compiled_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is remembered by one test alone; what is compiled is shared."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shared, here = (
        folder / "gptsmith" / "native" for folder in (compiled_folder, tmp_path / "cache")
    )
    shared.mkdir(parents=True, exist_ok=True)
    here.parent.mkdir(parents=True)
    here.symlink_to(shared)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Its head, larger than usual, makes 4 bits cost something."""
    model = scrambled(GPTConfig(**SIZES, tie_weights=False))
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    gptsmith.save(model, byte_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def quantized(model: Path) -> Path:
    return written(model, 4)


def written(model: Path, bits: int) -> Path:
    """The same model in fewer bits, without the time that measuring takes."""
    packed, tokenizer = gptsmith.load(model, bits=bits)
    gptsmith.save(packed, tokenizer, model.parent / f"q{bits}")
    return model.parent / f"q{bits}"


def tokens_of(text: str = TEXT) -> Tensor:
    return torch.tensor([byte_tokenizer().encode(text)[:19]])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which a command ends."""
    assert main([str(word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    return said.err.removeprefix("gptsmith: ").rstrip()


# -- the folder


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_saved_loads_as_the_same_bits(tmp_path: Path, name: str, bits: int) -> None:
    gptsmith.save(scrambled(MODELS[name]), None, tmp_path / "model")
    packed, _ = gptsmith.load(tmp_path / "model", bits=bits)
    gptsmith.save(packed, None, tmp_path / "packed")
    again, _ = gptsmith.load(tmp_path / "packed")
    same = [replace(c, qkv_bias=c.has_qkv_bias) for c in (again.config, MODELS[name])]
    assert same[0] == same[1]
    assert packed_bits(again) == bits
    one, other = packed.state_dict(), again.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert {t.dtype for t in one.values()} >= {torch.int32, torch.bfloat16}
    tied = again.get_submodule("lm_head").words is again.get_submodule("wte").words
    assert tied == MODELS[name].tie_weights

    plain, _ = gptsmith.load(tmp_path / "packed", unpacked=True)
    assert packed_bits(plain) is None
    tokens = torch.arange(10).view(2, 5)
    assert torch.allclose(plain(tokens).logits, again(tokens).logits, atol=1e-6)


def test_the_files_hold_the_layout_under_these_names(quantized: Path) -> None:
    tensors = load_file(quantized / "model.safetensors")
    assert tensors["transformer.h.0.attn.c_attn.words"].shape == (72, 3, 1)
    assert tensors["transformer.h.1.mlp.c_proj.words"].shape == (24, 6, 2)
    assert tensors["transformer.h.1.mlp.c_proj.scales"].shape == (24, 2)
    assert tensors["transformer.wte.words"].shape == (257, 6, 1)  # in 8 bits
    assert tensors["transformer.wpe.weight"].dtype == torch.float32
    assert tensors["lm_head.scales"].shape == (257, 1)
    config = json.loads((quantized / "config.json").read_text())
    assert config["model_type"] == "gptsmith-quantized"
    assert config["quantization"]["format"] == 1
    assert config["quantization"]["bits"] == 4
    assert {"tokenizer.json", "manifest.json", "generation_config.json"} <= {
        path.name for path in quantized.iterdir()
    }


def test_transformers_refuses_the_folder_by_name(quantized: Path) -> None:
    with pytest.raises(ValueError, match="model type `gptsmith-quantized`"):
        transformers.AutoModelForCausalLM.from_pretrained(quantized)


@torch.no_grad()
def test_activations_are_in_the_dtype_that_was_asked_for(model: Path) -> None:
    packed, _ = gptsmith.load(written(model, 8), dtype=torch.bfloat16)
    assert packed.dtype == packed(tokens_of()).logits.dtype == torch.bfloat16
    plain, _ = gptsmith.load(model)
    assert torch.allclose(
        packed(tokens_of()).logits.float(), plain(tokens_of()).logits, atol=0.3, rtol=0.1
    )


@pytest.mark.slow
def test_a_checkpoint_that_is_stored_in_bf16_stays_so(tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**SIZES)).to(torch.bfloat16)
    stored = saving.stored_model(model)
    (tmp_path / "bf16").mkdir()
    saving.write(replace(stored, dtype="bf16"), tmp_path / "bf16")
    quantization.quantize(tmp_path / "bf16", tmp_path / "q8", 8, tokens=20)
    tensors = load_file(tmp_path / "q8" / "model.safetensors")
    assert tensors["transformer.wpe.weight"].dtype == torch.bfloat16
    assert torch.equal(tensors["transformer.wpe.weight"], model.state_dict()["wpe.weight"])


def without_manifest(folder: Path) -> dict[str, Tensor]:
    (folder / "manifest.json").unlink(missing_ok=True)
    return load_file(folder / "model.safetensors")


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    (folder / "manifest.json").unlink(missing_ok=True)
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


NAME = "transformer.h.1.attn.c_proj"
DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (
        lambda t: t.pop(f"{NAME}.scales"),
        f"lacks 1 tensors of a quantized model, {NAME}.scales first",
    ),
    "no words": (
        lambda t: t.pop(f"{NAME}.words"),
        f"lacks 1 tensors of a quantized model, {NAME}.words first",
    ),
    "a stranger": (
        lambda t: t.update({f"{NAME}.weight": torch.zeros(2)}),
        f"has 1 tensors no quantized model has, {NAME}.weight first",
    ),
    "a shape": (
        lambda t: t.update({f"{NAME}.words": torch.zeros(24, 3, 2, dtype=torch.int32)}),
        f": {NAME}.words is (24, 3, 2), but config.json calls for (24, 3, 1) (4 bits)",
    ),
    "a type of words": (
        lambda t: t.update({f"{NAME}.words": torch.zeros(24, 3, 1)}),
        f": {NAME}.words is of type F32, but I32 is needed",
    ),
    "a type of scales": (
        lambda t: t.update({f"{NAME}.scales": torch.zeros(24, 1)}),
        f": {NAME}.scales is of type F32, but BF16 is needed",
    ),
    "a type of what is not packed": (
        lambda t: t.update({"transformer.ln_f.weight": torch.zeros(24, dtype=torch.int32)}),
        ": transformer.ln_f.weight is of type I32, but F32 or F16 or BF16 is needed",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_one_line(
    quantized: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = without_manifest(quantized)
    change, line = DAMAGES[damage]
    change(tensors)
    save_file(tensors, quantized / "model.safetensors")
    for words in (["sample", quantized], ["describe", quantized]):
        said = refused(capsys, *words)
        assert said.removeprefix(str(quantized)).strip() == line.strip()


def test_a_layer_too_few_is_said(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(quantized, lambda values: values.update(n_layer=3))
    assert refused(capsys, "sample", quantized) == (
        f"{quantized} has 2 layers, but config.json calls for 3"
    )


SECTIONS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another format": (
        lambda values: values["quantization"].update(format=2),
        "the folder has quantization format 2, but this version of gptsmith reads format 1: "
        "quantize the original again, or update gptsmith",
    ),
    "other bits": (
        lambda values: values["quantization"].update(bits=5),
        "bits is 5: 8 or 4 is needed",
    ),
    "bits that are no number": (
        lambda values: values["quantization"].update(bits=True),
        "bits is True: 8 or 4 is needed",
    ),
    "no section": (
        lambda values: values.pop("quantization"),
        'config.json has no "quantization" with format, bits and model_type: it was edited',
    ),
    "another vocabulary": (
        lambda values: values["quantization"].update(vocabulary_bits=4),
        "config.json has vocabulary_bits 4: 8 is needed",
    ),
    "another model": (
        lambda values: values["quantization"].update(model_type="llama"),
        "config.json says model_type 'llama': only 'gpt2' and 'nanochat' are understood",
    ),
}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_that_is_not_understood_is_one_line(
    quantized: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, line = SECTIONS[name]
    changed(quantized, change)
    assert refused(capsys, "sample", quantized) == f"{quantized}: {line}"


def test_a_file_cut_short_is_said(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = quantized / "model.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 100)
    said = refused(capsys, "sample", quantized)
    assert said == f"{path} has {size - 100:,} bytes, but was written with {size:,}"
    (quantized / "manifest.json").unlink()
    said = refused(capsys, "sample", quantized)
    assert said == f"{path} is cut short: it has {size - 100:,} bytes, fewer than its header says"


# -- the command


@pytest.mark.slow
def test_the_report_agrees_with_an_independent_computation(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "out"
    (model.parent / "text.txt").write_text(TEXT)
    words = ["quantize", model, out, "--bits", "4", "--data", model.parent / "text.txt"]
    assert main([*map(str, words), "--tokens", "150", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)

    plain, tokenizer = gptsmith.load(model)
    packed, _ = gptsmith.load(out)
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT)[:150]
    kls, losses, others, same = [], [], [], 0
    for start in range(0, 149, 19):
        window = ids[start : start + 20]
        with torch.no_grad():
            one, other = (m(torch.tensor([window[:-1]])).logits[0] for m in (plain, packed))
        for place, target in enumerate(window[1:]):
            p, q = ([math.exp(v) for v in logits[place].tolist()] for logits in (one, other))
            p, q = ([value / math.fsum(row) for value in row] for row in (p, q))
            kls.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
            losses.append(-math.log(p[target]))
            others.append(-math.log(q[target]))
            same += p.index(max(p)) == q.index(max(q))
    found = report["divergence"]
    assert found["positions"] == len(kls) == 149
    assert found["mean_kl"] == pytest.approx(sum(kls) / 149, rel=1e-5)
    assert found["largest_kl"] == pytest.approx(max(kls), rel=1e-5)
    assert found["same_likeliest"] == pytest.approx(same / 149)
    assert found["original_loss"] == pytest.approx(sum(losses) / 149, rel=1e-6)
    assert found["loss"] == pytest.approx(sum(others) / 149, rel=1e-6)

    sizes = [
        sum(t.numel() * t.element_size() for t in load_file(f / "model.safetensors").values())
        for f in (model, out)
    ]
    assert [report["weight_bytes"][when] for when in ("before", "after")] == sizes
    on_disk = sum(path.stat().st_size for path in out.iterdir())
    assert 0 <= on_disk - report["folder_bytes"]["after"] < 2000  # the manifest came last
    assert list(report["speeds"]) == ["float32", "bf16", "int4"]
    assert all(speed > 0 for speed in report["speeds"].values())


def test_large_comparisons_go_in_parts_to_the_same_result(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = (gptsmith.load(model, bits=bits)[0] for bits in (None, 4))
    rows = quantization.own_text(plain, 90)
    opened = []

    def open_plain() -> GPT:
        opened.append("plain")
        return plain

    whole = quantization.compare(open_plain, lambda: packed, rows, 257)
    monkeypatch.setattr(quantization, "KEPT_NUMBERS", 2 * 6 * 257)
    monkeypatch.setattr(quantization, "POSITIONS_AT_ONCE", 4)
    parts = quantization.compare(open_plain, lambda: packed, rows, 257)
    assert len(opened) == 1 + math.ceil(len(rows) / 2)
    assert vars(parts) == pytest.approx(vars(whole))
    assert whole.mean_kl > 0


def test_the_original_writes_by_its_own_probabilities(model: Path) -> None:
    """Its loss on its own text is its entropy, within what chance explains."""
    plain, _ = gptsmith.load(model)
    rows = quantization.own_text(plain, 500, first=65)
    assert sum(len(targets) for _, targets in rows) >= 500
    assert all(int(tokens[0]) == 65 for tokens, _ in rows)
    surprise, entropy = 0.0, 0.0
    for (tokens, targets), logits in zip(rows, quantization.logits_of(plain, rows), strict=True):
        p = logits.log_softmax(-1)
        surprise -= float(p[range(len(targets)), targets].sum())
        entropy -= float((p.exp() * p).sum())
        assert torch.equal(tokens[1:], targets[:-1])
    positions = sum(len(targets) for _, targets in rows)
    assert abs(surprise - entropy) / positions < 0.3


@pytest.mark.slow
def test_the_report_without_data_says_what_it_compared_on(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = model.parent / "out"
    assert main(["quantize", str(model), str(out), "--bits", "8", "--tokens", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{model}: 8 bits, in {out}"
    starts = ["weights", "folder", "speed", "compared", "perplexity", "divergence", "likeliest"]
    assert [line.split()[0] for line in lines[1:]] == starts
    assert "text that the original generates at temperature 1 with seed 0" in lines[4]
    assert main(["describe", str(out)]) == 0
    assert "quantized to 8 bits" in capsys.readouterr().out.splitlines()[0]


def test_what_cannot_be_quantized_is_one_line(
    model: Path, quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, odd = model.parent / "out", model.parent / "odd"
    gptsmith.save(GPT(GPTConfig(**SIZES | {"n_embd": 36})), None, odd)
    said = refused(capsys, "quantize", odd, out, "--bits", "8")
    assert said == "n_embd is 36: a multiple of 8 is needed to quantize a model"
    said = refused(capsys, "quantize", quantized, out, "--bits", "8")
    assert said.startswith(f"{quantized} is quantized already, in 4 bits: ")
    said = refused(capsys, "quantize", model, out, "--bits", "3")
    assert said == "--bits is '3': one of 8, 4 is needed"
    assert "bits is 'x'" in refused(capsys, "quantize", model, out, "--bits", "x")
    said = refused(capsys, "quantize", model, out, "--bits", "8", "--tokens", "1")
    assert said == "--tokens is 1: at least 2 is needed"
    said = refused(capsys, "quantize", model, quantized, "--bits", "8")
    assert said == f"{quantized} already exists: choose another name, or remove it first"
    said = refused(capsys, "quantize", model, out, "--bits", "8", "--data", "nowhere.txt")
    assert "nowhere.txt" in said
    assert not out.exists()
    assert not list(model.parent.glob(".*.partial"))


@pytest.mark.system("posix", "is killed by a signal")
@pytest.mark.slow
def test_killed_in_mid_write_it_leaves_no_model(model: Path) -> None:
    """It is killed as the tensors are being written, then run again."""
    out = model.parent / "out"
    code = (
        "import os, signal, sys; from gptsmith.cli.main import main\n"
        "from gptsmith.checkpoint import tensors as weights\n"
        "pack, calls = weights.pack, []\n"
        "def deadly(*given):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return pack(*given)\n"
        "weights.pack = deadly; main(sys.argv[1:])"
    )
    words = ["quantize", str(model), str(out), "--bits", "4", "--tokens", "20"]
    done = subprocess.run([sys.executable, "-c", code, *words], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (model.parent / ".out.partial" / "model.safetensors").exists()
    assert not out.exists()
    assert main(words) == 0
    assert not (model.parent / ".out.partial").exists()
    assert packed_bits(gptsmith.load(out)[0]) == 4


@pytest.mark.slow
def test_memory_stays_below_the_weights_and_a_bound(tmp_path: Path) -> None:
    """Of 100 MB of weights; the bound is of PyTorch itself, the logits and the packed model."""
    config = GPTConfig(n_layer=7, n_head=8, n_embd=512, vocab_size=6000, context_length=256)
    assert weight_bytes(config) > 100e6
    gptsmith.save(GPT(config), None, tmp_path / "model")
    code = (
        "import sys; from gptsmith.cli.main import main; from gptsmith.machine import environment\n"
        "import gptsmith.cli.quantize, gptsmith.evaluation.quantization, torch\n"
        "before = environment.peak_memory(); status = main(sys.argv[1:])\n"
        "print(environment.peak_memory() - before); sys.exit(status)"
    )
    words = ["quantize", str(tmp_path / "model"), str(tmp_path / "q"), "--bits", "4"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--tokens", "64"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert int(done.stdout.split()[-1]) < weight_bytes(config) + 60e6


# -- where a dtype is named


@pytest.mark.slow
def test_a_quantized_folder_is_its_own_precision_or_unpacked(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(model, 8)
    (model.parent / "text.txt").write_text(TEXT)

    def loss(name: Path, *words: str) -> float:
        data = str(model.parent / "text.txt")
        assert main(["evaluate", str(name), "--data", data, "--json", *words]) == 0
        return float(json.loads(capsys.readouterr().out)["loss"])

    own = loss(folder)
    assert loss(folder, "--dtype", "int8") == own
    assert loss(folder, "--dtype", "auto") == own
    assert loss(folder, "--dtype", "float32") == pytest.approx(own, abs=0.01)  # maybe from bf16
    assert loss(model, "--dtype", "int8") == own
    assert loss(model) != pytest.approx(own, abs=1e-7)
    assert loss(model, "--dtype", "int4") != pytest.approx(own, abs=1e-5)
    assert refused(capsys, "sample", folder, "--dtype", "int4") == (
        "the model is already quantized to 8 bits: for 4 bits, use the original model"
    )


@pytest.mark.slow
def test_training_takes_no_packed_weights_but_starts_from_them_unpacked(
    model: Path, quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, run = model.parent / "text.txt", model.parent / "run"
    text.write_text(TEXT * 5)
    said = refused(capsys, "train", text, "--dtype", "int8", "--out", run)
    assert said.startswith("--dtype is 'int8': one of auto, float32, bf16, fp16, fp8 is needed")
    assert not run.exists()
    said = refused(capsys, "bench", "train", "gpt2", "--dtype", "int4")
    assert said.startswith("dtype is int4, which is for inference: ")
    words = ["--steps", "1", "--batch-tokens", "38", "--learning-rate", "0", "--compile", "no"]
    words += ["--dtype", "float32", "--out", str(run)]
    assert main(["train", str(text), "--from", str(quantized), *words]) == 0
    assert f"note: {quantized} is quantized to 4 bits: unpacked" in capsys.readouterr().err
    trained, _ = gptsmith.load(run)
    unpacked, _ = gptsmith.load(quantized, unpacked=True)
    assert torch.equal(trained.lm_head.weight, unpacked.lm_head.weight)


def test_export_writes_the_unpacked_model_and_import_refuses(
    quantized: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = quantized.parent / "plain"
    assert main(["export", str(quantized), str(out), "--to", "huggingface"]) == 0
    assert f"note: {quantized} is quantized to 4 bits: written unpacked" in capsys.readouterr().err
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    capsys.readouterr()  # its progress bar
    ours, _ = gptsmith.load(quantized)
    with torch.no_grad():
        one, other = theirs(tokens_of()).logits, ours(tokens_of()).logits
    assert torch.allclose(one, other, atol=1e-4)
    said = refused(capsys, "import", quantized, quantized.parent / "again")
    assert said.startswith(f"{quantized} is gptsmith's own quantized folder, which needs no import")


@pytest.mark.slow
def test_bench_decodes_packed_weights(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt-tokens", "3", "--max-tokens", "4", "--json"]
    for name, dtype, said in ((model, "int8", "int8"), (written(model, 4), None, "int4")):
        more = [] if dtype is None else ["--dtype", dtype]
        assert main(["bench", "generate", str(name), *words, *more]) == 0
        assert json.loads(capsys.readouterr().out)["dtype"] == said


# -- auto


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[int | None, float]:
    """Tokens per second that models of so many bits are found to have, in bf16 12."""
    known: dict[int | None, float] = {4: 40.0, 8: 20.0, None: 10.0}

    def speed(model: GPT) -> float:
        return (
            12.0
            if model.dtype == torch.bfloat16 and packed_bits(model) is None
            else known[packed_bits(model)]
        )

    monkeypatch.setattr(precision, "decode_speed", speed)
    return known


@pytest.mark.slow
def test_auto_takes_the_fastest_that_keeps_the_loss(
    model: Path, speeds: dict[int | None, float]
) -> None:
    candidates = precision.candidates_on_cpu(model, torch.device("cpu"))
    assert candidates[:2] == ["int4", "int8"]
    chosen = precision.measured(model, candidates)
    assert chosen.dtype == "int8"  # scrambled weights are too large for 4 bits
    assert chosen.times_as_fast == 2.0
    assert 0 < chosen.mean_kl < precision.KEEPS_LOSS
    speeds[8] = 9.0  # as where the weights are few
    assert precision.measured(model, ["int4", "int8"]) == ("float32", 0.0, 1.0)


@pytest.mark.slow
def test_auto_remembers_its_choice(
    model: Path,
    speeds: dict[int | None, float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cpu, measured = torch.device("cpu"), list[int | None]()
    monkeypatch.setattr(precision, "candidates_on_cpu", lambda *_: ["int4", "int8"])
    original = precision.compare_with

    def counted(*given: Any) -> Any:
        measured.append(packed_bits(given[1]))
        return original(*given)

    monkeypatch.setattr(precision, "compare_with", counted)
    choice = precision.fastest(model, cpu)
    assert choice.dtype == "int8"
    assert measured == [4, 8]
    assert precision.fastest(model, cpu) == choice
    assert measured == [4, 8]

    words = ["sample", str(model), "--dtype", "auto", "--max-tokens", "2", "--seed", "1"]
    assert main(words) == 0
    said = capsys.readouterr().err
    kl = f"{choice.mean_kl:.2g} nats from float32 on average, below 0.001"
    assert said == f"dtype int8: {kl}, and 2.0 times as fast\n"
    assert measured == [4, 8]

    for path in (model.parent / "cache" / "gptsmith" / "speed").iterdir():
        path.write_text("{")  # damaged: measured again
    assert precision.fastest(model, cpu) == choice
    assert measured == [4, 8] * 2
    (model.parent / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(model.parent / "file"))
    with pytest.warns(UserWarning, match="choice of int8 could not be cached: .*Not a directory"):
        assert precision.fastest(model, cpu) == choice


def test_auto_measures_again_where_the_weights_are_others(model: Path) -> None:
    cpu = torch.device("cpu")
    first = precision.key(model, ["int8"])
    assert precision.key(model, ["int8"]) == first
    assert precision.key(model, ["int4"]) != first
    shutil.copytree(model, model.parent / "copy")
    assert precision.key(model.parent / "copy", ["int8"]) == first  # by its sums
    (model.parent / "copy" / "manifest.json").unlink()
    known = precision.key(model.parent / "copy", ["int8"])
    time.sleep(0.01)
    os.utime(model.parent / "copy" / "model.safetensors")
    assert precision.key(model.parent / "copy", ["int8"]) != known
    gptsmith.save(scrambled(GPTConfig(**SIZES), seed=5), None, model.parent / "other")
    assert precision.key(model.parent / "other", ["int8"]) != first
    assert precision.fastest(written(model, 4), cpu) == ("int4", 0.0, 1.0)


@pytest.mark.slow
def test_auto_keeps_float32_where_nothing_else_keeps_the_loss(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "KEEPS_LOSS", 1e-12)
    assert main(["sample", str(model), "--dtype", "auto", "--max-tokens", "1", "--seed", "1"]) == 0
    said = capsys.readouterr().err
    assert said == "dtype float32: no faster one stays within 1e-12 nats of it on average\n"


def test_auto_leaves_out_what_the_sizes_do_not_allow(tmp_path: Path) -> None:
    gptsmith.save(GPT(GPTConfig(**SIZES | {"n_embd": 36})), None, tmp_path / "odd")
    candidates = precision.candidates_on_cpu(tmp_path / "odd", torch.device("cpu"))
    assert not {"int4", "int8"} & set(candidates)
    assert MachineSettings().dtype == "auto"
