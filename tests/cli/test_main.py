"""The command line as its users meet it: what goes where, and one line for each mistake."""

import contextlib
import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from gptsmith import __version__
from gptsmith.cli.main import VERBS, main
from gptsmith.config.cost import parameter_count
from gptsmith.config.model import PRESETS
from gptsmith.config.recipe import read_toml, recipes
from gptsmith.machine.files import write_manifest
from tests.advice import cured, refusal
from tests.conftest import TOY, processor_seconds

TEXT = "".join(f"Line {i}: the quick brown fox jumps over {i * i} lazy dogs.\n" for i in range(60))
V = len(set(TEXT))
TINY = (
    "--tokenizer char --n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --steps 4 "
    "--batch-tokens 32 --evaluate-every 2 --threads 1 --dtype float32 --attention kernel "
    "--sample-tokens 5"
).split()
PLAN = ("Training", "Resuming", "  ", "step ")  # how lines begin that may come before an error
NOBODY = 65534
COMMAND = [sys.executable, "-m", "gptsmith"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run, and what was printed while it was trained."""
    place = tmp_path_factory.mktemp("cli")
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["train", str(place / "text.txt"), *TINY, "--out", str(place / "run")])
    assert status == 0, err.getvalue()
    (place / "stdout").write_text(out.getvalue(), encoding="utf-8")
    (place / "stderr").write_text(err.getvalue(), encoding="utf-8")
    return place


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for each test, with a text in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


@pytest.fixture
def run(finished: Path) -> str:
    """The finished run: to be looked at, not changed."""
    return str(finished / "run")


def everything(place: Path) -> dict[str, bytes | None]:
    """All files below a folder and what is in them."""
    return {
        path.relative_to(place).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(place.rglob("*"))
    }


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], here: Path) -> Callable[..., str]:
    """A command line that must be refused: status 2, one line, nothing on stdout or on disk."""

    def check(*words: str | Path, plan: bool = False) -> str:
        capsys.readouterr()
        before = everything(here)
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert status == 2, err
        assert out == ""
        *others, last = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert all(plan and line.startswith(PLAN) for line in others), err
        assert last.startswith("gptsmith: ")
        assert len(last) > 20, "an error says what to do"
        assert plain(err)
        assert everything(here) == before, "something was left behind"
        return last

    return check


@pytest.fixture
def does(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A command line that must succeed; what it prints on stdout."""

    def check(*words: str | Path) -> str:
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert status == 0, err
        assert plain(out + err)
        return out

    return check


def plain(text: str) -> bool:
    """Whether a text has no control characters but the end of a line."""
    return all(character.isprintable() or character == "\n" for character in text)


def stdin_of(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def checkpoint_of(run: str, name: str = "model", *, manifest: bool = True) -> Path:
    """A copy of a run's last checkpoint that may be damaged."""
    last = (Path(run) / "last").read_text().strip()
    shutil.copytree(Path(run) / "checkpoints" / last, name)
    if not manifest:
        (Path(name) / "manifest.json").unlink()
    return Path(name)


# -- help, and what goes where


def test_the_whole_help(does: Callable[..., str]) -> None:
    out = does("--help")
    assert all(f"  {name}" in out for name in VERBS)
    assert does("help") == does("-h") == out


def test_the_version(does: Callable[..., str]) -> None:
    assert does("--version") == f"gptsmith {__version__}\n"


@pytest.mark.parametrize("words", [[], *([verb] for verb in VERBS), ["describe", "gpt2"]])
def test_help_is_quick_and_needs_no_torch(words: list[str]) -> None:
    """Under half a second of the processor, start of Python and all; the best of three."""
    words = words if words == ["describe", "gpt2"] else [*words, "--help"]
    code = (
        "import sys; from gptsmith.cli.main import main; status = main(sys.argv[1:]); "
        "sys.exit(status or 'torch' in sys.modules)"
    )
    seconds = []
    for _ in range(3):
        started = processor_seconds()
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        seconds.append(processor_seconds() - started)
        assert done.returncode == 0, f"an error, or PyTorch was imported: {done.stderr}"
        assert "usage: gptsmith" in done.stdout or words[-1] == "gpt2"
        assert done.stderr == ""
        if seconds[-1] < 0.5:
            return
    assert min(seconds) < 0.5


ONE_STEP = "--template fixed-length --steps 1 --threads 1 --out new"  # of fine-tuning


# What takes long to import, and neither sampling nor the way to the first step of a run needs.
HEAVY = {
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.onnx"),
    *("sympy", "scipy", "pandas", "matplotlib", "pyarrow", "transformers", "huggingface_hub"),
    *("pydantic", "starlette", "uvicorn", "gguf", "onnx", "onnxruntime", "wandb"),
    *("gptsmith.convert", "gptsmith.serving"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "sample run --seed 1 --max-tokens 2 --threads 1",
        f"train text.txt {TOY} --out new",
        f"finetune run --data answers.jsonl --task chat {ONE_STEP}",
        f"finetune run --data answers.jsonl --task preference {ONE_STEP}",
    ],
)
def test_nothing_is_imported_that_is_not_needed(words: str, toys: Path) -> None:
    rows = [
        {"prompt": each, "completion": ".", "chosen": ".", "rejected": "x"}
        for each in "Line: thequckbrownfox"
    ]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = (
        "import sys\n"
        "from gptsmith.cli.main import main\n"
        "def imported(run=None):\n"
        "    print('imported', *sys.modules)\n"
        "    sys.exit()\n"
        "if sys.argv[1] != 'sample':\n"
        "    from gptsmith.training import train\n"
        "    train.follow = imported\n"  # where the first step would follow
        "status = main(sys.argv[1:])\n"
        "imported() if status == 0 else sys.exit(status)\n"
    )
    line = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    modules = {*done.stdout.partition("imported ")[2].split()}
    assert "torch" in modules
    assert not modules & HEAVY


def test_no_words_at_all_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: gptsmith" in "".join(capsys.readouterr())


def test_training_writes_plain_lines_to_stderr(finished: Path) -> None:
    """No terminal: no control characters; and nothing of it is data."""
    assert (finished / "stdout").read_text() == ""
    said = (finished / "stderr").read_text()
    assert plain(said)
    assert "validation loss" in said
    assert "gptsmith sample" in said  # what to try next
    for name in ("config.toml", "metrics.jsonl", "loss.png", "samples.md", "best", "last"):
        assert (finished / "run" / name).stat().st_size > 0, name


def test_without_out_runs_are_numbered(does: Callable[..., str]) -> None:
    does("train", "text.txt", *TINY)
    does("train", "text.txt", *TINY)
    assert sorted(path.name for path in Path("runs").iterdir()) == ["text-1", "text-2"]


def test_prepare_prints_its_folder_and_nothing_else(does: Callable[..., str]) -> None:
    assert does("prepare", "text.txt", "--tokenizer", "char", "--out", "data") == "data\n"
    info = json.loads(Path("data/dataset.json").read_text())
    assert info["train"]["tokens"] + info["validation"]["tokens"] == len(TEXT)
    assert does("prepare", "text.txt", "--tokenizer", "byte") == "data/text-byte\n"


def test_prepare_reads_standard_input(does: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stdin_of(monkeypatch, TEXT.encode())
    does("prepare", "-", "--tokenizer", "char", "--out", "piped")
    does("prepare", "text.txt", "--tokenizer", "char", "--out", "read")
    for name in ("train_000000.bin", "validation_000000.bin"):
        assert Path("piped", name).read_bytes() == Path("read", name).read_bytes()


def test_a_learned_tokenizer_serves_prepare(does: Callable[..., str]) -> None:
    assert does("tokenizer", "text.txt", "--vocab-size", "280", "--out", "bpe") == "bpe\n"
    does("prepare", "text.txt", "--tokenizer", "bpe", "--out", "data")
    assert json.loads(Path("data/dataset.json").read_text())["tokenizer"]["vocab_size"] == 280


def test_sample_writes_the_text_to_stdout(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", run, "--prompt", "the ", "--max-tokens", "6", "--seed", "1"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the ")
    assert len(out) == len("the ") + 6 + 1
    assert err == ""
    assert main(words[:-2]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("seed ")  # which makes it repeatable
    assert main([*words[:-1], err.split()[1]]) == 0
    assert capsys.readouterr().out == out


def test_sample_json(run: str, does: Callable[..., str]) -> None:
    words = ["sample", run, "--prompt", "fox", "--max-tokens", "5", "--seed", "7"]
    rows = json.loads(does(*words, "--num-samples", "3", "--json"))
    assert [row["seed"] for row in rows] == [7, 8, 9]
    assert all(row["prompt"] == "fox" and len(row["text"]) == 5 for row in rows)
    assert does(*words) == "fox" + rows[0]["text"] + "\n"


@pytest.mark.slow
def test_several_prompts_are_continued_as_each_alone(run: str, does: Callable[..., str]) -> None:
    """Among them an empty one, and one longer than the context."""
    words = ["sample", run, "--max-tokens", "12", "--seed"]
    prompts = ["fox", "", "the quick brown fox jumps", "o"]
    several = [word for prompt in prompts for word in ("--prompt", prompt)]
    alone = [does(*words, 7 + i, "--prompt", prompt) for i, prompt in enumerate(prompts)]
    assert does(*words, "7", *several) == "---\n".join(alone)
    rows = json.loads(does(*words, "7", *several, "--json", "--num-samples", "2"))
    assert [row["prompt"] for row in rows] == [prompt for prompt in prompts for _ in range(2)]
    assert [row["seed"] for row in rows] == list(range(7, 15))
    for row in rows:
        text = does(*words, row["seed"], "--prompt", row["prompt"])
        assert text == row["prompt"] + row["text"] + "\n"


def test_evaluate_agrees_with_the_run(run: str, finished: Path, does: Callable[..., str]) -> None:
    found = json.loads(does("evaluate", run, "--data", Path(run, "data"), "--json"))
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("validation_loss", 99.0) for line in lines]
    assert found["loss"] == pytest.approx(min(losses), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / 0.6931471805599453)
    whole = json.loads(does("evaluate", run, "--data", "text.txt", "--json"))
    assert whole["tokens"] == len(TEXT) - 1
    assert f"{whole['loss']:.4f}" in does("evaluate", run, "--data", "text.txt")


def test_plot_draws_several_runs(run: str, does: Callable[..., str]) -> None:
    shutil.copytree(run, "other")
    assert does("plot", run, "other", "--out", "both.png") == "both.png\n"
    assert Path("both.png").read_bytes().startswith(b"\x89PNG")


def test_describe_a_preset_a_recipe_and_a_run(run: str, does: Callable[..., str]) -> None:
    for what, config in [
        ("gpt2", PRESETS["gpt2"]),
        ("shakespeare-gpu", read_toml(recipes()["shakespeare-gpu"]).model),
        (run, read_toml(Path(run, "config.toml")).model),
    ]:
        total = parameter_count(config)
        assert f"{total:,} parameters" in does("describe", what)
        assert json.loads(does("describe", what, "--json"))["parameters"]["total"] == total


def test_describe_traces_a_run(run: str, does: Callable[..., str]) -> None:
    assert f"(2, 5, {V})" in does("describe", run, "--trace", "2x5")
    lines = json.loads(does("describe", run, "--trace", "2x5", "--json"))["trace"]
    assert lines[-1]["output"] == [2, 5, V]


@pytest.mark.parametrize("what", ["train", "generate"])
def test_bench_json(what: str, run: str, does: Callable[..., str]) -> None:
    small = "--steps 1 --rows 1 --prompt-tokens 2 --max-tokens 2 --threads 1 --json".split()
    found = json.loads(does("bench", what, run, *small))
    assert found["parameters"] == parameter_count(read_toml(Path(run, "config.toml")).model)
    assert found["threads"] == 1
    assert all(value > 0 for name, value in found.items() if "tokens_per_second" in name)


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`gptsmith describe gpt2-xl --json | head -1`"""
    with subprocess.Popen(
        [*COMMAND, "describe", "gpt2-xl", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"{\n"
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 0


@pytest.mark.system("linux", "writes to /dev/full")
def test_a_full_disk_behind_stdout_is_said() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "describe", "gpt2"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "the disk is full: free some space and try again" in done.stderr


def test_traceback_shows_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "gpt9", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("gptsmith: 'gpt9' is not a preset")


# -- words that are not understood


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian", "no command 'trian', did you mean 'train'?"),
        ("--halp", "no command '--halp'"),
        ("train", "a .toml file or data is needed"),
        ("train shakespere", "did you mean 'shakespeare'?"),
        ("train finetune-gtp2", "did you mean 'finetune-gpt2'?"),
        ("train nothing.toml", "no settings file at nothing.toml"),
        ("train text.txt --bath-tokens 3", "unknown option '--bath-tokens', did you mean '--batch"),
        ("train text.txt more.txt", "unknown word 'more.txt'"),
        ("train text.txt --n-embd", "--n-embd: expected one argument"),
        ("train --resume nowhere", "no run at nowhere"),
        ("train --resume text.txt", "no run at text.txt"),
        ("train shakespeare --resume nowhere", "leave out the recipe"),
        ("prepare", "SOURCE"),
        ("prepare text.text", "did you mean 'text.txt'?"),
        ("prepare text.txt --tokenizer gpt3", "gpt2, char, byte or a folder"),
        ("prepare text.txt --tokeniser byte", "did you mean '--tokenizer'?"),
        ("tokenizer text.txt --out t", "--vocab-size"),
        ("tokenizer text.txt --vocab-size 9 --out t", "at least 257"),
        ("tokenizer text.txt --vocab-size many --out t", "--vocab-size is 'many'"),
        ("sample", "MODEL"),
        ("sample nowhere --seed 1", "no model at nowhere"),
        ("sample text.txt --seed 1", "text.txt is a file"),
        ("evaluate nowhere", "--data"),
        ("plot", "RUN"),
        ("plot nowhere", "nowhere has no metrics.jsonl"),
        ("describe gpt2-larg", "did you mean 'gpt2-large'?"),
        ("describe shakespear", "did you mean 'shakespeare'?"),
        ("describe gpt2 --trace 2", "BxT is needed"),
        ("describe gpt2 --trace 0x4", "BxT is needed"),
        ("describe gpt2 --trace 1x9999", "9999 tokens are more than the context_length of 1024"),
        ("bench serv gpt2", "invalid choice: 'serv'"),
        ("bench train gpt9", "'gpt9' is not a preset"),
    ],
)
def test_what_is_not_understood(words: str, said: str, refused: Callable[..., str]) -> None:
    assert said in refused(*words.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--n-embd 9", "--n-embd 9 is not a multiple of n_head 2: try n_embd 10"),
        ("--n-layer 0", "--n-layer is 0"),
        ("--n-layer 2.5", "--n-layer is '2.5'"),
        ("--dropout nan", "dropout is nan"),
        ("--dropout 1", "dropout is 1.0"),
        ("--activation relu", "one of gelu_tanh, gelu_erf"),
        ("--steps -1", "steps is -1"),
        ("--steps nan", "steps is 'nan'"),
        ("--steps many", "steps is 'many'"),
        ("--learning-rate nan", "--learning-rate is nan"),
        ("--learning-rate -1", "--learning-rate is -1.0"),
        ("--learning-rate fast", "--learning-rate is 'fast'"),
        ("--batch-tokens 33", "--batch-tokens 33 is not a multiple of context_length 8: try 32"),
        ("--beta1 1", "beta1 is 1.0"),
        ("--seed -1", "seed is -1"),
        ("--schedule cosin", "did you mean 'cosine'?"),
        ("--dtype float16", "did you mean 'float32'?"),
        ("--dtype fp16", "fp16, which needs CUDA"),
        ("--device tpu", "device is 'tpu'"),
        ("--threads 0", "threads is 0"),
        ("--micro-batch 0", "--micro-batch is 0"),
        ("--keep 0", "keep is 0"),
        ("--evaluate-tokens 1", "--evaluate-tokens is 1"),
        ("--validation-fraction nan", "--validation-fraction is nan"),
        ("--shard-tokens 99999999999", "shard_tokens is 99,999,999,999"),
        ("--encoding zebra", "encoding 'zebra' is unknown"),
        ("--tokenizer gpt3", "gpt2, char, byte or a folder"),
        ("--out text.txt", "text.txt already exists"),
        ("--out .", "already exists"),
        # Shorter than one context, by one way or another.
        ("--context-length 8000 --batch-tokens 8000", "fewer than one context of 8000"),
        ("--validation-fraction 0.999", "fewer than one context of 8"),
    ],
)
def test_settings_that_no_run_can_have(flags: str, said: str, refused: Callable[..., str]) -> None:
    assert said in refused("train", "text.txt", *TINY, "--out", "new", *flags.split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--top-k 0", "--top-k is 0: at least 1"),
        (f"--top-k {V + 1}", f"--top-k is {V + 1}: at most the vocabulary, {V}"),
        ("--top-p 0", "--top-p is 0.0"),
        ("--top-p nan", "--top-p is nan"),
        ("--min-p 2", "--min-p is 2.0"),
        ("--temperature -1", "temperature is -1.0"),
        ("--temperature nan", "temperature is nan"),
        ("--repetition-penalty 0", "--repetition-penalty is 0.0"),
        ("--max-tokens -1", "--max-tokens is -1: at least 0"),
        ("--max-tokens 1.5", "--max-tokens is '1.5'"),
        ("--num-samples 0", "--num-samples is 0: at least 1"),
        ("--seed -1", "seed is -1"),
        ("--stop=", "stop string is empty"),
        ("--prompt 中", "unknown character '中' (U+4E2D) at position 0"),
        ("--prompt the中", "unknown character '中' (U+4E2D) at position 3"),
        ("--prompt the --prompt 中", "unknown character '中' (U+4E2D) at position 0"),
        ("--prompt 中 --json", "unknown character '中' (U+4E2D) at position 0"),
        ("--topk 3", "did you mean '--top-k'?"),
    ],
)
def test_what_sample_refuses(flags: str, said: str, run: str, refused: Callable[..., str]) -> None:
    assert said in refused("sample", run, *f"--max-tokens 3 --seed 1 {flags}".split())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--data nowhere", "no file, folder or built-in text 'nowhere'"),
        ("--data empty.txt", "it is empty"),
        ("--data one.txt", "a text of 1 tokens cannot be evaluated"),
        ("--data foreign.txt", "unknown character '中'"),
        ("--data latin.txt", "byte 0xe9 at position 3 is not utf-8"),
        ("--data text.txt --tokens 1", "--tokens is 1: at least 2"),
        ("--data text.txt --context-length 9", "1 to the model's 8 is needed"),
        ("--data text.txt --split validation", "--split is for prepared data"),
        ("--data bytes", "made with another tokenizer"),
    ],
)
def test_what_evaluate_refuses(flags: str, said: str, run: str, does: Any, refused: Any) -> None:
    Path("empty.txt").touch()
    Path("one.txt").write_text("a")
    Path("foreign.txt").write_text("中 " * 30, encoding="utf-8")
    Path("latin.txt").write_bytes("café ".encode("latin-1") * 30)
    does("prepare", "text.txt", "--tokenizer", "byte", "--out", "bytes")
    assert said in refused("evaluate", run, *flags.split())


# -- text that cannot be read


BAD_TEXT = [
    ("empty.txt", b"", "empty.txt: it is empty"),
    ("latin.txt", b"caf\xe9 " * 40, "latin.txt: byte 0xe9 at position 3 is not utf-8: name the"),
    ("late.txt", b"abc " * 400_000 + b"\xff", "byte 0xff at position 1600000 is not utf-8"),
    ("half.txt", b"abc " * 30 + b"\xe4\xb8", "half.txt: byte 0xe4 at position 120 is not utf-8"),
    ("bad.jsonl", b'{"text": "a"}\n{bad\n', "bad.jsonl, line 2 is not JSON"),
    ("field.jsonl", b'{"txt": "a"}\n', "has no 'text', did you mean 'txt'?"),
    ("null.jsonl", b'{"text": null}\n', "null in 'text'"),
    ("list.jsonl", b"[1]\n", "line 1 is not a JSON object"),
    ("half.jsonl", b'{"text": "\\ud800"}\n' * 30, "lone surrogate, U+D800"),
    ("bad.parquet", b"PAR1 no", "bad.parquet cannot be read as Parquet"),
]


@pytest.mark.parametrize(("name", "content", "said"), BAD_TEXT)
@pytest.mark.parametrize("verb", ["prepare", "train"])
def test_text_that_cannot_be_read(
    verb: str, name: str, content: bytes, said: str, refused: Callable[..., str]
) -> None:
    Path(name).write_bytes(content)
    flags = TINY if verb == "train" else ["--tokenizer", "char"]
    assert said in refused(verb, name, *flags, "--out", "new")


def test_the_right_encoding_reads_it(does: Callable[..., str]) -> None:
    Path("latin.txt").write_bytes("café ".encode("latin-1") * 40)
    does("prepare", "latin.txt", "--encoding", "latin-1", "--tokenizer", "char", "--out", "new")
    assert '"é"' in Path("new/tokenizer.json").read_text(encoding="utf-8")


def test_an_empty_folder_and_empty_standard_input(
    refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("nothing").mkdir()
    assert "nothing has no text files" in refused("prepare", "nothing", "--out", "new")
    stdin_of(monkeypatch, b"")
    assert "it is empty" in refused("prepare", "-", "--out", "new")


# -- data that is damaged


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def wrong_magic(path: Path) -> None:
    path.write_bytes(b"\x07" * 4 + path.read_bytes()[4:])


def wrong_version(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4] + b"\x63\0\0\0" + path.read_bytes()[8:])


def wrong_count(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:8] + b"\xff\xff\0\0" + path.read_bytes()[12:])


def no_count(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:8] + b"\0\0\0\0" + path.read_bytes()[12:])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (short, "is cut short: its header says"),
        (wrong_magic, "begins with magic number 117901063"),
        (wrong_version, "version 99"),
        (wrong_count, "is cut short: its header says 65,535 tokens"),
        (no_count, "has 0 tokens by its header"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"abc"), "a token shard begins with"),
        (lambda path: path.unlink(), "is missing, though dataset.json lists it"),
        (lambda path: (path.parent / "dataset.json").write_text("{"), "is not valid JSON"),
        (lambda path: (path.parent / "tokenizer.json").write_text("{"), "is not a tokenizer"),
    ],
)
def test_a_bad_shard(damage: Any, said: str, run: str, does: Any, refused: Any) -> None:
    does("prepare", "text.txt", "--tokenizer", "char", "--out", "data")
    damage(Path("data/train_000000.bin"))
    flags = [flag for flag in TINY if flag not in ("--tokenizer", "char")]
    assert said in refused("train", "data", *flags, "--out", "new")
    if "tokenizer" not in said:  # evaluate has the model's own
        assert said in refused("evaluate", run, "--data", "data", "--split", "train")


def test_ids_beyond_the_vocabulary(does: Any, refused: Any) -> None:
    """Published shards do not name their tokenizer; their ids are checked."""
    does("prepare", "text.txt", "--tokenizer", "gpt2", "--out", "data")
    for name in ("dataset.json", "tokenizer.json", "tokenizer_config.json"):
        Path("data", name).unlink()
    flags = [flag for flag in TINY if flag not in ("--tokenizer", "char")]
    out = ("--out", "new")
    assert "add --tokenizer" in refused("train", "data", *flags, *out)
    said = refused("train", "data", *flags, "--tokenizer", "byte", *out)
    assert "the vocabulary ends at 256" in said


# -- checkpoints that are damaged, edited or foreign


def test_a_truncated_checkpoint(run: str, refused: Callable[..., str]) -> None:
    weights = checkpoint_of(run) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:700])
    for words in (("sample", "model", "--seed", "1"), ("describe", "model")):
        assert "model.safetensors has 700 bytes, but was written with" in refused(*words)
    Path("model/manifest.json").unlink()
    for words in (("sample", "model", "--seed", "1"), ("describe", "model")):
        assert "is cut short" in refused(*words)


def test_one_bit_is_enough(run: str, refused: Callable[..., str]) -> None:
    weights = checkpoint_of(run) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    said = refused("evaluate", "model", "--data", "text.txt")
    assert "was changed since it was written" in said


def test_an_edited_config(run: str, refused: Callable[..., str]) -> None:
    path = checkpoint_of(run) / "config.json"
    path.write_text(path.read_text().replace('"n_layer": 1', '"n_layer": 2'))
    assert "config.json" in refused("sample", "model", "--seed", "1")
    write_manifest(Path("model"))  # someone who edits that too
    said = refused("sample", "model", "--seed", "1")
    assert "has 1 layers, but config.json calls for 2" in said


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"model_type": "llama"}, "model_type 'llama': only 'gpt2'"),
        ({"n_layer": "two"}, "n_layer is 'two'"),
        ({"n_head": 3}, "n_embd 8 is not a multiple of n_head 3"),
        ({"activation_function": "relu"}, "activation_function 'relu' is unknown"),
        ({"scale_attn_by_inverse_layer_idx": True}, "only False is GPT-2"),
        ({"vocab_size": 99}, f"wte.weight is ({V}, 8), but config.json calls for (99, 8)"),
        ({"n_positions": 9}, "wpe.weight is (8, 8)"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
        # What only someone who edits files by hand would write.
        ({"gptsmith": []}, "config.json"),
        ({"layer_norm_epsilon": "small"}, "norm_eps is 'small'"),
        ({"layer_norm_epsilon": None}, "norm_eps is None"),
        ({"resid_pdrop": None}, "resid_pdrop"),
        ({"n_embd": 10**12, "n_head": 1}, "config.json calls for"),
    ],
)
def test_a_foreign_config(edit: dict[str, Any], said: str, run: str, refused: Any) -> None:
    path = checkpoint_of(run, manifest=False) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    found = refused("sample", "model", "--seed", "1")
    assert "model" in found
    assert said in found


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", "[1]", "config.json contains list"),
        ("model.safetensors", None, "has no model.safetensors"),
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("manifest.json", "[]", "manifest.json contains list"),
        ("manifest.json", "{}", "lists no files"),
        ("manifest.json", '{"files": {"config.json": {}}}', "manifest.json"),
        ("manifest.json", '{"files": {"config.json": {"bytes": "x"}}}', "manifest.json"),
        ("model.safetensors", "\x02\0\0\0\0\0\0\0[]", "is not a safetensors file"),
        ("model.safetensors", '\x07\0\0\0\0\0\0\0{"a":1}', "is not a safetensors file"),
        ("model.safetensors.index.json", '{"weight_map": []}', "index.json"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 1}}', "index.json"),
    ],
)
def test_a_foreign_folder(
    name: str, content: str | None, said: str, run: str, refused: Any
) -> None:
    path = checkpoint_of(run, manifest=False) / name
    path.unlink(missing_ok=True)
    if "index" in name:
        Path("model/model.safetensors").unlink()
    if content is not None:
        path.write_text(content)
    assert said in refused("sample", "model", "--seed", "1")


def test_a_folder_with_only_a_pickle_is_not_read(run: str, refused: Callable[..., str]) -> None:
    folder = checkpoint_of(run, manifest=False)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no model.safetensors" in refused("sample", "model", "--seed", "1")


def test_a_run_without_any_whole_checkpoint(run: str, refused: Callable[..., str]) -> None:
    shutil.copytree(run, "run")
    for weights in Path("run").rglob("model.safetensors"):
        weights.write_bytes(b"")
    for words in (
        ("sample", "run", "--seed", "1"),
        ("describe", "run"),
        ("evaluate", "run", "--data", "text.txt"),
        ("train", "--resume", "run"),
    ):
        assert "run has no intact checkpoint" in refused(*words)


# -- going on with a run


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--learning-rate 1", "--learning-rate 1.0 contradicts the run, which has 0.002"),
        ("--steps 8", "steps 8 contradicts the run, which has 4"),
        ("--n-layer 2", "--n-layer 2 contradicts the run, which has 1"),
        ("--data other.txt", "data other.txt contradicts the run"),
        ("--tokenizer byte", "tokenizer byte contradicts the run, which has char"),
        ("--batch-tokens 64", "--batch-tokens 64 contradicts the run, which has 32"),
        ("--seed 4", "seed 4 contradicts the run, which has 1337"),
        ("--from model", "contradicts the run"),
        ("--encoding latin-1", "encoding latin-1 contradicts the run"),
        ("--log-every 0", "--log-every is 0"),
        ("--out other", "--resume names the run"),
        ("--dtype fp16", "fp16, which needs CUDA"),
    ],
)
def test_a_resume_that_contradicts(flags: str, said: str, run: str, refused: Any) -> None:
    shutil.copytree(run, "run")
    assert said in refused("train", "--resume", "run", *flags.split())


def test_a_resume_of_what_is_no_run(run: str, does: Any, refused: Any) -> None:
    does("prepare", "text.txt", "--tokenizer", "char", "--out", "data")
    assert "data has no config.toml" in refused("train", "--resume", "data")
    checkpoint_of(run)
    assert "model has no config.toml" in refused("train", "--resume", "model")


def test_an_existing_run_is_kept(run: str, refused: Callable[..., str]) -> None:
    shutil.copytree(run, "run")
    assert "run already exists" in refused("train", "text.txt", *TINY, "--out", "run")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--from nowhere", "no model at nowhere"),
        ("--from model --n-layer 3", "--n-layer cannot go with --from"),
        ("--from model --tokenizer byte", "--tokenizer byte is not that of"),
        ("--from text.txt", "text.txt is a file"),
        ("--from model --data foreign.txt", "unknown character '中'"),
    ],
)
def test_what_fine_tuning_refuses(flags: str, said: str, run: str, refused: Any) -> None:
    checkpoint_of(run)
    Path("foreign.txt").write_text("中 " * 30, encoding="utf-8")
    small = "--steps 2 --batch-tokens 32 --threads 1 --out new".split()
    assert said in refused("train", "text.txt", *small, *flags.split())


# -- a disk that is full, a folder that is closed


class SmallDisk:
    """A disk that can be filled but for one page (4 KB), and freed again.

    A real one where this user may mount one, else a system that says at every flush it is full.
    """

    def __init__(self, place: Path) -> None:
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
        self.place, self.patch = place, pytest.MonkeyPatch()
        self.mounted = bool(shutil.which("mount")) and not subprocess.run(mount).returncode

    def fill(self) -> None:
        if self.mounted:
            filler = self.place / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            os.truncate(filler, filler.stat().st_size - 4096)
            return

        def full(*arguments: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.patch.setattr(os, "fsync", full)
        self.patch.setattr(Figure, "savefig", full)

    def free(self) -> None:
        (self.place / "filler").unlink(missing_ok=True)
        self.patch.undo()

    def close(self) -> None:
        self.free()
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.place)], check=True)


@pytest.fixture
def small_disk(here: Path) -> Iterator[SmallDisk]:
    disk = SmallDisk(here / "disk")
    yield disk
    disk.close()


@pytest.mark.parametrize(
    "words",
    [
        "prepare text.txt --tokenizer byte --out disk/new",
        "prepare tiny.txt --tokenizer byte --out disk/new",
        "tokenizer text.txt --vocab-size 300 --out disk/new",
        "plot RUN --out disk/new.png",
        f"train text.txt {' '.join(TINY)} --out disk/new",
        "import RUN disk/new",
        "export RUN disk/new --to book --approximate",
        "quantize RUN disk/new --bits 8 --tokens 8",
    ],
)
def test_a_full_disk(words: str, run: str, small_disk: SmallDisk, refused: Any, does: Any) -> None:
    """It is said, and what is advised then works: more space, or for text another disk."""
    Path("tiny.txt").write_text(TEXT[:200])
    small_disk.fill()
    line = words.replace("RUN", run).split()
    said = refused(*line)
    assert "disk" in said
    assert "free some space" in said
    if "choose an --out on another" in said:
        does(*line[:-1], "other")
    small_disk.free()
    does(*line)


def test_a_disk_that_fills_up_during_a_run(
    run: str, small_disk: SmallDisk, does: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one line; the last good checkpoint stays, and the run goes on from it."""
    place = Path("disk/run")
    shutil.copytree(run, place)
    shutil.rmtree(place / "checkpoints/step-00000004")
    (place / "last").write_text("step-00000002\n")
    (place / "best").write_text("step-00000002\n")
    small_disk.fill()
    capsys.readouterr()
    assert main(["train", "--resume", str(place)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("gptsmith: ")
    assert "the disk is full" in last
    assert [path.name for path in (place / "checkpoints").iterdir()] == ["step-00000002"]
    small_disk.free()
    does("train", "--resume", place)
    weights = "checkpoints/step-00000004/model.safetensors"
    assert (place / weights).read_bytes() == Path(run, weights).read_bytes()
    lines = (place / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


@pytest.fixture
def closed(run: str, does: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that may be read but not written, as someone whom that stops: root becomes nobody.

    Everything is used once before, so that nothing has to be imported from a private home.
    """
    does("prepare", "text.txt", "--tokenizer", "char", "--out", "warm")
    does("tokenizer", "text.txt", "--vocab-size", "260", "--out", "bpe")
    does("plot", run, "--out", "warm.png")
    place = Path(tempfile.mkdtemp(prefix="gptsmith-closed-"))
    monkeypatch.chdir(place)
    shutil.copytree(run, "run")
    Path("text.txt").write_text(TEXT)
    Path("secret.txt").write_text(TEXT)
    for path in place.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    Path("secret.txt").chmod(0)
    place.chmod(0o555)
    before = os.geteuid()
    if before == 0:
        os.seteuid(NOBODY)
    try:
        yield place
    finally:
        os.seteuid(before)
        place.chmod(0o755)
        shutil.rmtree(place)


@pytest.mark.system("posix", "takes permissions away")
@pytest.mark.parametrize(
    "words",
    [
        "prepare text.txt --tokenizer char --out new",
        "prepare text.txt --tokenizer char",
        "prepare secret.txt --tokenizer char",
        "tokenizer text.txt --vocab-size 260 --out new",
        f"train text.txt {' '.join(TINY)} --out new",
        f"train text.txt {' '.join(TINY)}",
        "train --resume run",
        "plot run --out new.png",
    ],
)
def test_a_folder_without_write_permission(
    words: str, closed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path for path in closed.rglob("*"))
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("gptsmith: ")
    assert err.count("\n") == 1
    assert "Permission denied" in err
    assert sorted(path for path in closed.rglob("*")) == before


@pytest.mark.system("linux", "names a place in /proc")
@pytest.mark.parametrize("out", ["text.txt/new", "/proc/new"])
def test_a_folder_where_none_can_be(out: str, refused: Callable[..., str]) -> None:
    for words in (
        ("prepare", "text.txt", "--tokenizer", "char"),
        ("tokenizer", "text.txt", "--vocab-size", "260"),
        ("train", "text.txt", *TINY),
    ):
        refused(*words, "--out", out)


# -- nonsense that no list would name


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--device meta", "device is 'meta'"),
        ("--device xpu", "device is 'xpu'"),
        ("--learning-rate inf", "--learning-rate is inf"),
        ("--weight-decay inf", "--weight-decay is inf"),
        ("--norm-eps inf", "--norm-eps is inf"),
        ("--epsilon nan", "epsilon is nan: "),
        ("--seed 99999999999999999999999", "seed is 99999999999999999999999"),
        ("--n-embd 1000000000000 --n-head 1", "memory"),
        # Found before the first step, not at the first sample or evaluation.
        ("--sample-prompt 中", "unknown character '中'"),
        ("--validation-fraction 1e-9", "the validation split has 1 token, too few to evaluate"),
        ("--encoding utf-16", "text.txt"),
        ("--encoding punycode", "text.txt"),
    ],
)
def test_settings_at_the_edge(flags: str, said: str, refused: Callable[..., str]) -> None:
    assert said in refused("train", "text.txt", *TINY, "--out", "new", *flags.split(), plan=True)


def test_more_threads_than_any_machine_has(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked for so many, OpenMP starves the machine and then ends the process.
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    words = ("train", "text.txt", *TINY, "--threads", "100000", "--out", "new")
    assert "threads is 100000" in refused(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sample RUN --seed 1 --device meta", "device is 'meta'"),
        ("sample RUN --seed 1e30", "seed is 1"),
        ("sample RUN --seed 1 --num-samples 1000000000000 --max-tokens 0", "memory"),
        ("sample RUN --seed 1 --max-tokens 3 --temperature inf --threads 1", "temperature is inf"),
        (
            "sample RUN --seed 1 --max-tokens 3 --repetition-penalty inf --threads 1",
            "--repetition-penalty is inf",
        ),
        ("sample nowhere", "no model at nowhere"),  # and no seed for what is not written
        ("bench train RUN --steps 1 --rows 100000000000", "memory"),
        ("describe gpt2 --trace 1000000000x9", "memory"),
        ("tokenizer empty.txt --vocab-size 300 --out new", "it is empty"),
        ("tokenizer text.txt --vocab-size 99999999999999999999 --out new", "--vocab-size is 9999"),
        ("tokenizer half.jsonl --vocab-size 300 --out new", "half.jsonl"),
        ("plot RUN --out folder", "folder"),
        ("train missing.txt --out runs/deep/new", "missing.txt"),
        ("train empty.txt --out runs/deep/new", "it is empty"),
    ],
)
def test_nonsense(words: str, said: str, run: str, refused: Callable[..., str]) -> None:
    Path("empty.txt").touch()
    Path("half.jsonl").write_text('{"text": "\\ud800"}\n' * 3)
    Path("folder").mkdir()
    assert said in refused(*words.replace("RUN", run).split())


@pytest.mark.parametrize("temperature", ["1e-300", "1e-45", "1e300"])
def test_temperatures_at_the_edge_are_only_cold_or_hot(
    temperature: str, run: str, does: Callable[..., str]
) -> None:
    words = ["sample", run, "--prompt", "fox", "--max-tokens", "5", "--seed", "1"]
    text = does(*words, "--temperature", temperature)
    if temperature != "1e300":
        assert text == does(*words, "--temperature", "0")


def test_sample_does_not_advise_what_it_does_not_have(run: str, refused: Any, does: Any) -> None:
    said = refused("sample", run, "--seed", "1", "--prompt", "中")
    assert ("--unknown" in said) == ("--unknown" in does("sample", "--help"))


def test_what_is_advised_after_training_works(finished: Path, does: Callable[..., str]) -> None:
    """A char model may never have seen an O."""
    said = (finished / "stderr").read_text()
    advised = next(line.partition("gptsmith ")[2] for line in said.splitlines() if "write " in line)
    does(*shlex.split(advised), "--max-tokens", "3")


def test_no_gradient_clipping_is_kept(does: Callable[..., str]) -> None:
    does("train", "text.txt", *TINY, "--grad-clip", "none", "--out", "new")
    assert read_toml(Path("new/config.toml")).training.grad_clip is None


@pytest.mark.parametrize(
    "content", ["[1]\n", "{}\n", '{"step": 1, "loss": "x"}\n', "\xff\n", "{\n"]
)
def test_metrics_that_are_damaged(content: str, run: str, refused: Callable[..., str]) -> None:
    shutil.copytree(run, "run")
    Path("run/metrics.jsonl").write_bytes(content.encode("latin-1"))
    assert "metrics.jsonl" in refused("plot", "run", "--out", "new.png")


@pytest.mark.parametrize("content", ["", '{"step": 1}\n', '{"step": 1, "loss": null}\n'])
def test_a_run_that_learned_nothing_plots_nothing(content: str, run: str, refused: Any) -> None:
    shutil.copytree(run, "run")
    Path("run/metrics.jsonl").write_text(content)
    assert "nothing to plot" in refused("plot", "run", "--out", "new.png")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"a": 1}\n'),
        ("training/state.json", '{"step": "x"}'),
        ("training/state.json", '{"step": 4, "best": []}'),
        ("training/state.json", '{"step": 4, "micro_batch": "x"}'),
    ],
)
def test_a_resume_of_edited_records(name: str, content: str, run: str, refused: Any) -> None:
    shutil.copytree(run, "run")
    path = Path("run", name)
    if name.startswith("training"):
        for checkpoint in Path("run/checkpoints").iterdir():
            (checkpoint / "manifest.json").unlink()
            (checkpoint / name).write_text(content)
    else:
        path.write_text(content)
    assert Path(name).name in refused("train", "--resume", "run", plan=True)


def test_samples_with_a_preface_resume(run: str, does: Callable[..., str]) -> None:
    """samples.md is a text that a person may write into."""
    shutil.copytree(run, "run")
    Path("run/samples.md").write_text(
        "My own notes.\n\n## step x\n\n" + Path("run/samples.md").read_text()
    )
    does("train", "--resume", "run")
    assert Path("run/samples.md").read_text().startswith("My own notes.")


def test_what_cannot_be_resumed_is_not_recorded(run: str, refused: Callable[..., str]) -> None:
    shutil.copytree(run, "run")
    assert "device is 'meta'" in refused("train", "--resume", "run", "--device", "meta")


def test_an_edited_size_is_not_described_as_true(run: str, refused: Callable[..., str]) -> None:
    path = checkpoint_of(run, manifest=False) / "config.json"
    path.write_text(path.read_text().replace('"n_positions": 8', '"n_positions": 9'))
    assert "wpe.weight is (8, 8)" in refused("describe", "model")


def test_a_model_of_far_more_layers_than_it_has_is_refused_at_once(run: str, refused: Any) -> None:
    path = checkpoint_of(run, manifest=False) / "config.json"
    path.write_text(path.read_text().replace('"n_layer": 1', '"n_layer": 2000'))
    started = processor_seconds()
    refused("sample", "model", "--seed", "1")
    assert processor_seconds() - started < 1.0


def test_advised_commands_quote_their_paths(
    does: Any, refused: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are done as they are printed, with a folder that a shell would take apart."""
    place = "my $HOME; texts"
    assert main(["prepare", "text.txt", "--tokenizer", "char", "--out", place]) == 0
    advised = capsys.readouterr().err.partition("train with: gptsmith ")[2]
    does(*shlex.split(advised), *TINY[2:])
    assert main(["tokenizer", "text.txt", "--vocab-size", "260", "--out", f"{place} bpe"]) == 0
    flag = capsys.readouterr().err.partition("use them with: ")[2]
    does("prepare", "text.txt", *shlex.split(flag), "--out", "again")
    does("train", "text.txt", *TINY, "--out", f"{place} run")
    said = refused("train", "text.txt", *TINY, "--out", f"{place} run")
    assert f"`gptsmith train --resume '{place} run'`" in said
    Path("pickled, old").mkdir()
    Path("pickled, old/config.json").write_text('{"model_type": "gpt2"}')
    Path("pickled, old/pytorch_model.bin").write_bytes(b"")
    assert "`gptsmith import 'pickled, old' OUT`" in refused("describe", "pickled, old")


# -- what is advised


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("descibe run", "did you mean 'describe'?"),
        ("describe gpt2-larg", "did you mean 'gpt2-large'?"),
        ("sample run --topk 3 --seed 1 --max-tokens 2", "did you mean '--top-k'?"),
        ("sample run --top-k 9999 --seed 1 --max-tokens 2", "at most the vocabulary, "),
        (
            "sample run --draft text --json --num-samples 2 --seed 1 --max-tokens 2",
            "leave out --",
        ),
        ("prepare text.text --out OUT", "did you mean 'text.txt'?"),
    ],
)
def test_what_is_advised_works(
    words: str, message: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cured(words.split(), message, capsys)


@pytest.mark.parametrize(
    ("words", "message", "cure"),
    [
        ("train text.txt --resume run --out other", "leave out the recipe, the data and --out",
         "train --resume run"),
        ("describe run --trace 2", "as 2x4 for 2 rows of 4 tokens", "describe run --trace 2x4"),
        ("sample run --draft text --prompt fox --prompt dogs --seed 1", "give one --prompt",
         "sample run --draft text --prompt fox --seed 1 --max-tokens 2"),
        ("sample run --draft bytes --seed 1", "use a model with the same tokenizer",
         "sample run --draft run --seed 1 --max-tokens 2"),
        ("sample run --seed 1 --stop= --max-tokens 2", "leave it out",
         "sample run --seed 1 --max-tokens 2"),
        ("bench generate run --max-tokens 100 --rows 1", "lower --max-tokens",
         "bench generate run --max-tokens 2 --rows 1 --rounds 1"),
        ("bench generate run --optimizer muon", "use it with 'bench train'",
         "bench train run --optimizer muon --rows 1 --steps 1 --threads 1"),
        ("bench train run --rounds 2", "use it with 'bench generate'",
         "bench generate run --rounds 2 --rows 1 --max-tokens 2"),
        ("bench train run --rows 1,2", "give one of each", "bench train run --rows 1 --steps 1"),
        ("describe run --trace 1000000000x8", "use a smaller model, batch or request",
         "describe run --trace 1x8"),
        ("sample mute --seed 1", "which generating text needs: add one",
         "sample loud --seed 1 --max-tokens 2"),
        ("train text.txt --no", "(see gptsmith train --help)", "train --help"),
        ("evaluate run --data prepared", "prepare the text again with the model's tokenizer",
         "evaluate run --data again"),
        ("train text.txt TOY --out run", "`gptsmith train --resume run`", "train --resume run"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_what_is_advised_in_words_works(
    words: str,
    message: str,
    cure: str,
    toys: Path,
    does: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where the advice is not a value that can be read from the message."""
    last = next(Path("run/checkpoints").iterdir())
    if "bytes" in words:
        does("train", "text.txt", *TOY.replace("char", "byte").split(), "--out", "bytes")
    if "mute" in words:
        for name in ("mute", "loud"):
            shutil.copytree(last, name)
            Path(name, "manifest.json").unlink()
        Path("mute/tokenizer.json").unlink()
    if "prepared" in words:
        does("prepare", "text.txt", "--tokenizer", "byte", "--out", "prepared")
        does("prepare", "text.txt", "--tokenizer", "run", "--out", "again")
    assert message in refusal(words.replace("TOY", TOY).split(), capsys)
    does(*cure.split())


@pytest.mark.slow
def test_what_moved_is_where_the_message_says(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(main.__code__.co_filename).parents[2]
    for words in ("bench serve MODEL", "bench generate m --clients 3", "bench train m --profile"):
        program = refusal(words.split(), capsys).partition("run python ")[2].split()[0]
        line = [sys.executable, str(root / program), "--help"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout


@pytest.mark.slow
def test_the_first_run_that_the_help_advises_works(here: Path, does: Callable[..., str]) -> None:
    advised = does("--help").rpartition("A first run:  gptsmith ")[2].split()
    assert len(advised) == 2
    does(*advised, *TOY.split(), "--evaluate-tokens", "99", "--out", "first")
    assert Path("first/last").read_text() == "step-00000001\n"


@pytest.mark.slow
def test_everything_that_is_advised_after_training_works(
    toys: Path, does: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "text.txt", *TOY.split(), "--out", "new"]) == 0
    lines = capsys.readouterr().err.partition("Try\n")[2].splitlines()
    assert len(lines) == 4
    for line in lines:
        line = line.replace("OTHER", "run").replace("TEXT", "dogs")
        words = shlex.split(line.partition("gptsmith ")[2])
        does(*words, *(["--max-tokens", "2"] if words[0] == "sample" else []))


def test_every_extra_that_is_advised_exists() -> None:
    """`pip install 'gptsmith[X]'`, with the package that was missing."""
    package = Path(main.__code__.co_filename).parents[1]
    texts = [path.read_text(encoding="utf-8") for path in package.rglob("*.py")]
    advised = {extra for text in texts for extra in re.findall(r"gptsmith\\?\[(\w+)\]", text)}
    settings = tomllib.loads(
        (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    )
    extras = settings["project"]["optional-dependencies"]
    needed = {
        "fp8": {"torchao"},
        "gguf": {"gguf"},
        "hub": {"huggingface_hub"},
        "onnx": {"onnx", "onnxruntime"},
        "parquet": {"pyarrow"},
        "ray": {"ray"},
        "serve": {"fastapi", "uvicorn"},
        "tensorboard": {"tensorboard"},
        "wandb": {"wandb"},
    }
    assert advised == {*needed}
    for extra, packages in needed.items():
        names = {re.split(r"[\[<>=!~ ;]", line)[0].replace("-", "_") for line in extras[extra]}
        assert packages <= names, extra
