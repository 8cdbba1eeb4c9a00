"""Models carried between formats: the report, the refusals, and nothing left behind."""

import json
import pickle
import shutil
import string
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import gptsmith
from gptsmith import GPT, GPTConfig
from gptsmith.checkpoint.header import safetensors_header
from gptsmith.checkpoint.names import GPT2, match_tensors
from gptsmith.checkpoint.safetensors import fetch_from
from gptsmith.checkpoint.tensors import Stored
from gptsmith.cli.main import main
from gptsmith.convert import export_model, import_model
from gptsmith.convert.formats import FORMATS, READABLE, WRITABLE, module_of
from gptsmith.convert.pickles import load_torch_file
from gptsmith.convert.proof import logits
from gptsmith.machine.files import DamagedError
from gptsmith.tokenizers import byte_tokenizer, char_tokenizer, gpt2_tokenizer
from gptsmith.tokenizers.pickled import load_plain_pickle
from tests.advice import cured, refusal
from tests.checkpoint.test_saved import their_gpt2
from tests.conftest import TINY, scrambled

TEXT = "To be, or not to be: that is the question.\n"
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "nanogpt": {"bias": False, "activation": "gelu_erf"},
    "book": {"qkv_bias": False, "tie_weights": False},
    "odd": {"bias": False, "qkv_bias": True, "n_inner": 20, "norm_eps": 1e-3},
}


def tokens_of(config: GPTConfig) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(config.vocab_size, (2, 7), generator=generator)


def state(model: GPT) -> dict[str, list]:
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


@pytest.fixture
def model() -> GPT:
    return scrambled(GPTConfig(**TINY))


@pytest.fixture
def folder(model: GPT, tmp_path: Path) -> Path:
    gptsmith.save(model, char_tokenizer(string.printable[:37]), tmp_path / "model")
    return tmp_path / "model"


# -- Hugging Face folders, as others write them


def as_safetensors(model: transformers.GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder)


