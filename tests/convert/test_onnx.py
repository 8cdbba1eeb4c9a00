"""ONNX: onnxruntime, and ONNX's own evaluator, compute what the model does."""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from gptsmith import GPT, PRESETS, GPTConfig, generate_greedy
from gptsmith.checkpoint.saving import write as write_checkpoint
from gptsmith.checkpoint.tensors import Stored
from gptsmith.config.cost import weight_bytes
from gptsmith.config.model import MODERN
from gptsmith.convert import export_model
from gptsmith.convert.onnx import ELEMENTS, FORMAT, INT64, OPERATORS, PAGE, nearest, run, write
from gptsmith.tokenizers import byte_tokenizer, char_tokenizer, load_tokenizer
from tests.conftest import TINY, scrambled

NEW: dict[str, Any] = {**TINY, **MODERN, "n_embd": 24, "n_head": 6, "n_inner": 31, "norm_eps": 1e-3}
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": TINY,
    "nanogpt": TINY | {"bias": False, "activation": "gelu_erf"},
    "book": TINY | {"qkv_bias": False, "tie_weights": False},
    "odd": TINY | {"bias": False, "qkv_bias": True, "n_inner": 20, "norm_eps": 1},
    "modern": NEW,
    "grouped": NEW | {"n_kv_head": 2, "tie_weights": False},
    "one key": NEW | {"n_kv_head": 1, "n_inner": None},
}
LEVELS = onnxruntime.GraphOptimizationLevel


def model_of(form: str) -> GPT:
    return scrambled(GPTConfig(**FORMS[form]))


