"""GGUF: llama.cpp computes what we compute, from our files, and we read what others write."""

import json
import os
import random
import re
import shlex
import struct
import subprocess
import sys
import urllib.request
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf import GGUFReader, GGUFWriter

from gptsmith import GPT, GPTConfig, Tokenizer, generate_greedy
from gptsmith.checkpoint.building import build
from gptsmith.checkpoint.names import TIED
from gptsmith.checkpoint.tensors import Stored, with_all
from gptsmith.cli.main import main
from gptsmith.convert.gguf import DTYPES, nearest, read, recognise, write
from gptsmith.machine.files import DamagedError
from gptsmith.tokenizers import byte_tokenizer, char_tokenizer, gpt2_tokenizer, learn_bpe
from tests.advice import refusal
from tests.conftest import scrambled

TEXT = (
    "To be, or not to be: that's the question.\n\nHAMLET:\n\tWhether 'tis nobler — naïve 🙂 ½\r\n"
)
HARD = [
    TEXT,
    "",
    "  two  and   three    spaces \n\n\n  \t lines \n ",
    "I'll we've you're he'd I'm don't it's 'S 'LL ''",
    "1234567890 12a3 ½²Ⅷ١٢٣ 3.14",
    "é e\u0301 ñandú straße Ελληνικά русский 中文 日本語 한국어 עברית العربية हिन्दी ไทย",
    "🙂👩‍👩‍👧 🇩🇪 \u200b\u200d\ufeff\u00a0\u2003\u2028\u0085\x0b\x0c\x1c",
    "<|endoftext is not it|> [PAD5] [no] [merges] __ ## $$ %% \\ \x01\x7f",
]
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "char": lambda: char_tokenizer("".join(HARD)),
    "byte": byte_tokenizer,
    "gpt2": gpt2_tokenizer,
    "learned": lambda: learn_bpe([TEXT] * 3, 300),
    "unlearned": lambda: learn_bpe([TEXT], 257),
}
# n_embd and n_inner are whole blocks of Q8_0, and nothing has the size of something else.
SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "context_length": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "n_inner": 160,
}
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "untied": {"tie_weights": False},
    "narrow": {"n_embd": 12, "n_head": 3, "n_inner": None, "norm_eps": 1e-3},
    "no biases": {"bias": False, "dropout": 0.1},
}


def stored(model: GPT, tokenizer: Tokenizer | None = None) -> Stored:
    """A model as it comes to `write`: already the nearest."""
    config = nearest(model.config)
    fetch = with_all(model.config, model.state_dict().__getitem__, config)
    return Stored(config=config, fetch=fetch, tokenizer=tokenizer)


def letters(count: int) -> Tokenizer:
    """So many characters, all of one byte."""
    return char_tokenizer(map(chr, range(33, 33 + count)))


# llama.cpp ends the process where it dislikes a file, so it gets one of its own.
SERVE = """
import os, sys, xllamacpp
said = xllamacpp.CommonParams()
said.model.path = sys.argv[1]
said.verbosity = 2  # warnings
said.warmup = said.fit_params = False
said.n_gpu_layers = said.cache_ram_mib = 0
said.cpuparams.n_threads = said.cpuparams_batch.n_threads = 1
# Its own cache is in float16; compared is what it computes from the weights.
said.cache_type_k = said.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
said.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(said)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)  # its own end may wait for its threads forever on a loaded machine
"""


@dataclass
class Server:
    """llama.cpp, with one file loaded."""

    address: str
    warnings: list[str]

    def ask(self, place: str, **question: Any) -> dict[str, Any]:
        """What the server answers."""
        head, data = {"Content-Type": "application/json"}, json.dumps(question).encode()
        request = urllib.request.Request(f"{self.address}/{place}", data, head)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def ids(self, text: str) -> list[int]:
        """The ids that it gives to a text."""
        return self.ask("tokenize", content=text, add_special=True)["tokens"]

    def greedy(self, prompt: str | list[int], count: int, n_probs: int = 0) -> dict[str, Any]:
        """What it answers to a prompt, always taking the likeliest token."""
        settings = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
        return self.ask("completion", prompt=prompt, n_predict=count, n_probs=n_probs, **settings)