def as_shards(model: transformers.GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def as_pickle(model: transformers.GPT2LMHeadModel, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def as_old_pickle(model: transformers.GPT2LMHeadModel, folder: Path) -> None:
    """As GPT-2 was first published: no prefix, causal masks, and no zip archive."""
    model.config.save_pretrained(folder)
    bare = {name.removeprefix("transformer."): t for name, t in model.state_dict().items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 11, 11) for layer in range(2)}
    bare |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    if model.config.tie_word_embeddings:
        del bare["lm_head.weight"]
    path = folder / "pytorch_model.bin"
    torch.save(bare, path, _use_new_zipfile_serialization=False)


def as_pickled_shards(model: transformers.GPT2LMHeadModel, folder: Path) -> None:
    model.config.save_pretrained(folder)
    tensors = list(model.state_dict().items())
    place = {}
    for number, part in enumerate((tensors[:9], tensors[9:]), start=1):
        torch.save(dict(part), folder / f"pytorch_model-{number}.bin")
        place |= {name: f"pytorch_model-{number}.bin" for name, _ in part}
    index = {"metadata": {}, "weight_map": place}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


WAYS = (as_safetensors, as_shards, as_pickle, as_old_pickle, as_pickled_shards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_hugging_face_folder(
    way: Callable, tie: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = their_gpt2(tie=tie).to(dtype)
    (tmp_path / "source").mkdir()
    way(reference, tmp_path / "source")
    report = import_model(tmp_path / "source", tmp_path / "out")
    names = {torch.float32: "float32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    assert report.dtype == names[dtype]
    assert report.difference == 0
    assert report.original.startswith("largest difference to the original, run by transformers")
    model, tokenizer = gptsmith.load(tmp_path / "out")
    assert tokenizer is None
    tokens = tokens_of(model.config)
    expected = reference.float()(tokens).logits
    assert (model(tokens).logits - expected).abs().max() < 1e-4
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    read, _ = gptsmith.convert.read(tmp_path / "source")
    assert state(read) == state(model)


def test_shards_of_our_own_are_read_by_transformers(
    folder: Path, tmp_path: Path, said: Callable
) -> None:
    export_model(folder, tmp_path / "out", to="huggingface", shard_bytes=4000, dtype="bf16")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert all(
        sum(tensor.nbytes for tensor in load_file(tmp_path / "out" / name).values()) <= 4000
        for name in files
    )
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert read.dtype == torch.bfloat16
    again, tokenizer = gptsmith.load(tmp_path / "out")
    assert tokenizer is not None
    tokens = tokens_of(again.config)
    assert (read.float()(tokens).logits - again(tokens).logits).abs().max() < 1e-4
    assert said() == []


@pytest.mark.slow
def test_gpt2s_vocabulary_files_become_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer()
    config = GPTConfig(**(TINY | {"vocab_size": 50257}))
    gptsmith.save(scrambled(config), None, tmp_path / "model")
    (tmp_path / "model" / "vocab.json").write_text(json.dumps(tokenizer.vocab))
    merges = [" ".join(pair) for pair in tokenizer.spec["model"]["merges"]]
    (tmp_path / "model" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    import_model(tmp_path / "model", tmp_path / "out")
    _, read = gptsmith.load(tmp_path / "out")
    assert read is not None
    assert read.fingerprint == tokenizer.fingerprint


# -- the report


def test_the_report_names_every_tensor(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reference = their_gpt2()
    (tmp_path / "source").mkdir()
    as_old_pickle(reference, tmp_path / "source")
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    for words in (
        "Hugging Face folder",
        "parameters: 2 layers, 3 heads, 12 channels, context 11, vocabulary 37",
        "2 h.*.attn.c_attn.weight",
        "a causal mask, not a weight: 2 h.*.attn.bias",
        "the tied head, which is wte.weight: lm_head.weight",
        "run by transformers",
        str(tmp_path / "a"),
    ):
        assert words in said, words
    assert max(map(len, said.splitlines()[1:])) <= 100 + len(str(tmp_path))
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "b"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    names = {f"h.1.attn.{name}" for name in ("bias", "masked_bias")}
    assert names <= report["ignored"].keys()
    assert report["missing"].keys() == {"lm_head.weight"}
    bare = {name.removeprefix("transformer.") for name in reference.state_dict()}
    assert report["read"].keys() == bare - {"lm_head.weight"}
    assert report["parameters"] == sum(p.numel() for p in reference.parameters())
    size = sum(path.stat().st_size for path in (tmp_path / "b").iterdir())
    assert report["target"]["bytes"] == size - (tmp_path / "b" / "manifest.json").stat().st_size


def test_what_a_format_cannot_say_is_refused_or_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["export", str(folder), str(tmp_path / "out"), "--to", "nanogpt"]
    assert main(words) == 2
    assert "cannot express activation gelu_tanh (it has gelu_erf)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--approximate", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["lost"] == ["activation gelu_tanh (it has gelu_erf)"]
    ours, _ = gptsmith.load(folder)
    near, _ = gptsmith.convert.read(tmp_path / "out")
    assert near.config.activation == "gelu_erf"
    tokens = tokens_of(ours.config)
    difference = float((ours(tokens).logits - near(tokens).logits).detach().abs().max())
    assert 0 < difference < 10 * report["largest_logit_difference"] < 1


@pytest.mark.parametrize("form", FORMS)
def test_logits_layer_by_layer_are_the_models(form: str) -> None:
    model = scrambled(GPTConfig(**(TINY | FORMS[form])))
    asked = []

    def fetch(name: str) -> Tensor:
        asked.append(name)
        return model.state_dict()[name]

    tokens = tokens_of(model.config)
    stored = Stored(config=model.config, fetch=fetch, tokenizer=None)
    assert torch.equal(logits(stored, tokens), model(tokens).logits)
    tied = {"lm_head.weight"} if model.config.tie_weights else set()
    assert set(asked) == model.state_dict().keys() - tied


def test_the_original_is_run_where_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 it takes twice the bytes of a source in half precision."""
    monkeypatch.setattr(sys.modules["gptsmith.convert.carry"], "MEMORY_TO_SPARE", 0)
    found = {torch.float32: "run by transformers", torch.float16: "too much memory"}
    for dtype, words in found.items():
        folder = tmp_path / str(dtype)
        as_safetensors(their_gpt2().to(dtype), folder)
        assert words in import_model(folder, tmp_path / f"out {dtype}").original


# -- padding


@pytest.mark.slow
@pytest.mark.parametrize("rows", [50257, 50304, 50260, 50368, 50200])
def test_padding_is_never_visible_outside(
    rows: int, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = scrambled(GPTConfig(**(TINY | {"vocab_size": rows, "n_embd": 6, "n_layer": 1})))
    gptsmith.save(model, None, tmp_path / "padded")
    words = ["import", str(tmp_path / "padded"), str(tmp_path / "out"), "--tokenizer", "gpt2"]
    status = main(words)
    said = capsys.readouterr()
    if rows not in (50257, 50304):
        assert status == 2
        assert f"the tokenizer has 50,257 tokens, but the embedding {rows:,} rows" in said.err
        assert not (tmp_path / "out").exists()
        return
    assert status == 0
    assert ("47 rows beyond the vocabulary, left out" in said.out) == (rows == 50304)
    read, tokenizer = gptsmith.load(tmp_path / "out")
    assert tokenizer is not None
    assert read.config.vocab_size == 50257
    tokens = tokens_of(read.config)
    assert torch.equal(read(tokens).logits, model(tokens).logits[..., :50257])


# -- what is refused


def refused(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a command line is refused with."""
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("gptsmith: ")
    return said.err


def test_mistakes_get_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("to be")
    many = {
        "import llama out": "model_type 'llama': only 'gpt2' and 'nanochat' are understood",
        "import empty out": "empty is none of these: Hugging Face folder",
        "import notes.txt out": "notes.txt is none of these",
        "import model/model.safetensors out": "is a part of model, a Hugging Face folder: import",
        "import modle out": "nothing at modle, did you mean 'model'?",
        "import model out --from gguff": "no format 'gguff' can be read",
        "import model out --from book": "holds 0 files of weights",
        "import model notes.txt": "notes.txt already exists",
        "import model out --dtype int9": "dtype is 'int9': one of float32",
        "import model out --dtype q8_0": "--dtype is 'q8_0': one of float32, fp16, bf16 is needed",
        "import model out --tokenizer byte": "the tokenizer has 257 tokens, but the embedding 37",
        "import model out --tokenizer nowhere": "no tokenizer 'nowhere'",
        "export model out": "required: --to",
        "export model out --to nanogtp": "no format 'nanogtp' can be written, did you mean",
        "export model empty/out --to llmc --shard-size 1GB": "cannot be written in shards",
        "export model out --to huggingface --shard-size big": "a size such as 500MB or 5GB",
        "export model out --to llmc --dtype fp16": "fp16 cannot be written, only float32, bf16",
        "export nowhere out --to llmc": "no model at nowhere",
    }
    for words, message in many.items():
        assert message in refused(words.split(), capsys), words
        assert not (tmp_path / "out").exists(), words
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("empty", "llama", "model", "notes.txt")
    ]


@pytest.mark.parametrize(
    ("name", "end", "problem"),
    [("model.safetensors", b"~", "was changed since it was written"),
     ("tokenizer.json", b"", "is not valid JSON")],
)  # fmt: skip
def test_a_damaged_folder_of_our_own_is_refused_by_name(
    name: str,
    end: bytes,
    problem: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-1] + end)
    said = refused(["import", str(folder), str(tmp_path / "out")], capsys)
    assert f"{folder / name} {problem}" in said
    assert not (tmp_path / "out").exists()


def test_pickled_folders_say_how_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "m").mkdir()
    as_pickle(their_gpt2(), tmp_path / "m")
    assert "gptsmith import" in refused(["sample", str(tmp_path / "m")], capsys)


def test_a_tied_head_that_is_another_tensor_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    reference = their_gpt2()
    (tmp_path / "m").mkdir()
    reference.config.save_pretrained(tmp_path / "m")
    tensors = reference.state_dict() | {"lm_head.weight": torch.ones(37, 12)}
    torch.save(tensors, tmp_path / "m" / "pytorch_model.bin")
    said = refused(["import", str(tmp_path / "m"), str(tmp_path / "out")], capsys)
    assert "the head should be tied to the embedding, but differs from it" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("transformer.ln_f.bias"), "lacks 1 tensors of a GPT-2, ln_f.bias"),
        (lambda t: t.update(more=torch.ones(2)), "has 1 tensors no GPT-2 has, more"),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.ones(5, 12)}),
            r"wpe.weight is \(5, 12\), but config.json calls for \(11, 12\)",
        ),
        (lambda t: t.update({"transformer.h.1.ln_1.bias": 3}), "is a int, where a plain tensor"),
        (
            lambda t: [t.pop(name) for name in list(t) if ".h.1." in name],
            "has 1 layers, but config.json calls for 2",
        ),
    ],
)
def test_every_tensor_is_explained(change: Callable, message: str, tmp_path: Path) -> None:
    reference = their_gpt2()
    reference.config.save_pretrained(tmp_path)
    tensors = dict(reference.state_dict())
    change(tensors)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_match_explains_everything() -> None:
    config = GPTConfig(**TINY)
    shapes = {"wte.weight": (37, 12), "h.0.x": (1,), "h.1.x": (1,)}
    with pytest.raises(ValueError, match=r"lacks 2[0-9] tensors"):
        match_tensors(GPT2, config, shapes, source="here")


