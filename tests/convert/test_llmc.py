"""llm.c's model files, re-read byte by byte from their published layout."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gptsmith
from gptsmith import GPT, GPTConfig
from gptsmith.cli.main import main
from gptsmith.convert import export_model, import_model
from tests.conftest import TINY, scrambled, some_tokens

L, C, V, T, PADDED = 2, 12, 37, 11, 128
# Every array in the order of the file, all layers of a kind together.
LAYOUT: dict[str, tuple[int, ...]] = {
    "wte": (PADDED, C),
    "wpe": (T, C),
    "ln1w": (L, C),
    "ln1b": (L, C),
    "qkvw": (L, 3 * C, C),
    "qkvb": (L, 3 * C),
    "attprojw": (L, C, C),
    "attprojb": (L, C),
    "ln2w": (L, C),
    "ln2b": (L, C),
    "fcw": (L, 4 * C, C),
    "fcb": (L, 4 * C),
    "fcprojw": (L, C, 4 * C),
    "fcprojb": (L, C),
    "lnfw": (C,),
    "lnfb": (C,),
}
OURS = {
    "ln1w": "ln_1.weight",
    "ln1b": "ln_1.bias",
    "qkvw": "attn.c_attn.weight",
    "qkvb": "attn.c_attn.bias",
    "attprojw": "attn.c_proj.weight",
    "attprojb": "attn.c_proj.bias",
    "ln2w": "ln_2.weight",
    "ln2b": "ln_2.bias",
    "fcw": "mlp.c_fc.weight",
    "fcb": "mlp.c_fc.bias",
    "fcprojw": "mlp.c_proj.weight",
    "fcprojb": "mlp.c_proj.bias",
}


def arrays_of(model: GPT) -> dict[str, np.ndarray]:
    """A model's weights as llm.c arranges them."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    padded = np.zeros((PADDED, C), np.float32)
    padded[:V] = state["wte.weight"]
    arrays = {"wte": padded, "wpe": state["wpe.weight"]}
    for theirs, ours in OURS.items():
        arrays[theirs] = np.stack([state[f"h.{layer}.{ours}"] for layer in range(L)])
    return arrays | {"lnfw": state["ln_f.weight"], "lnfb": state["ln_f.bias"]}


def to_bf16(array: np.ndarray) -> np.ndarray:
    """Float32 to the upper half of its bits, rounded to nearest even."""
    bits = array.astype("<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_theirs(path: Path, model: GPT, version: int) -> None:
    """A file as llm.c's own script writes it."""
    header = [20240326, version, T, V, L, 3, C, PADDED]
    data = struct.pack("<256i", *header, *[0] * (256 - len(header)))
    for name, array in arrays_of(model).items():
        assert array.shape == LAYOUT[name]
        data += (array.astype("<f4") if version == 3 else to_bf16(array)).tobytes()
    path.write_bytes(data)


@pytest.fixture
def model() -> GPT:
    return scrambled(GPTConfig(**TINY))


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_their_file_becomes_the_same_model(
    version: int, dtype: torch.dtype, model: GPT, tmp_path: Path
) -> None:
    write_theirs(tmp_path / "any.name", model, version)
    report = import_model(tmp_path / "any.name", tmp_path / "out")
    assert report.source_format == "llm.c model"
    assert report.dtype == {3: "float32", 5: "bf16"}[version]
    assert report.difference == 0
    read, _ = gptsmith.load(tmp_path / "out")
    for (name, one), other in zip(model.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(one.to(dtype).float(), other), name


@pytest.mark.parametrize(("version", "dtype"), [(3, "float32"), (5, "bf16")])
@pytest.mark.parametrize("bias", [True, False])
def test_our_file_is_theirs_byte_for_byte(
    version: int, dtype: str, bias: bool, tmp_path: Path
) -> None:
    model = scrambled(GPTConfig(**TINY, bias=bias))
    gptsmith.save(model, None, tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "gpt2.bin", to="llmc", dtype=dtype)
    whole = GPT(GPTConfig(**TINY)).eval()
    for parameter in whole.parameters():
        torch.nn.init.zeros_(parameter)
    whole.load_state_dict(model.state_dict(), strict=False)
    write_theirs(tmp_path / "theirs.bin", whole, version)
    assert (tmp_path / "gpt2.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()


def test_there_and_back_is_the_same(model: GPT, tmp_path: Path) -> None:
    gptsmith.save(model, None, tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "gpt2.bin", to="llmc")
    import_model(tmp_path / "gpt2.bin", tmp_path / "back")
    back, _ = gptsmith.load(tmp_path / "back")
    assert replace(back.config, qkv_bias=None) == model.config
    assert torch.equal(back(some_tokens(length=7)).logits, model(some_tokens(length=7)).logits)


def test_what_llmc_cannot_say(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    forms: dict[str, dict[str, Any]] = {
        "activation gelu_erf (it has gelu_tanh)": {"activation": "gelu_erf"},
        "a head of its own (it has the embedding)": {"tie_weights": False},
    }
    for number, (words, form) in enumerate(forms.items()):
        folder, out = tmp_path / f"model-{number}", tmp_path / f"out-{number}"
        gptsmith.save(scrambled(GPTConfig(**TINY, **form)), None, folder)
        command = ["export", str(folder), str(out), "--to", "llmc"]
        assert main(command) == 2
        assert f"cannot express {words}" in capsys.readouterr().err
        assert not out.exists()
        assert main([*command, "--approximate"]) == 0
        assert words in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (1, 1, "is version 1 of llm.c's models: 3 .float32. or 5 .bfloat16. is needed"),
        (2, 12, "has .* bytes, but its header calls for"),
        (3, 200, "its header is invalid: 2 layers and 128 rows"),
        (4, 2**30, "its header is invalid: 1073741824 layers"),
        (4, -1, "its header is invalid: -1 layers"),
        (5, 5, "n_embd 12 is not a multiple of n_head 5"),
        (5, 0, "n_head is 0"),
        (6, 15, "bytes, but its header calls for"),
        (7, 64, "bytes, but its header calls for"),
    ],
)
def test_a_header_that_lies_is_refused(
    place: int, value: int, message: str, model: GPT, tmp_path: Path
) -> None:
    write_theirs(tmp_path / "a.bin", model, 3)
    data = bytearray((tmp_path / "a.bin").read_bytes())
    struct.pack_into("<i", data, 4 * place, value)
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "a.bin", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(end=st.integers(0, 30000), word=st.integers(1, 7), value=st.integers(-(2**31), 2**31 - 1))
@pytest.mark.slow
def test_cut_and_garbled_files_are_refused(
    end: int, word: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    write_theirs(base / "cut.bin", scrambled(GPTConfig(**TINY)), 3)
    data = bytearray((base / "cut.bin").read_bytes())
    end = min(end, len(data) - 1)
    struct.pack_into("<i", data, 4 * word, value)
    (base / "cut.bin").write_bytes(data[:end])
    with pytest.raises(ValueError, match=r"cut\.bin"):
        gptsmith.convert.read(base / "cut.bin")
