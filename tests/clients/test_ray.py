"""Ray, on whose clusters a text can be prepared: what dies is started again, to the same bytes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import gptsmith
from tests.data.test_prepare import files, words
from tests.serving.test_rude_command import free_port

pytestmark = pytest.mark.clients
CLIENTS = Path(sys.prefix) / "clients" / "ray"  # `make clients` installs it there
START = ["start", "--head", "--block", "--num-cpus=2", "--include-dashboard=false"]
START += ["--node-ip-address=127.0.0.1"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a cluster with two workers, and the process that started it."""
    assert CLIENTS.is_dir(), "Ray is missing: `make clients` installs it"
    port, log = free_port(), tmp_path.with_name(f"{tmp_path.name}.log")
    command = [sys.executable, "-m", "ray.scripts.scripts", *START, f"--port={port}"]
    with log.open("w") as file:
        process = psutil.Popen(command, env=environment(), stdout=file, stderr=file)
    try:
        while "To terminate the Ray runtime" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}", process
    finally:
        running = process.children(recursive=True) if process.poll() is None else []
        everything = [*running, process]
        for each in everything:
            each.kill()
        psutil.wait_procs(everything, 30)


def environment() -> dict[str, str]:
    """The variables of a process that finds Ray, whose clusters report their use by default."""
    tree = Path(gptsmith.__file__).parents[1]
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    return {**os.environ, "PYTHONPATH": f"{tree}:{CLIENTS}", **ray}


def prepare(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Start `gptsmith prepare` of the rows in a folder."""
    command = [sys.executable, "-m", "gptsmith", "prepare", "rows.jsonl", *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=environment(), text=True, **pipes)


def test_a_part_whose_worker_is_killed_is_made_again(
    cluster: tuple[str, psutil.Process], tmp_path: Path
) -> None:
    address, ray = cluster
    text = " ".join(words(seed, 5000) for seed in range(20))
    rows = (json.dumps({"text": text[i : i + 4000]}) for i in range(0, len(text), 150))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    running, killed = prepare(tmp_path, "--out", "joined", "--ray", address), 0
    while running.poll() is None and not killed:
        for worker in ray.children(recursive=True):
            begun = list(tmp_path.glob("joined.parts/.*.partial"))
            if begun and "make_part" in " ".join(worker.cmdline()):
                worker.kill()
                killed = worker.pid
                break
        time.sleep(0.01)
    assert killed, running.communicate()
    _, error = running.communicate()
    assert (running.returncode, "Traceback" in error) == (0, False), error
    whole = prepare(tmp_path, "--out", "whole")
    whole.communicate()
    assert whole.returncode == 0
    assert files(tmp_path / "joined") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["joined", "rows.jsonl", "whole"]


def test_what_is_wrong_is_one_line(cluster: tuple[str, psutil.Process], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n')
    for flags, said in {
        ("--ray", cluster[0], "--field", "body"): "line 1 has no 'body'",
        ("--ray", "127.0.0.1:1"): "--ray is 127.0.0.1:1, where no Ray cluster answers",
        ("--ray", cluster[0], "--join"): "--ray cannot go with --join",
        ("--ray", cluster[0], "--part", "1/2"): "--part cannot go with --ray",
    }.items():
        running = prepare(tmp_path, *flags)
        _, error = running.communicate()
        assert running.returncode == 2
        assert said in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob("data/*"))
