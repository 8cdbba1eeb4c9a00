"""A model that copies has induction heads, and they stand on the layer before them.

As for `sorting_model`, figures were measured and then written down, for `copying_model`.
"""

from pathlib import Path

import pytest
import torch

import gptsmith
from gptsmith import GPT
from gptsmith.inspection import inspect, pattern_scores, record, repeated_tokens
from gptsmith.inspection.recording import hooks

LETTERS = 14
TOKENS = repeated_tokens(26, LETTERS, rows=200, seed=5)


@pytest.fixture(scope="module")
def model() -> GPT:
    return gptsmith.load(Path(__file__).parent / "copying_model")[0]


def copied(model: GPT) -> float:
    """The share of letters that are predicted, of those that can be."""
    with torch.no_grad():
        said = model(TOKENS).logits[:, LETTERS:-1].argmax(-1)
    return (said == TOKENS[:, LETTERS + 1 :]).float().mean().item()


def test_two_heads_of_layer_1_are_named_induction(model: GPT) -> None:
    assert copied(model) > 0.99
    found = inspect(model, TOKENS[0].tolist())
    assert found.names[0] == [""] * 4
    assert found.names[1][:2] == ["induction", "induction"]
    scores = found.scores["induction"]
    assert scores[0].max() < 0.1
    assert scores[1] == pytest.approx([0.25, 0.29, 0.01, 0.23], abs=0.01)


def test_induction_needs_the_attention_of_layer_0(model: GPT) -> None:
    """Which tells each place its previous letter: without it, nothing is found in layer 1."""
    own = record(model, TOKENS)
    before = pattern_scores(own.weights, TOKENS)["induction"][1]
    mean = own.attn[0].mean(0)  # (T, C), whatever the letters are
    with hooks() as hook:
        hook(model.h[0].attn, output=lambda module, inputs, output: mean.expand_as(output))
        assert copied(model) < 0.2
        after = pattern_scores(record(model, TOKENS).weights, TOKENS)["induction"][1]
    assert before.max() > 0.25
    assert after.max() < 0.07  # evenly spread attention has 0.02
