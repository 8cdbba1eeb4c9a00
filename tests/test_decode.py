"""The compiled step says what the model says, and is compiled once."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptsmith
from gptsmith import GPT, GPTConfig, SamplingSettings, cli, decode
from gptsmith.cache import KVCache
from gptsmith.config import MODERN
from gptsmith.decode import Decoder, open_decoder
from gptsmith.drafts import FromText
from gptsmith.generate import generate
from gptsmith.settings import GREEDY
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled

SIZES = TINY | {"context_length": 40, "n_embd": 24}
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "nanogpt": {"bias": False, "activation": "gelu_erf"},
    "odd": {"qkv_bias": False, "tie_weights": False, "n_inner": 50, "norm_eps": 1e-3},
}
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
# In nats; measured: 3e-7, and 9e-6 for the plain forward in bf16, which rounds activations too.
MOST_KL = 1e-5


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, so that each step is compiled once."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(autouse=True)
def own_cache(compiled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_folder))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def opened(form: str, dtype: torch.dtype = torch.float32) -> tuple[GPT, Decoder]:
    model = scrambled(GPTConfig(**(SIZES | FORMS[form]))).to(dtype)
    decoder = open_decoder(model, compile=True)
    assert decoder is not None
    return model, decoder


def step_logits(model: GPT, step: Any, dtype: torch.dtype) -> Tensor:
    """The logits of each place of a long text, read a token at a time after the first two."""
    text = torch.randint(37, (1, 40), generator=torch.Generator().manual_seed(2))
    cache = KVCache(model.config, 1, dtype=dtype)
    with torch.inference_mode():
        model.features(text[:, :2], cache)
        return torch.cat([step(text[:, place], cache).float() for place in range(2, 40)])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_step_is_the_models(form: str) -> None:
    model, decoder = opened(form)
    assert decoder.model is model

    def plain(token: Tensor, cache: KVCache) -> Tensor:
        return model.lm_head(model.features(token.unsqueeze(0), cache)[:, -1])

    expected = step_logits(model, plain, torch.float32)
    found = step_logits(model, decoder.next_logits, torch.float32)
    assert (found - expected).abs().max() < 1e-4
    for count in (1, 20, 60):  # the last beyond the context
        for sampling in (GREEDY, SamplingSettings(temperature=0.9, top_k=20)):
            options: dict[str, Any] = {"sampling": sampling, "seed": 5}
            wanted = [int(t) for t in generate(model, PROMPT, count, **options)]
            for more in ({"decoder": decoder}, {"decoder": decoder, "draft": FromText()}):
                tokens = [int(t) for t in generate(model, PROMPT, count, **options, **more)]
                assert tokens == wanted


@pytest.mark.slow
def test_in_bf16_it_stays_near_the_float32_forward() -> None:
    model, decoder = opened("gpt2", torch.bfloat16)
    exact = scrambled(GPTConfig(**SIZES))
    exact.load_state_dict({n: t.float() for n, t in model.state_dict().items()})

    def plain(token: Tensor, cache: KVCache) -> Tensor:
        return exact.lm_head(exact.features(token.unsqueeze(0), cache)[:, -1])

    p = step_logits(exact, plain, torch.float32).log_softmax(-1)
    q = step_logits(model, decoder.next_logits, torch.bfloat16).log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)  # (38,)
    assert 0 <= float(kl.max()) < MOST_KL


@pytest.mark.slow
def test_it_is_compiled_once_and_used_for_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, decoder = opened("gpt2")

    def never(*_: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(decode, "compile_ahead", never)
    deeper = scrambled(GPTConfig(**(SIZES | {"n_layer": 3})))  # the same block, once more
    assert open_decoder(deeper, compile=False) is not None
    assert open_decoder(scrambled(GPTConfig(**(SIZES | {"n_inner": 7}))), compile=False) is None
    assert open_decoder(model.bfloat16(), compile=True) is not None  # of the test above
    rows = PROMPT.expand(2, -1)
    cache = KVCache(model.config, 2)
    cache.advance(4)
    assert not decoder.takes(rows, cache)


@pytest.mark.slow
def test_a_damaged_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = opened("gpt2")
    folder = gptsmith.runtime.cache_folder() / "decode"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shutil.copytree(folder, tmp_path / "gptsmith" / "decode")
    (head,) = (path for path in cache_files() if path.stem == f"head-{decode.key(model, 'head')}")
    head.write_bytes(head.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="holds a damaged file"):
        assert open_decoder(model, compile=False) is None
    assert open_decoder(model, compile=True) is not None
    assert open_decoder(model, compile=False) is not None
    assert not [path for path in cache_files() if path.name.startswith(".")]


def cache_files() -> list[Path]:
    return list((gptsmith.runtime.cache_folder() / "decode").iterdir())


def test_what_has_no_compiled_step() -> None:
    modern = GPT(GPTConfig(**(SIZES | MODERN | {"n_head": 2})))
    short = GPT(GPTConfig(**(SIZES | {"context_length": 2})))
    for model in (modern, short):
        assert open_decoder(model, compile=False) is None
        with pytest.raises(ValueError, match="is for GPT-2's block on a CPU: leave it out"):
            open_decoder(model, compile=True)


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(torch.export, "export", fail)
    model = scrambled(GPTConfig(**(SIZES | {"n_inner": 9})))
    with pytest.raises(ValueError, match=r"compiled: No working C\+\+ compiler found; leave"):
        open_decoder(model, compile=True)


@pytest.mark.slow
def test_sample_compiles_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = GPTConfig(**(SIZES | {"vocab_size": 257}))
    gptsmith.save(scrambled(config), byte_tokenizer(), tmp_path / "model")
    words = ["sample", str(tmp_path / "model"), "--prompt", "To be", "--seed", "3"]
    words += ["--max-tokens", "30", "--threads", "1", "--compile"]
    said = {}
    for choice in ("no", "yes", "auto"):
        assert cli.main([*words, choice]) == 0
        said[choice] = capsys.readouterr().out
    assert said["no"] == said["yes"] == said["auto"]
    assert cli.main([*words, "maybe"]) == 2
    assert "compile is 'maybe': one of auto, yes, no" in capsys.readouterr().err
