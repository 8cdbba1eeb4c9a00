"""Sharded training: the same run as in one process, and less memory in each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith.cli.main import main
from gptsmith.config.cost import parameter_count
from gptsmith.config.fields import SettingError
from gptsmith.config.model import GPTConfig
from gptsmith.config.recipe import read_toml
from gptsmith.config.settings import MachineSettings
from gptsmith.training import memory
from gptsmith.training.memory import choose_sharding
from tests.conftest import Together
from tests.training.test_loop import make_trainer, masked_batch
from tests.training.test_run import (
    TINY,
    assert_same_learning,
    assert_same_losses,
    events,
    here,
    records,
)

__all__ = ["here"]  # each test in a folder of its own, with a text

# Rows that no number of processes divides; norms of which the last of four processes has nothing;
# 7 rows of 8 tokens, so that of two or three processes, one makes a pass more than another.
SIZES = ["--n-embd", "6", "--n-layer", "2", "--batch-tokens", "56", "--steps", "20"]
MUON = ["--optimizer", "muon", "--n-embd", "10"]
CPU = torch.device("cpu")
# Trains as `gptsmith` does, and tells how many bytes of weights and state each process has.
MEASURED = """
import json, os, sys
from gptsmith.cli.main import main
from gptsmith.training import train
follow = train.follow

def measured(run):
    follow(run)
    weights = run.trainer.parameters
    state = [t for o in run.trainer.optimizers for s in o.state.values() for t in s.values()]
    held = [sum(t.to_local().nbytes for t in each if t.dim()) for each in (weights, state)]
    with open(f"held.{os.environ['RANK']}", "w") as file:
        json.dump(held, file)

train.follow = measured
sys.exit(main(sys.argv[1:]))
"""


def alone(*words: str, out: str) -> Path:
    """A run in one process, by the C++ that multiplies Muon's matrices in float32."""
    assert main(["train", "text.txt", *fresh("--fused", "yes", *words), "--out", out]) == 0
    return Path(out)


def fresh(*words: str) -> list[str]:
    kernel = TINY.index("--attention")
    return [*TINY[:kernel], *TINY[kernel + 2 :], *SIZES, "--micro-batch", "2", *words]


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_sharded_it_is_the_same_run_with_less_in_each_process(in_processes: Together) -> None:
    """With dropout. Four processes begin, three go on, then one, which is not sharded."""
    whole = alone(out="whole")
    first = ["text.txt", *fresh("--recompute", "yes"), "--shard", "yes", "--out", "four"]
    in_processes(4, "train", *first, "--stop-after", "6", code=MEASURED)
    held = [json.loads(Path(f"held.{n}").read_text()) for n in range(4)]
    bytes_in_all = 4 * parameter_count(read_toml(Path("four/config.toml")).model)
    assert sum(weights for weights, _ in held) == bytes_in_all
    assert sum(state for _, state in held) == 2 * bytes_in_all
    for weights, state in held:
        assert weights <= 1.2 * bytes_in_all / 4
        assert state == 2 * weights
    in_processes(3, "train", "--resume", "four", "--stop-after", "13")
    assert main(["train", "--resume", "four"]) == 0
    assert_same_learning(whole, Path("four"), 20)
    starts = [event for event in events(Path("four")) if "processes" in event]
    assert [(event["step"], event["processes"], event["sharded"]) for event in starts] == [
        (0, 4, True),
        (6, 3, True),
        (13, 1, False),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_muon_orthogonalizes_whole_matrices(in_processes: Together) -> None:
    """Begun whole, gone on with sharded, and the other way around, where PyTorch multiplies the
    whole matrices; questions are asked as well."""
    Path("q.jsonl").write_text(
        "".join(f'{{"prompt": "line {n}", "completion": ": the"}}\n' for n in range(5))
    )
    words = [*MUON, "--evaluate-tasks", "q.jsonl", "--sample-tokens", "0"]
    whole = alone(*words, out="whole")
    three = [*fresh(*words), "--shard", "yes", "--stop-after", "9", "--out", "three"]
    in_processes(3, "train", "text.txt", *three)
    assert main(["train", "--resume", "three", "--shard", "no", "--fused", "no"]) == 0
    assert_same_losses(whole, Path("three"))
    begun = alone(*words, "--stop-after", "9", out="begun")
    in_processes(2, "train", "--resume", "begun", "--shard", "yes")
    assert_same_losses(whole, begun)
    assert events(begun)[-1]["changes"] == {"shard": "yes", "fused": "no"}
    answers = [[r.get("q_accuracy") for r in records(run)] for run in (whole, Path("three"), begun)]
    assert answers[0] == answers[1] == answers[2]
    assert any(answer is not None for answer in answers[0])


# -- the choice


def sharding_of(machine: MachineSettings, chosen: Any = None, **more: Any) -> Any:
    return choose_sharding(machine, GPTConfig(n_layer=2, n_embd=768), CPU, chosen, **more)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "world_size", lambda: 2)


