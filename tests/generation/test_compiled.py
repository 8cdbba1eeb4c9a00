"""The compiled step says what the model says, of any rows at once, and is compiled once."""

import ctypes
import gc
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptsmith
from gptsmith import GPT, GPTConfig, SamplingSettings
from gptsmith.cli.main import main
from gptsmith.config.model import MODERN
from gptsmith.config.settings import GREEDY
from gptsmith.generation import compiled
from gptsmith.generation.compiled import CompiledDecoder, open_decoder
from gptsmith.generation.drafts import FromText
from gptsmith.generation.writing import generate_tokens
from gptsmith.machine import chooser, environment, native
from gptsmith.model.cache import KVCache
from gptsmith.model.quantized import PackedEmbedding, PackedLinear, pack_model, unpack
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled

pytestmark = pytest.mark.usefixtures("own_cache")
SIZES = TINY | {"context_length": 40, "n_embd": 24}
# Lanes of 1, 17 and 136: fewer than a vector, and a rest after whole ones.
PACKABLE: dict[str, dict[str, Any]] = {
    "gpt2": {"n_inner": 40},
    "nanogpt": {"n_embd": 8, "n_head": 2, "bias": False, "activation": "gelu_erf"},
    "wide": {"n_embd": 136, "n_head": 2, "n_inner": 1088, "tie_weights": False},
}
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "nanogpt": {"bias": False, "activation": "gelu_erf"},
    "odd": {"qkv_bias": False, "tie_weights": False, "n_inner": 50, "norm_eps": 1e-3},
    "wide": {"n_embd": 150, "n_head": 2, "n_inner": 129},  # more than one vector, and a rest
    "long": {"n_inner": 1700},  # eight rows of inputs that do not fit the first cache
}
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
# In nats; measured: 1e-6 to 7e-6 on these models of large random weights, 3e-6 to 2e-5 of the
# plain forward in bf16.
MOST_KL = 1e-5


def opened(
    form: str, dtype: torch.dtype = torch.float32, bits: int | None = None
) -> tuple[GPT, CompiledDecoder]:
    forms = FORMS if bits is None else PACKABLE
    model = scrambled(GPTConfig(**(SIZES | forms[form]))).to(dtype)
    if bits is not None:
        pack_model(model, bits)
    decoder = open_decoder(model, "yes")
    assert isinstance(decoder, CompiledDecoder)
    return model, decoder


def exactly(model: GPT) -> GPT:
    """The same weights in float32, unpacked."""
    exact = GPT(model.config).eval()
    weights = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            del weights[f"{name}.words"], weights[f"{name}.scales"]
            weights[f"{name}.weight"] = unpack(module.words, module.scales, module.bits)
    exact.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return exact


def some_text(rows: int, length: int = 40) -> Tensor:
    return torch.randint(37, (rows, length), generator=torch.Generator().manual_seed(2))


def read(decoder: CompiledDecoder, text: Tensor, parts: list[int]) -> Tensor:
    """The logits after every token of a text that is read in parts.  (B, T) -> (B, T, V)"""
    config, dtype = decoder.model.config, decoder.model.dtype
    B, start, found = len(text), 0, []
    cache = KVCache(config, B, dtype=dtype)
    for part in text.split(parts, dim=1):
        T = part.shape[1]
        texts = [row for row in range(B) for _ in range(T)]
        places = [*range(start, start + T)] * B
        logits = decoder.logits(part.flatten().tolist(), texts, places, range(B * T), cache)
        found.append(logits.view(B, T, -1))
        start += T
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_step_is_the_models(form: str) -> None:
    model, decoder = opened(form)
    text = some_text(3)
    with torch.inference_mode():
        expected = model(text).logits
    for parts in ([1] * 40, [5, 1, 2, 4] + [1] * 28):
        assert (read(decoder, text, parts) - expected).abs().max() < 1e-5 * expected.std()


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", PACKABLE)
def test_of_packed_weights_it_is_the_unpacked_models(form: str, bits: int) -> None:
    model, decoder = opened(form, bits=bits)
    text = some_text(3)
    with torch.inference_mode():
        expected = exactly(model)(text).logits
    for parts in ([1] * 40, [5, 1, 2, 4] + [1] * 28):
        found = read(decoder, text, parts)
        # Inputs of these products have 16 bits.
        assert (found - expected).abs().max() < 5e-4 * expected.std()
        p, q = (logits.double().log_softmax(-1) for logits in (expected, found))
        assert (p.exp() * (p - q)).sum(-1).mean() < 1e-7
    wanted = [t.tolist() for t in generate_tokens(exactly(model), text[:, :3], 45)]
    assert [t.tolist() for t in generate_tokens(model, text[:, :3], 45, decoder=decoder)] == wanted


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("form", PACKABLE)
def test_many_rows_of_packed_weights_are_unpacked_quickly(form: str, bits: int) -> None:
    """To the same numbers as those of model/quantized.py."""
    model, _ = opened(form, bits=bits)
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 4 * model.config.n_layer + 1
    for linear in linears:
        for dtype in (torch.float32, torch.bfloat16):
            how = (linear.words, linear.scales, linear.bits, dtype)
            assert torch.equal(linear.unpack(*how), unpack(*how))
    text = some_text(2)
    with torch.inference_mode():
        found, expected = model(text).logits, exactly(model)(text).logits
    assert (found - expected).abs().max() < 1e-5 * expected.std()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_tokens_are_those_of_plain_decoding(form: str) -> None:
    model, decoder = opened(form)
    for count in (1, 20, 60):  # the last beyond the context
        for sampling in (GREEDY, SamplingSettings(temperature=0.9, top_k=20)):
            options: dict[str, Any] = {"sampling": sampling, "seed": 5}
            wanted = [int(t) for t in generate_tokens(model, PROMPT, count, **options)]
            for more in ({"decoder": decoder}, {"decoder": decoder, "draft": FromText()}):
                tokens = [int(t) for t in generate_tokens(model, PROMPT, count, **options, **more)]
                assert tokens == wanted
    rows = some_text(4, 3)
    wanted = [t.tolist() for t in generate_tokens(model, rows, 45)]
    assert [t.tolist() for t in generate_tokens(model, rows, 45, decoder=decoder)] == wanted


