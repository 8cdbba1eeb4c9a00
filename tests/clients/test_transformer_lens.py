"""TransformerLens, which finds heads too: its scores of each head, on the same text."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gptsmith
from gptsmith import GPTConfig
from gptsmith.inspection import pattern_scores, record
from tests.checkpoint.test_saved import KINDS
from tests.conftest import TINY, scrambled
from tests.versions import ask

pytestmark = pytest.mark.clients
CLIENTS = Path(sys.prefix) / "clients" / "transformer-lens"  # `make clients` installs it there
DETECT = """
import json, sys, torch
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge
bridge = TransformerBridge.boot_transformers("model", dtype=torch.float32)
scores = {kind: detect_head(bridge, sys.argv[1], kind + "_head", error_measure="mul").tolist()
    for kind in ("previous_token", "duplicate_token", "induction")}
print(json.dumps({"ids": bridge.to_tokens(sys.argv[1]).tolist(), **scores}))
"""


@pytest.mark.parametrize("kind", ["byte", "gpt2"])
def test_heads_have_its_scores(kind: str, tmp_path: Path) -> None:
    assert CLIENTS.is_dir(), "the client is missing: `make clients` installs it"
    tokenizer = KINDS[kind]()
    sizes = TINY | {"vocab_size": tokenizer.vocab_size, "context_length": 64, "norm_eps": 1e-5}
    model = scrambled(GPTConfig(**sizes))
    gptsmith.save(model, tokenizer, tmp_path / "model")
    text = " one two three, one two three; aab"
    (line,) = ask("5", tmp_path, DETECT, text, beside=[CLIENTS], expected=["Loading weights"])
    theirs = json.loads(line)
    tokens = torch.tensor(theirs["ids"])
    ours = pattern_scores(record(model, tokens).weights, tokens)
    for name, key in (("previous", "previous_token"), ("duplicate", "duplicate_token")):
        np.testing.assert_allclose(ours[name], theirs[key], atol=1e-4)
    np.testing.assert_allclose(ours["induction"], theirs["induction"], atol=1e-4)
    assert min(scores.max() for scores in ours.values()) > 0.02