def exported(model: GPT, folder: Path, dtype: str = "float32", **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    fetch = model.state_dict().__getitem__
    choices = {"config": model.config, "fetch": fetch, "tokenizer": None, **more}
    write(Stored(**choices), folder, dtype)
    return folder


def some_tokens(model: GPT, batch: int, length: int, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator)


def difference(one: Tensor | np.ndarray, other: Tensor) -> float:
    return float((torch.as_tensor(one) - other).detach().abs().max())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a form in a number format, written once for all tests that only read it."""

    @cache
    def folder_of(form: str, dtype: str = "float32") -> Path:
        return exported(model_of(form), tmp_path_factory.mktemp("onnx"), dtype)

    return folder_of


def inputs(config: GPTConfig, tokens: Tensor) -> dict[str, np.ndarray]:
    """What the graph asks for beside tokens without padding or a past."""
    B, T = tokens.shape
    empty = np.zeros((B, config.kv_heads, 0, config.head_size), np.float32)
    return {
        "input_ids": tokens.numpy(),
        "attention_mask": np.ones((B, T), np.int64),
        "position_ids": np.tile(np.arange(T), (B, 1)),
        **{
            f"past_key_values.{layer}.{part}": empty
            for layer in range(config.n_layer)
            for part in ("key", "value")
        },
    }


class Cached:
    """A user who gives only the tokens that the graph has not seen."""

    def __init__(self, folder: Path, config: GPTConfig, batch: int) -> None:
        path = folder / "model.onnx"
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.start = inputs(config, torch.zeros(batch, 0, dtype=torch.long))
        assert [given.name for given in self.session.get_inputs()] == list(self.start)
        self.names = list(self.start)[3:]
        self.forget()

    def forget(self) -> None:
        self.past = {name: self.start[name] for name in self.names}
        self.mask = self.start["attention_mask"]

    def read(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` (B, T) is 0 for padding, which gets a position of no meaning."""
        mask = torch.ones_like(tokens) if mask is None else mask
        self.mask = np.concatenate([self.mask, mask.numpy()], axis=1)
        positions = (self.mask.cumsum(1) - 1).clip(0)[:, -tokens.shape[1] :]
        named = {"input_ids": tokens.numpy(), "attention_mask": self.mask}
        logits, *present = self.session.run(None, {**named, "position_ids": positions, **self.past})
        self.past = dict(zip(self.past, present, strict=True))
        return torch.from_numpy(logits)


# -- the same mathematics


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_onnxruntime_computes_the_models_logits(form: str, folders: Callable[..., Path]) -> None:
    model = model_of(form)
    folder = folders(form)
    for shape in ((1, 1), (2, 5), (3, 1), (1, 10), (3, 11)):
        tokens = some_tokens(model, *shape)
        assert difference(run(folder, tokens), model(tokens).logits) < 1e-4, shape


@pytest.mark.parametrize("form", FORMS)
def test_onnx_itself_computes_the_same(form: str, folders: Callable[..., Path]) -> None:
    """The specification's evaluator in NumPy: no operator means something else to onnxruntime."""
    model = model_of(form)
    folder, tokens = folders(form), some_tokens(model, 2, 7)
    evaluator = ReferenceEvaluator(str(folder / "model.onnx"))
    (logits,) = evaluator.run(["logits"], inputs(model.config, tokens))
    assert difference(logits, model(tokens).logits) < 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("level", [LEVELS.ORT_DISABLE_ALL, LEVELS.ORT_ENABLE_ALL])
def test_no_optimization_changes_it(form: str, level: Any, folders: Callable[..., Path]) -> None:
    model = model_of(form)
    folder, tokens = folders(form, "fp16"), some_tokens(model, 2, 6)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(folder / "model.onnx", options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    logits = session.run(None, inputs(model.config, tokens))[0]
    assert difference(logits, model(tokens).logits) < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_a_cached_greedy_decode_is_ours(form: str, folders: Callable[..., Path]) -> None:
    model = model_of(form)
    folder, prompt = folders(form), some_tokens(model, 2, 3)
    wanted = generate_greedy(model, prompt, 8)  # up to the context limit
    user, tokens, unread = Cached(folder, model.config, 2), prompt, prompt
    for _ in range(8):
        unread = user.read(unread)[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, unread], dim=1)
    assert tokens.tolist() == wanted.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_chunks_give_what_the_whole_gives(form: str, folders: Callable[..., Path]) -> None:
    """The causal triangle hangs from the lower right, and positions follow the past."""
    model = model_of(form)
    tokens, config = some_tokens(model, 3, 11), model.config
    user, whole = Cached(folders(form), config, 3), model(tokens).logits
    for chunks in ((11,), (1,) * 11, (4, 3, 1, 3), (1, 10), (10, 1)):
        user.forget()
        logits = torch.cat([user.read(part) for part in tokens.split(chunks, dim=1)], dim=1)
        assert difference(logits, whole) < 1e-4, chunks
        shape = (3, config.kv_heads, 11, config.head_size)
        assert {past.shape for past in user.past.values()} == {shape}


@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form: str, folders: Callable[..., Path]) -> None:
    """On the left, where it sees nothing at all, and then with a cache; and on the right."""
    model = model_of(form)
    tokens, lengths = some_tokens(model, 3, 6), (6, 2, 1)
    user = Cached(folders(form), model.config, 3)
    left = torch.stack([(torch.arange(6) >= 6 - n).long() for n in lengths])
    logits = torch.cat([user.read(tokens, left), user.read(tokens[:, :2])], dim=1)
    assert torch.isfinite(logits).all()
    for row, length in enumerate(lengths):
        alone = torch.cat([tokens[row, 6 - length :], tokens[row, :2]])[None]
        assert difference(logits[row, 6 - length :], model(alone).logits[0]) < 1e-4
    user.forget()
    logits = user.read(tokens, left.flip(1))
    for row, length in enumerate(lengths):
        alone = tokens[row : row + 1, :length]
        assert difference(logits[row, :length], model(alone).logits[0]) < 1e-4


@pytest.mark.slow
def test_models_of_any_shape(tmp_path: Path) -> None:
    draw = random.Random(5)
    for number in range(12):
        heads, size = draw.choice([1, 2, 5]), draw.choice([2, 4, 6])
        choices: dict[str, Any] = {
            "vocab_size": draw.choice([2, 19, 50]),
            "context_length": draw.choice([2, 8, 33]),
            "n_layer": draw.choice([1, 3]),
            "n_head": heads,
            "n_embd": heads * size,
            "n_inner": draw.choice([None, 1, 9]),
            "tie_weights": draw.random() < 0.5,
        }
        if number % 2:
            choices |= {**MODERN, "n_kv_head": draw.choice([None, 1])}
        else:
            choices |= {"bias": draw.random() < 0.5, "qkv_bias": draw.choice([None, True, False])}
        model = scrambled(GPTConfig(**choices), seed=number)
        folder = exported(model, tmp_path / str(number))
        tokens = some_tokens(model, 2, model.config.context_length)
        whole = model(tokens).logits
        assert difference(run(folder, tokens), whole) < 1e-4, choices
        user = Cached(folder, model.config, 2)
        user.read(tokens[:, :1])
        assert difference(user.read(tokens[:, 1:]), whole[:, 1:]) < 1e-4, choices


