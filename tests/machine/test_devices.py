"""What computes: what is chosen, what is refused, and 8-bit floats."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from gptsmith import GPT, GPTConfig
from gptsmith.cli.main import main
from gptsmith.config.settings import MachineSettings
from gptsmith.machine import devices
from gptsmith.training.trainer import multiply_in_float8
from tests.advice import cured, refusal
from tests.conftest import TINY, TOY

TORCHAO = Path(sys.prefix) / "torchao"  # apart: transformers imports it where it is found


@pytest.mark.parametrize(("dtype", "attention"), [("bf16", "blocks"), ("float32", "kernel")])
def test_attention_in_blocks_is_for_bf16_on_a_cpu(dtype: str, attention: str) -> None:
    machine = MachineSettings(device="cpu", dtype=dtype)  # type: ignore[arg-type]
    assert devices.choose(machine).attention == attention
    asked = MachineSettings(device="cpu", dtype="bf16", attention="kernel")
    assert devices.choose(asked).attention == "kernel"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train nowhere.txt --optimizer muon", "no recipe, file or folder"),
        ("train shakespeare --optimizer muom", "one of adamw, muon is needed, did you mean 'muon'"),
        ("bench train gpt2 --dtype fp8 --device cpu", "needs a Hopper GPU or newer: take bf16"),
        ("bench generate gpt2 --dtype fp8 --device cpu", "needs a Hopper GPU or newer: take bf16"),
        ("bench train gpt2 --compile max-autotune --device cpu", "which is for CUDA: on cpu take"),
        (
            "train shakespeare --muon-momentum 1",
            "--muon-momentum is 1.0: at least 0 and below 1 is needed",
        ),
        ("train shakespeare --optimizer muon --learning-rate 0", "with Muon, above 0 is needed"),
        ("bench train gpt2 --attention block", "did you mean 'blocks'"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1


def test_fp8_is_for_hopper_and_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    for capability, allowed in (((8, 0), False), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        if allowed:
            assert devices.find_dtype("fp8", device) == "fp8"
        else:
            with pytest.raises(ValueError, match="needs a Hopper GPU"):
                devices.find_dtype("fp8", device)
    with pytest.raises(ValueError, match="only for training: take bf16"):
        devices.weight_dtype("fp8", device)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of torchao, when it is first compiled
@pytest.mark.slow
def test_float8_products_are_near_and_the_weights_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Emulated, which rounds as the GPU would."""
    assert TORCHAO.is_dir(), "torchao is missing: `make test` installs it"
    monkeypatch.syspath_prepend(TORCHAO)
    logging.getLogger("torchao").setLevel(logging.CRITICAL)  # its CUDA libraries do not load here
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY | {"n_head": 2, "n_embd": 64, "vocab_size": 65}))
    tokens = torch.randint(65, (4, 11))

    def gradient() -> tuple[float, torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.loss(tokens, tokens)
        loss.backward()
        grad = model.get_parameter("h.0.mlp.c_fc.weight").grad
        assert grad is not None
        return loss.item(), grad

    before, names = [id(parameter) for parameter in model.parameters()], list(model.state_dict())
    loss, exact = gradient()
    multiply_in_float8(model, emulate=True)
    rounded_loss, rounded = gradient()
    assert [id(parameter) for parameter in model.parameters()] == before
    assert list(model.state_dict()) == names
    assert rounded_loss == pytest.approx(loss, rel=2e-3)
    # Four significant bits: some percent, and not nothing.
    assert 0.005 < (rounded - exact).norm() / exact.norm() < 0.15


def test_packed_weights_take_the_activations_that_are_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    cpu = torch.device("cpu")
    assert devices.weight_dtype("int4", cpu) == devices.torch_dtype(devices.find_dtype("auto", cpu))
    assert devices.weight_dtype("int8", torch.device("cuda")) == torch.bfloat16


# -- what is advised


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train text.txt TOY --device cuda --out OUT", "try cpu"),
        ("train text.txt TOY --device mps --out OUT", "try cpu"),
        ("train text.txt TOY --dtype fp16 --out OUT", "take bf16 or float32"),
        ("train text.txt TOY --dtype fp8 --out OUT", "take bf16"),
        ("sample run --dtype fp16 --seed 1 --max-tokens 2", "take bf16 or float32"),
        ("bench generate run --dtype fp8 --rows 1 --rounds 1 --max-tokens 2", "take bf16"),
        ("train text.txt TOY --threads 100000 --out OUT", "leave it out"),
        ("train text.txt TOY --compile max-autotune --out OUT", "take yes"),
    ],
)
@pytest.mark.slow
def test_what_is_advised_about_the_machine_works(
    words: str,
    message: str,
    toys: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cured(words.replace("TOY", TOY).split(), message, capsys)


def test_packed_weights_are_for_later(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(["bench", "train", "run", "--dtype", "int8"], capsys)
    assert said.endswith("train in another precision, then `gptsmith quantize` the result")
    assert main(["quantize", "run", "small", "--bits", "8", "--tokens", "8"]) == 0


@pytest.mark.parametrize(
    "words", ["quantize run OUT --bits 8 --tokens 8", "export run OUT --to onnx"]
)
def test_a_place_that_is_taken(words: str, toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = Path("taken")
    taken.mkdir()
    (taken / "notes.txt").touch()
    said = refusal(words.replace("OUT", "taken").split(), capsys)
    assert "choose another name, or remove it first" in said
    assert main(words.replace("OUT", "other").split()) == 0
    (taken / "notes.txt").unlink()
    taken.rmdir()
    assert main(words.replace("OUT", "taken").split()) == 0