@contextmanager
def served(path: Path) -> Iterator[Server]:
    log = path.with_suffix(".log")
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", SERVE, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http"), log.read_text()[:2000]
        warned = [line for line in log.read_text().splitlines() if " W " in line]
        yield Server(address, [line for line in warned if "load:" in line])
        process.stdin.close()


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (1, 5, 9)]


def ours(model: GPT, ids: list[int], start: int) -> torch.Tensor:
    """Log-probabilities of what follows each id from `start` on, but the last."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)


def theirs(answer: dict[str, Any], vocab_size: int) -> torch.Tensor:
    """The same of a server's answer, without the token that was added for it."""
    found = torch.full((len(answer["tokens"]), vocab_size + 1), float("nan"))
    for row, step in zip(found, answer["completion_probabilities"], strict=True):
        for one in step["top_logprobs"]:
            row[one["id"]] = one["logprob"]
    return found[:, :vocab_size].log_softmax(-1)


# -- llama.cpp runs what we write

# Largest differences of log-probabilities: measured were 0.0009, 0.0018, 0.011 and 0.053. Its GELU
# goes by a table in float16, and beside weights of fewer bits it rounds activations to as few.
BOUNDS = {"float32": 0.002, "fp16": 0.005, "bf16": 0.03, "q8_0": 0.1}


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(form, d) for form in FORMS for d in DTYPES if form == "gpt2" or d in ("float32", "q8_0")],
)
@pytest.mark.slow
def test_llama_cpp_computes_what_we_compute(form: str, dtype: str, tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**(SIZES | FORMS[form])))
    write(stored(model, letters(37)), tmp_path / "m.gguf", dtype)
    again = build(read(tmp_path / "m.gguf"))
    with served(tmp_path / "m.gguf") as server:
        for prompt in prompts(37):
            answer = server.greedy(prompt, 12, n_probs=38)
            tokens = answer["tokens"]
            expected = ours(again, prompt + tokens, len(prompt))
            assert len(tokens) == 12
            assert (theirs(answer, 37) - expected).abs().max() < BOUNDS[dtype]
            if dtype == "float32":
                greedy = generate_greedy(model, torch.tensor([prompt]), 12)
                assert greedy[0].tolist() == prompt + tokens
            chosen = expected[range(12), tokens]  # the likeliest, or as good as
            assert (expected.max(-1).values - chosen).max() < 2 * BOUNDS[dtype]


def test_its_gelu_is_the_tanh_one_in_float16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scrambled(GPTConfig(**(SIZES | FORMS["narrow"])))
    write(stored(model, letters(37)), tmp_path / "m.gguf", "float32")
    gelu, prompt = torch.nn.functional.gelu, prompts(37)[2]
    with served(tmp_path / "m.gguf") as server:
        answer = server.greedy(prompt, 12, n_probs=38)

    def apart() -> float:
        expected = ours(model, prompt + answer["tokens"], len(prompt))
        return float((theirs(answer, 37) - expected).abs().mean())

    def by_table(kind: str) -> Callable:
        return lambda x, approximate: gelu(x.half().float(), approximate=kind).half().float()

    plain = apart()
    monkeypatch.setattr(torch.nn.functional, "gelu", by_table("none"))
    erf = apart()
    monkeypatch.setattr(torch.nn.functional, "gelu", by_table("tanh"))
    assert apart() < min(plain, erf) / 10


def test_a_model_without_an_end_is_never_ended(tmp_path: Path) -> None:
    """llama.cpp's added token has the logit 0, more than any of these."""
    model = scrambled(GPTConfig(**SIZES, tie_weights=False))
    with torch.no_grad():
        model.ln_f.weight.mul_(0.01)
        model.lm_head.weight.copy_(-model.ln_f.bias * (1 + torch.rand(37, 1)))
    tokenizer, prompt = letters(37), prompts(37)[2]
    write(stored(model, tokenizer), tmp_path / "m.gguf", "float32")
    with served(tmp_path / "m.gguf") as server:
        answer = server.greedy(tokenizer.decode(prompt), 12, n_probs=38)
    assert model(torch.tensor([prompt])).logits.max() < 0
    assert answer["stop_type"] == "limit"
    expected = generate_greedy(model, torch.tensor([prompt]), 12)[0].tolist()
    assert prompt + answer["tokens"] == expected
    assert answer["content"] == tokenizer.decode(answer["tokens"])


