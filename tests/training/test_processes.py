"""The number of processes is not part of the result, whatever is divided among them."""

import shutil
from pathlib import Path

import pytest
import torch

from gptsmith.cli.main import main
from tests.conftest import Together
from tests.training.test_run import TINY, assert_same_learning, events, here, weights

__all__ = ["here"]  # each test in a folder of its own, with a text

MUON = ["--optimizer", "muon", "--n-layer", "3", "--fused", "yes", "--batch-tokens", "40"]
# Muon multiplies singular values that are almost zero, as rounding errors are, by 3.4445^5, or 485.
# In eight steps at a rate of 0.02, relative errors of 1e-6 in gradients move weights by 8e-5; other
# micro-batches in one process move them by 2e-5.
MUONS_ROUNDING = 8e-5


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_processes_that_share_muons_matrices_learn_what_one_does(in_processes: Together) -> None:
    """Three matrices of each shape, which neither two nor four processes can share evenly; with
    dropout, and with activations that are recomputed in one of the runs."""
    words = ["text.txt", *TINY, *MUON, "--micro-batch", "1", "--steps", "8"]
    assert main(["train", *words, "--out", "one"]) == 0
    for processes, more in ((2, []), (4, ["--recompute", "yes"])):
        out = f"in-{processes}"
        in_processes(processes, "train", *words, *more, "--out", out)
        assert_same_learning(Path("one"), Path(out), rounding=MUONS_ROUNDING)
    expected = weights(Path("in-4"), 8)
    shutil.rmtree("in-4/checkpoints/step-00000008")  # as if killed after step 4
    in_processes(4, "train", "--resume", "in-4")
    assert all(torch.equal(t, expected[name]) for name, t in weights(Path("in-4"), 8).items())
    resumed = events(Path("in-4"))[-1]
    assert (resumed["event"], resumed["step"]) == ("resumed", 4)