@pytest.mark.usefixtures("two")
def test_auto_shards_only_what_does_not_fit_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPTConfig(n_layer=2, n_embd=768)
    machine = MachineSettings(dtype="float32")
    least = memory.needed_memory(replace(machine, recompute="yes"), config, 1)
    for room, shards in ((least, False), (least - 1, True)):
        monkeypatch.setattr(memory, "memory_room", lambda device, room=room: room)
        found = sharding_of(machine)
        assert found.on is shards
        assert ("more than" in found.reason) is shards
        assert sharding_of(replace(machine, shard="no")).on is False
        assert sharding_of(replace(machine, shard="yes")).on is True
    sharded = memory.needed_memory(replace(machine, recompute="yes", shard="yes"), config, 1)
    assert sharded < least
    # What it cannot go with, it does without.
    monkeypatch.setattr(memory, "memory_room", lambda device: 0)
    for other in (replace(machine, compile="yes"), replace(machine, fused="yes")):
        assert "it cannot go with" in sharding_of(other).reason
        assert sharding_of(other, chosen={}).on  # they were chosen for other processes


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"compile": "yes"}, "compile yes"),
        ({"compile": "max-autotune"}, "compile max-autotune"),
        ({"fused": "yes"}, "fused yes"),
        ({"dtype": "fp16"}, "dtype fp16"),
        ({"dtype": "fp8"}, "dtype fp8"),
    ],
)
def test_what_cannot_go_with_sharding_is_refused(more: dict[str, Any], what: str) -> None:
    line = f"shard is yes, which cannot go with {what}: leave out one of both"
    with pytest.raises(SettingError, match=line):
        sharding_of(MachineSettings(shard="yes", **more))


@pytest.mark.usefixtures("two")
def test_a_model_that_learns_in_part_is_not_sharded() -> None:
    with pytest.raises(SettingError, match="cannot go with weights that do not learn, as with --l"):
        sharding_of(MachineSettings(shard="yes"), frozen=True)
    assert not sharding_of(MachineSettings(), frozen=True).on


def test_one_process_has_nobody_to_share_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "text.txt", *TINY, "--shard", "yes", "--out", "run"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "gptsmith: --shard is yes, but there is one process: start several with torchrun, or take "
        "auto"
    )
    assert not Path("run").exists()
    assert not sharding_of(MachineSettings(shard="yes"), chosen={}).on  # of a run that is resumed


def test_out_of_memory_ends_a_sharded_run_with_advice() -> None:
    """Nothing can be repeated, as the others have added their gradients."""
    trainer = make_trainer(4)
    trainer.sharded = True

    def too_much(*batch: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError

    trainer.loss = too_much
    with pytest.raises(ValueError, match="micro-batches of 4 rows: give a smaller --micro-batch"):
        trainer.gradient_in_memory(*masked_batch())
