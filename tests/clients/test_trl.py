"""TRL, which learns from preferences too: the same loss, rewards and gradient of a step."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import gptsmith
from gptsmith import GPTConfig
from gptsmith.model.preference import answer_logprobs, preference
from tests.checkpoint.test_saved import KINDS
from tests.conftest import TINY, scrambled
from tests.versions import ask

pytestmark = pytest.mark.clients
CLIENTS = Path(sys.prefix) / "clients" / "trl"  # `make clients` installs trl.txt there
PAIRS = [
    {"prompt": "Two and two?\n", "chosen": "Four.", "rejected": "It is five, I am told."},
    {"prompt": "Hello", "chosen": ", good day to you!", "rejected": " yourself"},
    {"prompt": "The opposite of late is", "chosen": " early", "rejected": " tea"},
]
STEP = """
import json, sys
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
pairs, beta, reference = json.loads(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
model, other = map(AutoModelForCausalLM.from_pretrained, ("model", reference))
disable_progress_bars()
settings = DPOConfig("run", beta=beta, bf16=False, use_cpu=True, report_to=[], max_length=None,
    activation_checkpointing=False, per_device_train_batch_size=len(pairs), disable_tqdm=True)
trainer = DPOTrainer(model, other, args=settings, train_dataset=Dataset.from_list(pairs),
    processing_class=AutoTokenizer.from_pretrained("model"))
batch = trainer.data_collator(list(trainer.train_dataset))
loss = trainer.compute_loss(trainer.model.train(), batch)
loss.backward()
told = {name: values[0] for name, values in trainer._metrics["train"].items()}
for parameter in model.parameters():
    parameter.data = parameter.grad
model.save_pretrained("gradient")
print(json.dumps({"loss": loss.item(), "told": told, "ids": batch["input_ids"].tolist(),
    "answer": batch["completion_mask"].tolist()}))
"""


@pytest.mark.parametrize("reference", ["model", "other"])
def test_a_step_is_that_of_its_trainer(reference: str, tmp_path: Path) -> None:
    assert CLIENTS.is_dir(), "the client is missing: `make clients` installs it"
    tokenizer = KINDS["gpt2"]()
    config = GPTConfig(
        **(TINY | {"vocab_size": tokenizer.vocab_size, "context_length": 64, "norm_eps": 1e-5})
    )
    models = {"model": scrambled(config), "other": scrambled(config, seed=1)}
    for name, model in models.items():
        gptsmith.save(model, tokenizer, tmp_path / name)
    old = ["`is_gradient_checkpointing` is deprecated", "warnings.warn("]  # what it still calls
    words = json.dumps(PAIRS), "0.3", reference
    (line,) = ask("5", tmp_path, STEP, *words, beside=[CLIENTS], expected=old)
    theirs = json.loads(line)
    # Its rows are all chosen answers, then all rejected ones; targets are the tokens that follow.
    both = torch.tensor([theirs["ids"], theirs["answer"]])
    ids, answer = both.unflatten(1, (2, len(PAIRS))).transpose(1, 2)
    tokens, targets = ids[..., :-1], ids[..., 1:].masked_fill(answer[..., 1:] == 0, -1)
    with torch.no_grad():
        known = answer_logprobs(models[reference], tokens, targets)
    model = models["model"].train()
    ours = preference(model, tokens, targets, known, 0.3)
    assert ours.loss.item() == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours.margins.mean().item() == pytest.approx(theirs["told"]["rewards/margins"], abs=1e-4)
    assert ours.accuracy.item() == pytest.approx(theirs["told"]["rewards/accuracies"])
    if reference == "model":
        assert ours.loss.item() == pytest.approx(math.log(2), abs=1e-6)
    ours.loss.backward()
    gradients = dict(gptsmith.load(tmp_path / "gradient")[0].named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name].detach(), rtol=1e-3, atol=1e-5)