# -- nothing runs, nothing is half-written


class Evil:
    """Touches a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_no_pickle_runs_anything(zipped: bool, tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    bomb = {"model": {"transformer.wte.weight": Evil(touched)}, "model_args": {}}
    torch.save(bomb, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"could run code: it needs .*open; save the state_dict"):
        gptsmith.convert.read(tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": Evil(touched)}))
    with pytest.raises(ValueError, match=r"it needs (io|_io).open"):
        load_plain_pickle(tmp_path / "meta.pkl")
    assert not touched.exists()


def test_truncated_and_altered_pickles_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.arange(100.0)}, path)
    whole = path.read_bytes()
    for end in range(4, len(whole), 97):
        path.write_bytes(whole[:end])
        with pytest.raises(DamagedError, match=r"is not an intact file of torch.save"):
            load_torch_file(path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(where=st.integers(0, 1200), value=st.binary(min_size=1, max_size=4))
def test_garbled_files_raise_only_what_is_expected(
    where: int, value: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbled.pt"
    torch.save({"a": torch.arange(30.0), "b": {"c": torch.ones(2, 3)}}, path)
    whole = bytearray(path.read_bytes())
    whole[where : where + len(value)] = value
    path.write_bytes(whole)
    try:
        gptsmith.convert.read(path)
    except (ValueError, OSError):
        pass
    else:
        pytest.fail("a file that is no model was read as one")


def test_what_lies_beside_a_file_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"PK nonsense")
    (tmp_path / "notes.txt").write_text("to be")
    with pytest.raises(ValueError, match=r"notes\.txt is none of these"):
        gptsmith.convert.read(tmp_path / "notes.txt")


def test_an_archive_that_is_no_model_is_not_taken_for_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "book.zip", "w") as archive:
        archive.writestr("chapter.txt", "to be")
    with pytest.raises(ValueError, match="is none of these"):
        gptsmith.convert.read(tmp_path / "book.zip")


# Exports to each format where no file may grow beyond 20 kB, which ends all writing halfway.
FULL = """
import resource, signal, sys
from gptsmith.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for to in sys.argv[1:]:
    source = "erf" if to == "nanogpt" else "tanh"
    assert main(["export", source, f"out-{to}", "--to", to]) == 2, to