def test_a_model_with_an_end_stops_there(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = scrambled(GPTConfig(**SIZES | {"vocab_size": 257}, tie_weights=False))
    with torch.no_grad():
        model.ln_f.weight.mul_(0.01)
        model.lm_head.weight[256] = model.ln_f.bias
    write(stored(model, tokenizer), tmp_path / "m.gguf", "float32")
    with served(tmp_path / "m.gguf") as server:
        answer = server.greedy("to be", 12)
    assert answer["stop_type"] == "eos"
    assert answer["content"] == ""


# -- the tokenizer


@pytest.fixture(scope="module")
def any_text() -> str:
    """Every kind of character, in no order."""
    chance = random.Random(5)
    codes = [chance.randrange(0x110000 if n % 3 else 0x3000) for n in range(6000)]
    found = [chr(code) for code in codes if not 0xD800 <= code < 0xE000 and code]
    return "".join(one + chance.choice(["", "", " ", "\n", "a", "1"]) for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gives_the_same_ids(kind: str, tmp_path: Path) -> None:
    tokenizer = KINDS[kind]()
    config = GPTConfig(**(SIZES | {"vocab_size": tokenizer.vocab_size + 3, "n_embd": 8}))
    write(stored(scrambled(config), tokenizer), tmp_path / "m.gguf", "fp16")
    with served(tmp_path / "m.gguf") as server:
        for text in HARD:
            ids = tokenizer.encode(text)
            assert server.ids(text) == ids
            assert server.ask("detokenize", tokens=ids)["content"] == text
        assert server.warnings == []
    again = read(tmp_path / "m.gguf")
    assert again.tokenizer is not None
    assert again.tokenizer.kind == tokenizer.kind
    assert again.tokenizer.fingerprint == tokenizer.fingerprint
    assert again.config.vocab_size == config.vocab_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "learned", "char"])
def test_llama_cpp_gives_the_same_ids_for_any_text(
    kind: str, any_text: str, tmp_path: Path
) -> None:
    tokenizer = char_tokenizer(any_text) if kind == "char" else KINDS[kind]()
    config = GPTConfig(**(SIZES | {"vocab_size": tokenizer.vocab_size, "n_embd": 8}))
    write(stored(scrambled(config), tokenizer), tmp_path / "m.gguf", "float32")
    with served(tmp_path / "m.gguf") as server:
        for start in range(0, len(any_text), 50):
            piece = any_text[start : start + 50]
            assert server.ids(piece) == tokenizer.encode(piece), repr(piece)


def test_llama_cpp_passes_over_unknown_characters(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("Hé — llo")
    config = GPTConfig(**(SIZES | {"vocab_size": tokenizer.vocab_size}))
    write(stored(scrambled(config), tokenizer), tmp_path / "m.gguf", "q8_0")
    with served(tmp_path / "m.gguf") as server:
        assert server.ids("Hè“lé…") == tokenizer.encode("Hlé")


def odd(change: Callable[[dict[str, Any]], None]) -> Tokenizer:
    spec = json.loads(KINDS["learned"]().backend.to_str())
    change(spec)
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "another pre-tokenizer"),
        (lambda s: s["pre_tokenizer"].update(use_regex=False), "another pre-tokenizer"),
        (lambda s: s["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda s: s["added_tokens"][0].update(special=False), r"<\|endoftext\|>"),
    ],
)
def test_tokenizers_that_llama_cpp_has_not_are_refused(
    change: Callable, what: str, tmp_path: Path
) -> None:
    tokenizer = odd(change)
    model = scrambled(GPTConfig(**(SIZES | {"vocab_size": tokenizer.vocab_size})))
    message = f"the tokenizer has {what}, unlike GPT-2's: llama.cpp would give other ids"
    with pytest.raises(ValueError, match=message):
        write(stored(model, tokenizer), tmp_path / "m.gguf", "fp16")