@pytest.mark.parametrize(
    ("form", "dtype", "bits"),
    [
        ("wide", torch.float32, None),
        ("wide", torch.bfloat16, None),
        ("long", torch.float32, None),
        ("long", torch.bfloat16, None),
        ("wide", torch.float32, 8),
        ("wide", torch.bfloat16, 4),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_a_row_does_not_depend_on_the_others(
    form: str, dtype: torch.dtype, bits: int | None
) -> None:
    """To the bit: alone or beside others, token by token or in parts, by one thread or three."""
    _, decoder = opened(form, dtype, bits)
    text = some_text(16, 13)
    alone = torch.cat([read(decoder, row.unsqueeze(0), [1] * 13) for row in text])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for rows in (1, 2, 3, 5, 8, 9, 16):
            assert torch.equal(read(decoder, text[:rows], [1] * 13), alone[:rows])
        assert torch.equal(read(decoder, text[:2], [7, 1, 2, 3]), alone[:2])


@pytest.mark.slow
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_drafts_and_batches_change_nothing_in_any_precision(
    bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, decoder = opened("wide", torch.bfloat16, bits)
    widths = []

    def counted(tokens: list[int], *rest: Any) -> Tensor:
        widths.append(len(tokens))
        return logits(tokens, *rest)

    logits = decoder.logits
    monkeypatch.setattr(decoder, "logits", counted)
    sampling = SamplingSettings(temperature=0.3)  # so that passages return, and are guessed
    how: dict[str, Any] = {"sampling": sampling, "seed": 5, "decoder": decoder}
    alone = [int(t) for t in generate_tokens(model, PROMPT, 34, **how)]
    assert set(widths[1:]) == {1}
    assert [int(t) for t in generate_tokens(model, PROMPT, 34, draft=FromText(), **how)] == alone
    assert max(widths[-20:]) > 1  # several tokens were read at once
    beside = torch.cat([PROMPT, some_text(5, 5)])
    assert [int(t[0]) for t in generate_tokens(model, beside, 34, **how)] == alone


def test_in_bf16_it_stays_near_the_float32_forward() -> None:
    model, decoder = opened("wide", torch.bfloat16)
    text = some_text(2)
    with torch.inference_mode():
        p = exactly(model)(text).logits.double().log_softmax(-1)
        plain = model(text).logits.double().log_softmax(-1)
    q = read(decoder, text, [1] * 40).double().log_softmax(-1)
    ours, theirs = ((p.exp() * (p - other)).sum(-1).mean() for other in (q, plain))
    assert 0 <= float(ours) < MOST_KL
    assert ours < theirs  # which rounds the residual stream too


@pytest.mark.slow
def test_a_processor_without_bfloat16_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled for the least that any processor of this family has; with -O3 it takes longer."""
    flags = [f for f in native.FLAGS if not f.startswith(("-march", "-O"))]
    monkeypatch.setattr(native, "FLAGS", ["-O1", *flags])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = some_text(3)
    for dtype in (torch.float32, torch.bfloat16):
        model, decoder = opened("odd", dtype)
        with torch.inference_mode():
            expected = exactly(model)(text).logits
        found = read(decoder, text, [2] * 20)
        most = 1e-5 if dtype == torch.float32 else 0.05  # of bf16: only the cache is rounded
        assert (found - expected).abs().max() < most * expected.std()


@pytest.mark.parametrize("bits", [None, 8])
def test_numbers_that_are_none_are_not_hidden(bits: int | None) -> None:
    model, decoder = opened("wide", bits=bits)
    for broken in (torch.nan, torch.inf):
        with torch.no_grad():
            model.h[1].ln_2.weight[5] = broken
        spoilt = CompiledDecoder(model, decoder.library)
        assert not read(spoilt, some_text(1, 2), [2]).isfinite().any()


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "FOLDER", str(tmp_path))  # nothing was measured
    model, decoder = opened("gpt2")
    cache = KVCache(model.config, 1, capacity=3)
    decoder.logits([3, 1], [0, 0], [0, 1], [1], cache)
    with pytest.raises(ValueError, match="4 tokens do not fit a cache of 3"):
        decoder.logits([3, 1], [0, 0], [2, 3], [1], cache)
    with pytest.raises(ValueError, match="2 rows do not fit a cache of 1"):
        decoder.logits([3, 1], [0, 1], [2, 2], [0, 1], cache)
    with pytest.raises(IndexError):
        decoder.logits([37], [0], [2], [0], cache)
    assert decoder.takes(compiled.MOST_ROWS)
    assert not decoder.takes(compiled.MOST_ROWS + 1)


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened("gpt2")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(subprocess, "run", never)
    for form in FORMS:  # one library for every model
        opened(form)
        opened(form, torch.bfloat16)


@pytest.mark.parametrize("bits", [None, 8])
def test_a_model_that_is_let_go_is_freed_at_once(bits: int | None) -> None:
    """No circle of references holds its weights until Python looks for such."""
    gc.disable()
    try:
        model, decoder = opened("gpt2", bits=bits)
        gone = weakref.ref(model)
        del model, decoder
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_two_may_compile_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    script = (
        "from gptsmith.machine import native; native.FLAGS[0] = '-O0';"
        "from tests.generation.test_compiled import opened, read, some_text;"
        "model, decoder = opened('gpt2'); text = some_text(1, 5);"
        "assert (read(decoder, text, [5]) - model(text).logits).abs().max() < 1e-3"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.suffix for path in (tmp_path / "gptsmith" / "native").iterdir()] == [".so"]


@pytest.mark.slow
def test_a_damaged_file_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened("gpt2")
    folder = environment.cache_folder("native")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    copied = tmp_path / "gptsmith" / "native"
    shutil.copytree(folder, copied, ignore=lambda _, names: [n for n in names if n[:5] != "step-"])
    (library,) = copied.iterdir()
    library.write_bytes(library.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="is damaged"):
        opened("gpt2")
    assert [path.name for path in copied.iterdir()] == [library.name]
    ctypes.CDLL(str(library))


@pytest.mark.system("posix", "runs /bin/false")
def test_what_has_no_compiled_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    modern = GPT(GPTConfig(**(SIZES | MODERN | {"n_head": 2})))
    assert open_decoder(modern, "auto") is None
    with pytest.raises(ValueError, match="is for GPT-2's block on a CPU: leave it out"):
        open_decoder(modern, "yes")
    model = scrambled(GPTConfig(**SIZES))
    assert open_decoder(model, "no") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(environment, "compiler", lambda: None)
    with pytest.warns(UserWarning, match=r"the compiled step is missing.*there is no g\+\+"):
        assert open_decoder(model, "auto") is None
    with pytest.raises(ValueError, match=r"there is no g\+\+ or clang\+\+; install one"):
        open_decoder(model, "yes")
    monkeypatch.setattr(environment, "compiler", lambda: "/bin/false")
    with pytest.warns(UserWarning, match=r"is missing, which is slower: /bin/false could not"):
        assert open_decoder(model, "auto") is None
    with pytest.raises(ValueError, match=r"/bin/false could not compile step\.cpp: exit 1; leave"):
        open_decoder(model, "yes")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"could not be compiled: .*Not a directory.*; leave"):
        open_decoder(model, "yes")
    assert not list(tmp_path.rglob("*.so"))


def test_two_threads_may_decode_at_once() -> None:
    """Each with its own cache, as two callers of a server."""
    _, decoder = opened("wide")
    texts = [some_text(2, 30), some_text(2, 30).flip(1)]
    wanted = [read(decoder, text, [1] * 30) for text in texts]
    found: dict[int, Tensor] = {}

    def run(number: int) -> None:
        found[number] = read(decoder, texts[number], [1] * 30)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], wanted[number]) for number in range(2))


def test_sample_with_and_without(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = GPTConfig(**(SIZES | {"vocab_size": 257}))
    gptsmith.save(scrambled(config), byte_tokenizer(), tmp_path / "model")
    words = ["sample", str(tmp_path / "model"), "--prompt", "To be", "--seed", "3"]
    words += ["--max-tokens", "30", "--threads", "1", "--compile"]
    said = {}
    for choice in ("no", "yes", "auto"):
        assert main([*words, choice]) == 0
        said[choice] = capsys.readouterr().out
    assert said["no"] == said["yes"] == said["auto"]
    assert main([*words, "maybe"]) == 2
    assert "compile is 'maybe': one of auto, yes, no" in capsys.readouterr().err