"""


@pytest.mark.system("posix", "limits the size of files")
@pytest.mark.slow
def test_a_disk_that_takes_no_more_leaves_nothing(tmp_path: Path) -> None:
    for source in ("erf", "tanh"):
        config = GPTConfig(
            **(TINY | {"vocab_size": 257, "n_embd": 24, "activation": f"gelu_{source}"})
        )
        gptsmith.save(scrambled(config), byte_tokenizer(), tmp_path / source)
    command = [sys.executable, "-c", FULL, *WRITABLE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == len(WRITABLE), said
    assert all(line.startswith("gptsmith: ") for line in said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["erf", "tanh"]


# Imports in children that are killed at one flush after another, with half of that file written.
KILLED = """
import os, signal, sys
import transformers.models.gpt2.modeling_gpt2  # by one process rather than by each
from gptsmith.cli.main import main
flush, left = os.fsync, 0
def deadly(file):
    global left
    left -= 1
    if left == 0:
        if os.fstat(file).st_size and not os.path.isdir(f"/proc/self/fd/{file}"):
            os.truncate(f"/proc/self/fd/{file}", os.fstat(file).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    flush(file)
os.fsync = deadly
for left in range(1, 100):
    if os.fork() == 0:
        os._exit(main(["import", *sys.argv[1:], f"out{left}"]))
    status = os.waitstatus_to_exitcode(os.wait()[1])
    if status != -signal.SIGKILL:
        sys.exit(status or print(left))
"""


@pytest.mark.system("linux", "cuts files by their names in /proc")
@pytest.mark.slow
def test_killed_halfway_it_leaves_no_model(model: GPT, tmp_path: Path) -> None:
    gptsmith.save(model, None, tmp_path / "model")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "model")]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    times = int(done.stdout.splitlines()[-1])
    assert times > 4
    for number in range(1, times):
        out = tmp_path / f"out{number}"
        assert not out.exists() or (out / "manifest.json").exists()
        shutil.rmtree(out, ignore_errors=True)
        assert main(["import", str(tmp_path / "model"), str(out)]) == 0
        assert not (tmp_path / f".out{number}.partial").exists()
        assert state(gptsmith.load(out)[0]) == state(model)


def test_the_table_names_what_can_be_done(capsys: pytest.CaptureFixture) -> None:
    assert {"huggingface", "nanogpt", "book", "llmc"} <= set(READABLE) & set(WRITABLE)
    for name, format in FORMATS.items():
        verbs = {
            **dict.fromkeys(("recognise", "read"), format.readable),
            **dict.fromkeys(("nearest", "write"), format.writable),
            "run": bool(format.runner),
        }
        found = {verb: hasattr(module_of(name), verb) for verb in verbs}
        assert found == verbs, name
    for command, names in (("import", READABLE), ("export", WRITABLE)):
        assert main([command, "--help"]) == 0
        assert ", ".join(names) in " ".join(capsys.readouterr().out.split())


PLAIN = """
from pathlib import Path

import torch

from ..checkpoint.names import OURS
from ..checkpoint.tensors import stored_state, to_theirs
from ..config.model import GPTConfig
from .pickles import load_torch_file


def recognise(path):
    return path.suffix == ".plain"


def read(path):
    config, state = load_torch_file(path)
    return stored_state(OURS, GPTConfig(**config), state, source=path)


def nearest(config):
    return config


def write(stored, out, dtype):
    entries = to_theirs(OURS, stored.config, stored.fetch, dtype)
    torch.save((vars(stored.config), {entry.name: entry.tensor() for entry in entries}), out)
"""


@pytest.mark.slow
def test_another_format_is_a_file_and_a_row_of_the_table(folder: Path, tmp_path: Path) -> None:
    package = Path(gptsmith.__file__).parent
    shutil.copytree(package, tmp_path / "copy" / "gptsmith")
    convert = tmp_path / "copy" / "gptsmith" / "convert"
    (convert / "plain.py").write_text(PLAIN)
    text, start = (convert / "formats.py").read_text(), "FORMATS = {\n"
    row = '    "plain": Format("plain file", is_file=True),\n'
    assert start in text
    (convert / "formats.py").write_text(text.replace(start, start + row))

    def run(*words: object) -> str:
        command = [sys.executable, "-m", "gptsmith", *map(str, words)]
        place = {"cwd": tmp_path / "copy", "env": {"PYTHONPATH": str(tmp_path / "copy")}}
        done = subprocess.run(command, capture_output=True, text=True, check=True, **place)
        return done.stdout

    assert "plain, huggingface" in run("import", "--help")
    assert "plain, huggingface" in run("export", "--help")
    assert "largest difference to those before: 0" in run(
        *("export", folder, tmp_path / "m.plain", "--to", "plain")
    )
    assert "m.plain: plain file" in run("import", tmp_path / "m.plain", tmp_path / "again")
    assert state(gptsmith.load(tmp_path / "again")[0]) == state(gptsmith.load(folder)[0])


def test_safetensors_are_read_one_at_a_time(folder: Path) -> None:
    found = safetensors_header(folder / "model.safetensors")
    get, whole = fetch_from(found), load_file(folder / "model.safetensors")
    shapes = {name: tensor.shape for name, tensor in found.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assert all(torch.equal(get(name), tensor) for name, tensor in whole.items())


def test_every_tokenizer_stays_itself(tmp_path: Path) -> None:
    for kind, tokenizer in (("byte", byte_tokenizer()), ("char", char_tokenizer(TEXT))):
        config = GPTConfig(**(TINY | {"vocab_size": tokenizer.vocab_size}))
        gptsmith.save(scrambled(config), tokenizer, tmp_path / kind)
        report = import_model(tmp_path / kind, tmp_path / f"{kind}-again")
        assert report.tokenizer == f"{kind}, {tokenizer.vocab_size:,} tokens"
        _, again = gptsmith.load(tmp_path / f"{kind}-again")
        assert again is not None
        assert again.fingerprint == tokenizer.fingerprint


# -- what is advised


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("import rum OUT", "did you mean 'run'?"),
        ("import model OUT --tokenizer gpt2", "name the right tokenizer with --tokenizer, or none"),
        ("export run OUT --to llmc", "--approximate writes the nearest model"),
        ("import small OUT", "`gptsmith export small OUT --to huggingface`"),
    ],
)
def test_what_is_advised_works(
    words: str, message: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(next(Path("run/checkpoints").iterdir()), "model")
    if "small" in words:
        assert main("quantize run small --bits 8 --tokens 8".split()) == 0
    cured(words.split(), message, capsys)


@pytest.mark.parametrize(
    ("words", "message", "cure"),
    [
        ("import model/model.safetensors OUT", "import the folder", "import model OUT"),
        ("import text.txt OUT", "--from FORMAT says why", ""),
        ("import two OUT --from book", "name the one to read", "import two/one.pth OUT"),
        ("import code.pth OUT", "save the state_dict alone", "import two/one.pth OUT"),
        ("export model OUT --to llmc --approximate --shard-size 1GB", "leave that out",
         "export model OUT --to llmc --approximate"),
        ("import model OUT --tokenizer char", "name the folder that contains it",
         "import model OUT --tokenizer run"),
        ("export model OUT --to onnx --dtype bf16", "bf16 cannot be written, only float32, fp16",
         "export model OUT --to onnx --dtype fp16"),
        ("export mute OUT --to gguf --approximate", "add its tokenizer.json to the folder first",
         "export loud OUT --to gguf --approximate"),
    ],
)  # fmt: skip
def test_what_is_advised_in_words_works(
    words: str, message: str, cure: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the advice is not a value that can be read from the message."""
    for name in ("model", "mute", "loud"):
        shutil.copytree(next(Path("run/checkpoints").iterdir()), name)
    for name in ("manifest.json", "tokenizer.json"):
        Path("mute", name).unlink()
    book = GPTConfig(**TINY, qkv_bias=False, tie_weights=False)
    gptsmith.save(scrambled(book), None, "of the book")
    export_model("of the book", Path("two"), to="book")
    next(Path("two").glob("*.pth")).rename("two/one.pth")
    if "two" in words:
        shutil.copy("two/one.pth", "two/other.pth")
    torch.save(torch.nn.Linear(2, 2), "code.pth")  # a whole module, which needs its class
    assert message in refusal(words.replace("OUT", "out").split(), capsys)
    if cure:
        assert main(cure.replace("OUT", "out").split()) == 0, capsys.readouterr().err
        return
    for name in READABLE:
        said = refusal([*words.replace("OUT", "out").split(), "--from", name], capsys)
        assert "text.txt" in said
        assert "none of these" not in said


def test_a_run_is_imported_from_its_best_checkpoint(toys: Path) -> None:
    assert main("import run out".split()) == 0
    (checkpoint,) = Path("run/checkpoints").iterdir()
    one, other = (load_file(folder / "model.safetensors") for folder in (checkpoint, Path("out")))
    assert all(torch.equal(one[name], other[name]) for name in one)