def test_added_tokens_are_refused_in_every_kind(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(KINDS["byte"]().backend.to_str())
    backend.add_tokens(["newword"])
    tokenizer = Tokenizer(backend)
    model = scrambled(GPTConfig(**(SIZES | {"vocab_size": tokenizer.vocab_size})))
    with pytest.raises(ValueError, match="the tokenizer has newword, unlike GPT-2's"):
        write(stored(model, tokenizer), tmp_path / "m.gguf", "fp16")


def test_a_token_with_the_name_of_an_unused_id_is_refused(tmp_path: Path) -> None:
    tokenizer = odd(lambda s: s["added_tokens"].append(another(s, "[PAD302]")))
    model = scrambled(GPTConfig(**(SIZES | {"vocab_size": 303})))
    with pytest.raises(ValueError, match=r"the tokenizer has a token \[PAD\.\.\.\]"):
        write(stored(model, tokenizer), tmp_path / "m.gguf", "fp16")


def another(spec: dict[str, Any], content: str) -> dict[str, Any]:
    end = spec["added_tokens"][0]
    return end | {"content": content, "id": end["id"] + 1}


def test_a_bpe_without_an_end_of_text_gets_one(tmp_path: Path) -> None:
    tokenizer = odd(lambda s: s["added_tokens"].clear())
    assert tokenizer.end_of_text is None
    model = scrambled(GPTConfig(**(SIZES | {"vocab_size": tokenizer.vocab_size})))
    write(stored(model, tokenizer), tmp_path / "m.gguf", "float32")
    with served(tmp_path / "m.gguf") as server:
        assert server.ids(TEXT) == tokenizer.encode(TEXT)
    again = read(tmp_path / "m.gguf")
    assert again.config == nearest(model.config)
    assert again.tokenizer is not None
    assert again.tokenizer.fingerprint == tokenizer.fingerprint


# -- there and back


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_writing_and_reading_changes_no_more_than_rounding(
    form: str, dtype: str, tmp_path: Path
) -> None:
    model = scrambled(GPTConfig(**(SIZES | FORMS[form])))
    given = stored(model, letters(37))
    write(given, tmp_path / "m.gguf", dtype)
    again = read(tmp_path / "m.gguf")
    assert recognise(tmp_path / "m.gguf")
    assert again.config == given.config
    assert again.dtype == (dtype if dtype != "q8_0" else "fp16" if form == "narrow" else "float32")
    for name in GPT(given.config).state_dict():
        if name == "lm_head.weight" and given.config.tie_weights:
            continue
        before, after = given.fetch(name), again.fetch(name)
        exact = dtype == "float32" or before.ndim == 1 or name == "wpe.weight"
        if exact:
            assert after.dtype is torch.float32
            assert torch.equal(after, before), name
        elif dtype == "q8_0" and form != "narrow":
            # Half a step of the largest of each 32 numbers over 127, and the step's own rounding.
            largest = before.abs().reshape(-1, 32).amax(1, keepdim=True)
            apart = (after - before).abs().reshape(-1, 32)
            assert (apart <= largest * (0.5 / 127 + 2**-11) * 1.001).all(), name
        else:
            word = torch.bfloat16 if dtype == "bf16" else torch.float16
            assert torch.equal(after, before.to(word)), name


def test_only_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**SIZES, tie_weights=False))
    given, alive = stored(model, letters(37)), list[weakref.ref]()

    def fetch(name: str) -> torch.Tensor:
        assert not [ref for ref in alive if ref() is not None]
        tensor = given.fetch(name).clone()
        alive.append(weakref.ref(tensor))
        return tensor

    for dtype in DTYPES:
        write(replace(given, fetch=fetch), tmp_path / "m.gguf", dtype)