def test_halved_weights_are_the_models_rounded(folders: Callable[..., Path]) -> None:
    model = model_of("gpt2")
    folder, tokens = folders("gpt2", "fp16"), some_tokens(model, 2, 9)
    logits, before = run(folder, tokens), model(tokens).logits
    assert 1e-6 < difference(logits, before) < 0.05
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    assert difference(logits, model(tokens).logits) < 1e-4


# -- the files


@pytest.mark.parametrize("dtype", ["float32", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_the_graph_is_sound_and_holds_no_weights(
    form: str, dtype: str, folders: Callable[..., Path]
) -> None:
    folder = folders(form, dtype)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    assert all(node.name for node in graph.node)
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    held = [t for t in graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert max(prod(tensor.dims) for tensor in held) <= 5
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


def test_a_graph_grows_with_its_layers_alone(tmp_path: Path) -> None:
    """Protobuf ends at 2 GB: gpt2-xl's graph needs 0.2 MB, whatever the size of its tensors."""
    small = GPTConfig(**TINY | {"n_layer": 48})
    one = exported(scrambled(small), tmp_path / "one")
    wide = replace(small, n_embd=48, vocab_size=3000)
    other = exported(scrambled(wide), tmp_path / "other")
    sizes = [(folder / "model.onnx").stat().st_size for folder in (one, other)]
    assert max(sizes) < 250_000
    assert abs(sizes[0] - sizes[1]) < 2000


@pytest.mark.parametrize("dtype", ["float32", "fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_the_weights_file_is_the_models_tensors(
    form: str, dtype: str, folders: Callable[..., Path]
) -> None:
    model = model_of(form)
    folder = folders(form, dtype)
    numbers, ours, table = (folder / "weights.bin").read_bytes(), model.state_dict(), {}
    for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            told = {entry.key: entry.value for entry in tensor.external_data}
            assert told.pop("location") == "weights.bin"
            table[tensor.name] = (int(told["offset"]), int(told["length"]))
    assert all(offset % PAGE == 0 for offset, _ in table.values())
    end = max(offset + length for offset, length in table.values())
    assert end == len(numbers) <= weight_bytes(model.config) + PAGE * len(table)
    if model.config.tie_weights:
        ours.pop("lm_head.weight")
    assert set(table) - {"rotation"} == set(ours)
    for name, tensor in ours.items():
        offset, length = table[name]
        stored = tensor.half() if dtype == "fp16" else tensor
        assert numbers[offset : offset + length] == stored.numpy().tobytes(), name


def test_tensors_are_asked_for_once_and_one_at_a_time(tmp_path: Path) -> None:
    model, asked = model_of("nanogpt"), []

    def fetch(name: str) -> Tensor:
        asked.append(name)
        return model.state_dict()[name].clone()

    exported(model, tmp_path / "onnx", fetch=fetch)
    tied = {"lm_head.weight"}
    assert len(asked) == len(set(asked))
    assert set(asked) == set(model.state_dict()) - tied


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (exported(model_of("grouped"), tmp_path / name) for name in "ab")
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def test_configuration_and_tokenizer_lie_beside(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = scrambled(GPTConfig(**TINY | {"vocab_size": tokenizer.vocab_size}))
    folder = exported(model, tmp_path / "onnx", tokenizer=tokenizer)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.json", "generation_config.json", "model.onnx"),
        *("tokenizer.json", "tokenizer_config.json", "weights.bin"),
    ]
    said = json.loads((folder / "config.json").read_text())
    (tmp_path / "ours").mkdir()
    fetch = model.state_dict().__getitem__
    stored = Stored(config=model.config, fetch=fetch, tokenizer=tokenizer)
    write_checkpoint(stored, tmp_path / "ours")
    wanted = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert wanted.pop("dtype") == "float32"
    assert said == wanted
    assert load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    told = json.loads((folder / "tokenizer_config.json").read_text())
    assert told["model_max_length"] == model.config.context_length


def test_a_model_is_exported_whole_and_compared(tmp_path: Path) -> None:
    import gptsmith

    tokenizer = char_tokenizer("to be or not to be")
    for form in ("odd", "one key"):
        config = replace(GPTConfig(**FORMS[form]), vocab_size=tokenizer.vocab_size)
        gptsmith.save(scrambled(config), tokenizer, tmp_path / form)
        report = export_model(tmp_path / form, tmp_path / f"{form} onnx", to="onnx")
        assert report.difference < 1e-4
        assert report.lost == ()
        assert (tmp_path / f"{form} onnx" / "model.onnx").is_file()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_said(name: str) -> None:
    assert nearest(PRESETS[name]) == PRESETS[name]


# -- mistakes


def refused(folder: Path, tokens: Tensor) -> str:
    with pytest.raises(ValueError, match="onnxruntime refuses") as caught:
        run(folder, tokens)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("form", ["gpt2", "modern"])
def test_beyond_the_context_limit_is_an_error(
    form: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    model = model_of(form)
    folder = exported(model, tmp_path / "onnx")
    said = refused(folder, some_tokens(model, 1, 12))
    assert "idx=11 must be within the inclusive range [-11,10]" in said
    assert capfd.readouterr().err == ""
    user = Cached(folder, model.config, 1)
    user.read(some_tokens(model, 1, 10))
    with pytest.raises(Exception, match="idx=11 must be within"):
        user.read(some_tokens(model, 1, 2))
    assert "idx=37 must be within" in refused(folder, torch.tensor([[37]]))


def test_other_number_formats_are_refused(tmp_path: Path) -> None:
    for dtype in ("bf16", "int8"):
        with pytest.raises(ValueError, match=dtype) as caught:
            exported(model_of("gpt2"), tmp_path / "onnx", dtype)
        said = f"ONNX weights cannot be written in {dtype}: choose float32 or fp16"
        assert str(caught.value) == said
    assert not any((tmp_path / "onnx").iterdir())


def test_a_misshapen_tensor_is_refused(tmp_path: Path) -> None:
    model = model_of("gpt2")

    def fetch(name: str) -> Tensor:
        tensor = model.state_dict()[name]
        return tensor.t() if name == "h.1.mlp.c_fc.weight" else tensor

    with pytest.raises(ValueError, match="should be") as caught:
        exported(model, tmp_path / "onnx", fetch=fetch)
    assert str(caught.value) == "h.1.mlp.c_fc.weight is (12, 48), but should be (48, 12)"


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = model_of("gpt2")
    folder, tokens = exported(model, tmp_path / "onnx"), some_tokens(model, 1, 2)
    graph, numbers = (folder / "model.onnx").read_bytes(), (folder / "weights.bin").read_bytes()
    draw = random.Random(1)
    for end in sorted(draw.sample(range(len(graph)), 40)):
        (folder / "model.onnx").write_bytes(graph[:end])
        refused(folder, tokens)
    (folder / "model.onnx").write_bytes(graph)
    for end in (0, 1, 5000, len(numbers) - 1):
        (folder / "weights.bin").write_bytes(numbers[:end])
        refused(folder, tokens)
    (folder / "weights.bin").unlink()
    refused(folder, tokens)
    (folder / "model.onnx").write_bytes(b"no graph at all")
    refused(folder, tokens)
    (folder / "model.onnx").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        run(folder, tokens)
    assert str(caught.value) == f"{folder} has no model.onnx"


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2")
    folder = exported(model, tmp_path / "onnx")
    for name in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError) as caught:
        exported(model, tmp_path / "other")
    assert str(caught.value) == "ONNX needs an extra: pip install 'gptsmith[onnx]'"
    with pytest.raises(ImportError) as caught:
        run(folder, some_tokens(model, 1, 2))
    assert str(caught.value) == "onnxruntime is an extra: pip install 'gptsmith[onnx]'"


def test_the_numbers_are_onnxs_own() -> None:
    kinds = onnx.TensorProto
    assert {"float32": kinds.FLOAT, "fp16": kinds.FLOAT16} == ELEMENTS
    assert kinds.INT64 == INT64
    assert ("1.15.0", FORMAT, OPERATORS) in {row[:3] for row in onnx.helper.VERSION_TABLE}
    assert onnx.defs.get_schema("Gelu").since_version == OPERATORS
