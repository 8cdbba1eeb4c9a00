"""What can be held of the Dockerfile without a container engine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptsmith import GPTConfig, save
from gptsmith.cli.main import find_verb
from gptsmith.config.settings import ServingSettings
from gptsmith.tokenizers import byte_tokenizer
from tests.cli.test_serve import answering
from tests.conftest import TINY, scrambled

ROOT = Path(__file__).parents[1]
LINES = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()


def said(instruction: str) -> list[str]:
    """What stands after an instruction, wherever it is."""
    return [line.partition(" ")[2] for line in LINES if line.startswith(instruction + " ")]


def test_what_is_copied_is_there_and_sent_to_the_engine() -> None:
    copied = {word for line in said("COPY") if "--from" not in line for word in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


def test_it_serves_the_folder_that_is_mounted_as_nobody_in_particular() -> None:
    assert json.loads(*said("ENTRYPOINT")) == ["gptsmith"]
    verb, *words = json.loads(*said("CMD"))
    options = find_verb(verb)[1].parse(words)
    assert (options.model, options.host) == ("/model", "0.0.0.0")
    assert said("EXPOSE") == [str(ServingSettings().port)]
    assert said("USER")[-1].isdecimal()  # Kubernetes asks for a number, to be sure that it is not 0
    assert said("USER")[-1] != "0"


@pytest.mark.slow
def test_the_health_check_tells_whether_the_server_answers(tmp_path: Path) -> None:
    (line,) = said("HEALTHCHECK")
    words = json.loads(line.partition(" CMD ")[2])
    assert words[0] == "python"

    def check(port: int) -> int:
        code, replaced = re.subn(r"\b8000\b", str(port), words[2])
        assert replaced == 1
        command = [sys.executable, words[1], code]
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode

    save(scrambled(GPTConfig(**TINY | {"vocab_size": 257})), byte_tokenizer(), tmp_path / "model")
    with answering(tmp_path / "model", "--port", "0") as (_, client):
        assert client.base_url.port is not None
        port = client.base_url.port
        assert check(port) == 0
    assert check(port) != 0