def test_what_the_format_cannot_say() -> None:
    odd = GPTConfig(**SIZES, bias=False, qkv_bias=True, activation="gelu_erf", dropout=0.2)
    assert nearest(odd) == GPTConfig(**SIZES)
    assert nearest(GPTConfig(**SIZES, norm_eps=1.23456789e-5)).norm_eps == 1.2345679e-05
    with pytest.raises(ValueError, match=r"llama\.cpp has no model with the modern block"):
        nearest(GPTConfig(block="modern"))
    with pytest.raises(ValueError, match=r"llama\.cpp fails with one channel per head"):
        nearest(GPTConfig(n_embd=12))


def test_what_write_refuses(tmp_path: Path) -> None:
    given = stored(scrambled(GPTConfig(**SIZES)), letters(37))
    with pytest.raises(ValueError, match="cannot be written in 'int8': one of float32, fp16, bf16"):
        write(given, tmp_path / "m.gguf", "int8")
    with pytest.raises(ValueError, match="the model has no tokenizer, and without one llama"):
        write(replace(given, tokenizer=None), tmp_path / "m.gguf", "fp16")


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    given = stored(scrambled(GPTConfig(**SIZES)), letters(37))
    with pytest.raises(ImportError, match=r"pip install 'gptsmith\[gguf\]'"):
        write(given, tmp_path / "m.gguf", "fp16")


# -- files of others

THEIRS = {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"} | {
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"
}  # fmt: skip


def their_name(ours: str) -> str:
    if ours.startswith("h."):
        _, layer, rest = ours.split(".", 2)
        part, kind = rest.rsplit(".", 1)
        return f"blk.{layer}.{THEIRS[part]}.{kind}"
    part, kind = ours.rsplit(".", 1)
    top = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"}
    return f"{top[part]}.{kind}"


Change = Callable[[GGUFWriter], None]


def published(
    path: Path,
    model: GPT,
    tokenizer: Tokenizer | None = None,
    *,
    change: Change = lambda writer: None,
    tensors: Callable[[dict[str, np.ndarray]], None] = lambda found: None,
    architecture: str = "gpt2",
) -> None:
    """A file as llama.cpp's converter writes one, with keys that we do not."""
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_name("Gpt2")
    writer.add_size_label("0.1K")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.mlp_size)
    writer.add_head_count(config.n_head)
    writer.add_block_count(config.n_layer)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_file_type(1)
    if tokenizer is not None:
        texts = {id: token for token, id in tokenizer.vocab.items()}
        size = config.vocab_size
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list([texts.get(id, f"[PAD{id}]") for id in range(size)])
        end = tokenizer.end_of_text
        writer.add_token_types([3 if i == end else 1 if i in texts else 5 for i in range(size)])
        writer.add_token_merges([" ".join(pair) for pair in tokenizer.spec["model"]["merges"]])
        writer.add_bos_token_id(end)
        writer.add_eos_token_id(end)
    else:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(config.vocab_size)
    found = {their_name(name): t.numpy() for name, t in model.state_dict().items()}
    for name, array in found.items():
        small = array.ndim == 1 or name.startswith("position")
        found[name] = array.copy() if small else array.astype(np.float16)
    tensors(found)
    change(writer)
    for name, array in found.items():
        kind = gguf.GGMLQuantizationType.Q4_0 if array.dtype == np.uint8 else None
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "learned"])
def test_a_published_file_is_read(kind: str, tmp_path: Path) -> None:
    """Its head is the embedding once more, and there are ids that no token has."""
    tokenizer = KINDS[kind]()
    config = GPTConfig(**(SIZES | {"vocab_size": tokenizer.vocab_size + 5, "n_embd": 8}))
    model = scrambled(config)
    published(tmp_path / "m.gguf", model, tokenizer, change=lambda w: w.add_custom_alignment(64))
    found = read(tmp_path / "m.gguf")
    assert found.config == config
    assert found.tokenizer is not None
    assert found.tokenizer.fingerprint == tokenizer.fingerprint
    assert found.dtype == "fp16"
    assert found.tensors.ignored == {"output.weight": TIED}
    again = build(found)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        exact = one.ndim == 1 or name == "wpe.weight"
        assert torch.equal(one if exact else one.half().float(), other), name
    with served(tmp_path / "m.gguf") as server:
        ids = tokenizer.encode(TEXT)[:9]
        greedy = generate_greedy(again, torch.tensor([ids]), 6)[0].tolist()
        assert server.greedy(ids, 6)["tokens"] == greedy[9:]


