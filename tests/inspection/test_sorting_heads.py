"""What the heads of a model that sorts do, over all of its 729 inputs.

What is found here was first measured and then written down: it holds for the weights in
`sorting_model`, and tells whether attention, patches and places are what the room says they are.

    Layer 0 looks at the letters that are still to be written. At the first output place, head 0
    gives 0.79 of its attention to the smallest letter, of which the input has 0.38; where the
    letter changes, 0.51 to the next one (uniform attention: 0.25) and 0.19 to the last one.
    Its attention carries the input to the places that answer, all of it: there the MLPs compute
    the letter. Attention of layer 1 is idle: its mean in its place leaves all 729 right.
"""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import gptsmith
from gptsmith import GPT
from gptsmith.inspection.patching import Patching, complete, patch
from gptsmith.inspection.recording import Recording, hooks, record

INPUTS = torch.tensor([*product(range(3), repeat=6)])  # (729, 6)
SORTED = INPUTS.sort(1).values
TOKENS = torch.cat((INPUTS, SORTED[:, :-1]), dim=1)  # (729, 11)
FIRST = 5  # the place after which the answer begins


@pytest.fixture(scope="module")
def model() -> GPT:
    return gptsmith.load(Path(__file__).parent / "sorting_model")[0]


@pytest.fixture(scope="module")
def recording(model: GPT) -> Recording:
    return record(model, TOKENS)


def right(model: GPT) -> int:
    """How many of the 729 inputs a model sorts."""
    with torch.no_grad():
        given = model(TOKENS).logits[:, FIRST:].argmax(-1)
    return int((given == SORTED).all(1).sum())


def share_on(letters: Tensor, weights: Tensor) -> Tensor:
    """The share of attention that output places give to one letter each, where the input has it.

    (729, 6), (..., 11, 11) of each input in the second axis -> (L, H, 729, 6)
    """
    holds = TOKENS.unsqueeze(1) == letters.unsqueeze(2)  # (729, 6, 11)
    holds[..., INPUTS.shape[1] :] = False
    return (weights[..., FIRST:, :] * holds.unsqueeze(1)).sum(-1).transpose(1, 2)


def test_it_sorts_every_input(model: GPT) -> None:
    assert right(model) == len(INPUTS) == 729
    once = gptsmith.generate_greedy(model, INPUTS[[400]], 6)
    assert once[0, 6:].tolist() == sorted(INPUTS[400].tolist())


def test_a_head_of_layer_0_looks_at_the_letter_that_comes_next(recording: Recording) -> None:
    uniform = torch.ones(11, 11).tril() / torch.arange(1, 12).unsqueeze(1)
    even = share_on(SORTED, uniform.expand(1, len(INPUTS), 1, 11, 11))[0, 0]
    following = share_on(SORTED, recording.weights)  # (L, H, 729, 6)
    first = following[..., 0].mean(-1)  # (L, H)
    assert first[0, 0] == pytest.approx(0.79, abs=0.01)
    assert first.flatten().topk(2).values[1] < 0.47, "another head does it too"
    assert even[:, 0].mean() == pytest.approx(0.38, abs=0.01)

    written = TOKENS[:, FIRST:]  # by the place itself, from the second on
    changes = written != SORTED
    changes[:, 0] = False
    assert changes.sum() == 1266
    assert following[0, 0][changes].mean() == pytest.approx(0.51, abs=0.01)
    assert even[changes].mean() == pytest.approx(0.25, abs=0.01)
    assert share_on(written, recording.weights)[0, 0][changes].mean() < 0.2


def test_only_the_attention_of_layer_0_is_needed(model: GPT, recording: Recording) -> None:
    left = []
    for layer, block in enumerate(model.h):
        mean = recording.attn[layer].mean(0)  # (T, C), the same whatever the input
        with hooks() as hook:
            hook(block.attn, output=lambda module, inputs, output, mean=mean: mean + 0 * output)
            left.append(right(model))
    assert left[0] < 100
    assert left[1] == 729


@pytest.mark.parametrize("place", range(FIRST))
def test_a_changed_letter_lives_at_its_place_and_then_where_the_answer_is_read(
    model: GPT, place: int
) -> None:
    clean = [1, 2, 2, 1, 2, 1]
    clean[place] = 0  # the only A: it comes first, and without it B does
    corrupt = [*clean]
    corrupt[place] = 2
    *_, found = patch(model, clean, corrupt, complete(model, clean, corrupt))
    assert isinstance(found, Patching)
    assert found.clean > 10
    assert found.corrupt < -10
    wanted = np.zeros((3, 6))  # before layer 0, before layer 1, after layer 1
    wanted[0, place] = wanted[1:, FIRST] = 1
    np.testing.assert_allclose(found.stream, wanted, atol=0.02)
    np.testing.assert_allclose(found.attn, [wanted[1], np.zeros(6)], atol=0.03)
    assert found.heads[0].argmax() == 0
    assert found.heads[0, 0] > 0.9
    assert abs(found.heads[1]).max() < 0.03
