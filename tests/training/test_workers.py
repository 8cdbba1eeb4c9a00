"""A run in several processes ends as it would have, whatever becomes of its workers on the way."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gptsmith.machine.processes import name_of_start
from tests.conftest import until

pytestmark = pytest.mark.system("posix", "kills and stops processes by signals")

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("KILLS", "6"))  # `make kills` has 40


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `killing_workers.py` tells: it has `torchrun`'s agents start all in one program."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.killing_workers", str(KILLS), "1"],
        cwd=tmp_path_factory.mktemp("workers"),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=550 + 30 * KILLS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def assert_same_learning(one: dict[str, Any], other: dict[str, Any], told: object) -> None:
    """The same losses, each step once, and nothing left half written."""
    assert other["steps"] == one["steps"] == list(range(1, 13)), told
    for name in ("losses", "validation"):
        assert other[name] == pytest.approx(one[name], abs=1e-6), told
    assert (other["checkpoint"], other["best"]) == (one["checkpoint"], one["best"]), told
    assert (other["samples"], other["left"]) == (one["samples"], []), told


@pytest.mark.slow
@pytest.mark.timeout(600 + 30 * KILLS)
def test_killed_workers_come_back_and_end_with_the_same_run(found: dict[str, Any]) -> None:
    """Between steps and in the middle of one, in sums, evaluations and saves; one or all, or one
    that stops; fresh and resumed, with and without --out, on one machine and, as far as the agents
    know, on several. Dropout is on. With the same number of processes, even the bits are the same.
    """
    assert len(found["killed"]) == KILLS
    for run in found["killed"]:
        assert run["statuses"][-run["machines"] :] == [0] * run["machines"], run["kills"]
        assert_same_learning(found["one"], run, run["kills"])
        whole = found["whole"][str(run["processes"])]
        assert (run["weights"], run["optimizer"]) == (whole["weights"], whole["optimizer"])
        assert run["folders"] == 1, run["kills"]
    victims = {run["kills"][0][-1] for run in found["killed"]}
    assert {"0", "1", "all", "agent", "hang"} <= victims


@pytest.mark.slow
def test_out_of_memory_in_one_process_all_begin_the_gradient_again(found: dict[str, Any]) -> None:
    assert found["memory"]["statuses"] == [0]
    assert_same_learning(found["one"], found["memory"], "memory")
    events = [json.loads(line) for line in found["memory"]["events"].splitlines()]
    assert [event["event"] for event in events] == ["started", "micro_batch"]
    assert (events[1]["before"], events[1]["after"]) == (2, 1)


@pytest.mark.slow
def test_a_sharded_run_goes_on_from_its_last_checkpoint(found: dict[str, Any]) -> None:
    """One worker is killed in a step, the first one in a save; the shards of both are lost."""
    assert found["sharded"]["statuses"] == [0]
    assert_same_learning(found["one"], found["sharded"], "sharded")
    events = [json.loads(line) for line in found["sharded"]["events"].splitlines()]
    assert sum(event["event"] == "resumed" for event in events) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("setting", "--n-embd 9 is not a multiple of n_head 2: try n_embd 10"),
        ("batch", "fewer than the 2 processes"),
        ("folder", "one already exists: give --out another name"),
        ("lock", "one is being trained by another process"),
        ("alone", "something is wrong here alone"),
    ],
)
def test_a_mistake_ends_all_processes_with_one_line(
    what: str, line: str, found: dict[str, Any]
) -> None:
    refused = found["refused"][what]
    errors = [said for said in refused["said"] if said.startswith("gptsmith: ")]
    assert len(errors) == 1, refused["said"]
    assert line in errors[0]
    assert not [said for said in refused["said"] if "Traceback" in said or "ERROR" in said]
    assert set(refused["statuses"]) == {2}


def test_started_again_all_agree_on_a_name_that_is_new() -> None:
    """The others find the name of the start before, as `torchrun` keeps its store."""
    store, wait = dist.HashStore(), timedelta(seconds=60)
    with ThreadPoolExecutor(3) as pool:

        def begin(rank: int) -> Any:
            return pool.submit(name_of_start, store, rank, 3, wait)

        first = [begin(rank) for rank in (0, 1, 2)]
        (old,) = {each.result() for each in first}
        answers = [f"gptsmith/{old}/{rank}" for rank in (1, 2)]
        before = [store.get(answer) for answer in answers]
        others = [begin(rank) for rank in (1, 2)]
        for answer, given in zip(answers, before, strict=True):
            until(lambda answer=answer, given=given: store.get(answer) != given)
        (new,) = {each.result() for each in [begin(0), *others]}
    assert new != old