def test_a_published_head_of_its_own_and_no_tokenizer(tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**SIZES, tie_weights=False))
    published(tmp_path / "m.gguf", model)
    found = read(tmp_path / "m.gguf")
    assert found.config == model.config
    assert found.tokenizer is None
    assert torch.equal(found.fetch("lm_head.weight"), model.lm_head.weight.half())


def test_the_librarys_reader_reads_what_we_write(tmp_path: Path) -> None:
    tokenizer = KINDS["learned"]()
    model = scrambled(GPTConfig(**(SIZES | {"vocab_size": tokenizer.vocab_size})))
    write(stored(model, tokenizer), tmp_path / "m.gguf", "q8_0")
    reader = GGUFReader(tmp_path / "m.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert {name for name, type in types.items() if type == "Q8_0"} == {
        "token_embd.weight",
        *(f"blk.{n}.{p}.weight" for n in (0, 1) for p in [*THEIRS.values()] if "norm" not in p),
    }
    assert {types[name] for name in types if "norm" in name or "bias" in name} == {"F32"}
    assert types["position_embd.weight"] == "F32"
    for tensor in reader.tensors:
        if tensor.tensor_type.name == "F32":
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        ours = {their_name(name): name for name in model.state_dict()}[tensor.name]
        assert torch.equal(torch.from_numpy(values), read(tmp_path / "m.gguf").fetch(ours))


# -- bad files


def quantized(found: dict[str, np.ndarray]) -> None:
    name, kind = "blk.1.ffn_up.weight", gguf.GGMLQuantizationType.Q4_0
    found[name] = gguf.quants.quantize(found[name].astype(np.float32), kind)


def without(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda found: found.__delitem__(name)


def put(name: str, *shape: int) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda found: found.update({name: np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            {"architecture": "llama"},
            "has a model of architecture 'llama': only 'gpt2' is supported",
        ),
        (
            {"tensors": quantized},
            "blk.1.ffn_up.weight is in Q4_0: only F32, F16, BF16, Q8_0 are supported",
        ),
        (
            {"tensors": without("blk.1.ffn_up.bias")},
            "lacks 1 tensors of a GPT-2, blk.1.ffn_up.bias first",
        ),
        (
            {"tensors": put("blk.0.attn_gate.weight", 3)},
            "has 1 tensors no GPT-2 has, blk.0.attn_gate.weight first",
        ),
        (
            {"tensors": put("output_norm.bias", 63)},
            r"output_norm.bias is \(63,\), but its header calls for \(64,\)",
        ),
        (
            {"change": lambda w: w.add_block_count(3)},
            "has 2 layers, but its header calls for 3",
        ),
        (
            {"change": lambda w: w.kv_data[0].pop("gpt2.context_length")},
            "is not a complete GPT-2: its header lacks gpt2.context_length",
        ),
        ({"change": lambda w: w.add_head_count(5)}, "n_embd 64 is not a multiple of n_head 5"),
        ({"change": lambda w: w.add_head_count_kv(2)}, "has 2 heads of keys, but 4 of queries"),
        ({"change": lambda w: w.add_layer_norm_eps(0.0)}, "norm_eps is 0.0"),
        ({"change": lambda w: w.add_uint16("split.count", 3)}, "is one of 3 parts: join them"),
        (
            {"change": lambda w: w.add_tokenizer_model("llama")},
            "has the tokenizer 'llama', 'gpt-2'",
        ),
        (
            {"change": lambda w: w.add_uint32("gptsmith.vocab_size", 38)},
            "has gptsmith.vocab_size 38, but 37 tokens",
        ),
        (
            {"change": lambda w: w.add_tokenizer_model("gpt2")},
            "has no valid tokenizer: 'tokenizer.ggml.tokens'",
        ),
        ({"change": lambda w: w.add_string("general.alignment", "?")}, "its alignment is '?'"),
    ],
)
def test_other_files_are_refused_in_one_line(how: Any, message: str, tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**SIZES))
    path = tmp_path / "m.gguf"
    published(path, model, **how)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}.*{message}") as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.system("posix", "runs a script by its first line")
