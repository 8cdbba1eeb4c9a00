"""No verb but serve reaches for the network: Python itself reports each attempt, in any process."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import gptsmith
from gptsmith.cli.main import VERBS
from tests.cli.test_main import TEXT, TINY

SMALL = shlex.join(TINY)
FAST = "--threads 1 --dtype float32 --attention kernel --compile no"
FRESH = f"--n-layer 1 --n-embd 8 --n-head 2 {FAST}"
# What each verb is asked; the model comes from train, and the rest from the line before.
LINES = {
    "prepare": ["text.txt --tokenizer char --out data"],
    "tokenizer": ["text.txt --vocab-size 260 --out bpe"],
    "train": [f"text.txt {SMALL} --out run", "--resume run"],
    "finetune": [
        f"run --data text.txt --task text --lora 2 --steps 1 --batch-tokens 16 {FAST} --out tuned",
        f"fresh --data labels.jsonl --steps 1 {FRESH} --out labels",
        f"fresh --data messages.jsonl --steps 1 --batch-rows 8 {FRESH} --out talking",
    ],
    "sample": ["run --prompt Line --max-tokens 3"],
    "chat": ["talking --max-tokens 3"],
    "classify": ["labels --text one"],
    "evaluate": ["run --data text.txt"],
    "sweep": [f"text.txt {SMALL} --set seed=1,2 --out sweep"],
    "plot": ["run"],
    "compare": ["sweep"],
    "inspect": ["run --prompt Line"],
    "describe": ["run", "gpt2"],
    "import": ["nanogpt.pt imported"],
    "export": [
        "run nanogpt.pt --to nanogpt",
        "run model.gguf --to gguf --approximate",
        "run onnx --to onnx",
    ],
    "merge": ["tuned merged"],
    "quantize": ["run quantized --bits 8 --data text.txt"],
    "bench": ["generate run --rows 1 --max-tokens 2 --rounds 1"],
    "completion": ["bash"],
    "doctor": [""],
}
ROLES = ("user", "assistant")
# Python runs this at every start.
WATCH = """
import sys
EVENTS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto",
    "socket.gethostbyaddr", "urllib.Request"}
def watch(event, arguments):
    if event in EVENTS and not str(arguments[-1]).startswith("/"):
        with open(PLACE, "a") as file:
            file.write(f"{event} {arguments} by {sys.argv}\\n")
        raise OSError("there is no network")
sys.addaudithook(watch)
"""
DRIVER = """
import io, json, sys
from gptsmith.cli.main import main
from gptsmith.machine import rates
rates.SECONDS, rates.SIZE, rates.COPIED = 0, {"cpu": 64}, {"cpu": 1000}
failed = []
for words in json.load(sys.stdin):
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"Hello\\n"))
    if main(words):
        failed.append(words)
sys.exit(f"failed: {failed}" if failed else 0)
"""


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """Write rows of JSON."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_no_verb_but_serve_reaches_for_the_network(tmp_path: Path) -> None:
    assert LINES.keys() == VERBS.keys() - {"serve"}
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    texts = [f"text {number}" for number in range(60)]
    messages = ([{"role": role, "content": text} for role in ROLES] for text in texts)
    write_rows(tmp_path / "messages.jsonl", ({"messages": each} for each in messages))
    labels = ({"text": text, "label": "even odd".split()[len(text) % 2]} for text in texts)
    write_rows(tmp_path / "labels.jsonl", labels)
    attempts = tmp_path / "attempts"
    watching = tmp_path / "watching"
    watching.mkdir()
    (watching / "sitecustomize.py").write_text(f"PLACE = {str(attempts)!r}\n{WATCH}")
    verbs = [verb for verb in VERBS if verb not in ("serve", "import")] + ["import"]
    lines = [[verb, *shlex.split(line)] for verb in verbs for line in LINES[verb]]
    tree = Path(gptsmith.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{watching}:{tree}"},
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not attempts.exists(), attempts.read_text()


def test_an_attempt_would_be_noticed(tmp_path: Path) -> None:
    """Also one whose failure is caught, as a library may do that asks for news of itself."""
    (tmp_path / "sitecustomize.py").write_text(f"PLACE = {str(tmp_path / 'attempts')!r}\n{WATCH}")
    asks = (
        "import contextlib, urllib.request\n"
        "with contextlib.suppress(OSError): urllib.request.urlopen('http://localhost:1')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", asks], env=environment, check=True)
    assert "urllib.Request" in (tmp_path / "attempts").read_text()