def test_parts_are_joined_as_advised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever part is given: only the first says what the model is."""
    tool = tmp_path / "bin" / "llama-gguf-split"
    tool.parent.mkdir()
    program = Path(__file__).with_name("llama_gguf_split.py")
    tool.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(program)])} "$@"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{os.environ['PATH']}:{tool.parent}")  # a real one comes first
    place = tmp_path / "my models"
    place.mkdir()
    monkeypatch.chdir(place)
    write(stored(scrambled(GPTConfig(**(SIZES | {"vocab_size": 257}))), byte_tokenizer()),
          Path("m.gguf"), "q8_0")  # fmt: skip
    line = "llama-gguf-split --split --split-max-tensors 10 m.gguf part"
    subprocess.run(line.split(), check=True, capture_output=True)
    parts = sorted(Path().glob("part-*.gguf"))
    assert len(parts) == 3
    with served(parts[0]) as server:  # llama.cpp takes them as they are
        assert server.ids("hi") == [104, 105]
    for number, part in enumerate(parts):
        said = refusal(["import", str(place / part), "out"], capsys)
        assert f"{part} is one of 3 parts" in said
        command = said.split("`")[1].replace(" OUT", f" joined-{number}.gguf")
        subprocess.run(shlex.split(command), check=True, capture_output=True)
        assert main(["import", f"joined-{number}.gguf", f"joined-{number}"]) == 0
    assert main(["import", "m.gguf", "m"]) == 0
    weights = [Path(name, "model.safetensors").read_bytes() for name in ("m", "joined-1")]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    tokenizer = KINDS["learned"]()
    config = GPTConfig(**(SIZES | {"vocab_size": tokenizer.vocab_size, "n_embd": 8, "n_layer": 1}))
    write(stored(scrambled(config), tokenizer), path, "fp16")
    return path.read_bytes()


def test_a_file_cut_short_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    for end in [*range(40), *range(40, len(whole), 97), len(whole) - 32]:
        path.write_bytes(whole[:end])
        with pytest.raises(DamagedError, match="is cut short"):
            read(path)
        assert recognise(path) == (end >= 4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(60), r"is b'GGML' version 0: GGUF 2 or 3 is needed"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1: GGUF 2 or 3 is needed"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "version 50331648: GGUF 2 or 3"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(60), "is cut short|there twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63) + b"\xff" * 60, "is cut short"),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 8, 2**62) + bytes(80),
            "is cut short",
        ),
        (
            b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", 9, 9, 2) + bytes(80),
            "it has values of unknown type 9",
        ),
        (b"GGUF" + struct.pack("<IQQQ1s", 3, 0, 1, 1, b"\xff") + bytes(80), "can't decode byte"),
    ],
)
def test_a_lying_header_is_refused_at_once(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "m.gguf")


@pytest.mark.slow
def test_any_byte_may_be_wrong(whole: bytes, tmp_path: Path) -> None:
    """The file is read, or refused: no other error, no hang."""
    path, chance = tmp_path / "m.gguf", random.Random(1)
    header = whole.index(b"output_norm.bias") + 60
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 4])):
            data[chance.randrange(header)] = chance.choice([0, 1, 255, chance.randrange(256)])
        path.write_bytes(data)
        said = ""
        try:
            found = read(path)
            build(found)
        except (ValueError, OSError) as error:
            said = str(error)
        assert "\n" not in said


def test_only_a_gguf_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"GGU")
    (tmp_path / "b").write_bytes(b"")
    assert not any(recognise(tmp_path / name) for name in ("a", "b", "c", "."))
