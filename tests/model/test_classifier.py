"""The classifier against transformers, in every case of padding, and its gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.config.classifier import ClassifierConfig
from gptsmith.config.cost import components, multiplied_parameters, parameter_count
from gptsmith.config.model import PRESETS
from gptsmith.machine.native import open_library
from gptsmith.model.classifier import Classifier
from gptsmith.model.fused import SOURCE, fuse

from ..conftest import TINY, some_tokens

PAD = 7
LABELS = ("dog", "cat", "bird", "eel")
CONFIG = ClassifierConfig.of(GPTConfig(**TINY), LABELS, PAD)


def scrambled(config: ClassifierConfig) -> Classifier:
    """All weights random and large, so that every part matters."""
    model, generator = Classifier(config).eval(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def judge(model: Classifier) -> Any:
    """The same model in transformers, with its default attention."""
    import transformers

    config, T = model.config, "transformer."
    theirs = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.n_embd,
            num_labels=len(config.labels),
            pad_token_id=config.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    state = {
        "score.weight" if name == "lm_head.weight" else T + name: (
            tensor.T if name.startswith("h.") and tensor.ndim == 2 else tensor
        )
        for name, tensor in model.state_dict().items()
    }
    theirs.load_state_dict(state)
    assert theirs.config._attn_implementation == "sdpa"
    return theirs


@pytest.fixture(scope="module")
def pair() -> tuple[Classifier, Any]:
    model = scrambled(CONFIG)
    return model, judge(model)


ROWS: dict[str, tuple[list[list[int]], list[list[int]] | None]] = {
    "alone": ([[3, 5, 9]], None),
    "padded right": ([[3, 5, 9, 7], [4, 7, 7, 7], [1, 2, 8, 6]], None),
    "padded right, with a mask": (
        [[3, 5, 9, 7], [4, 7, 7, 7], [1, 2, 8, 6]],
        [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]],
    ),
    "padded left": (
        [[7, 3, 5, 9], [7, 7, 7, 4], [1, 2, 8, 6]],
        [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]],
    ),
    "padded left, without a mask: padding is read": ([[7, 3, 5, 9], [7, 7, 7, 4]], None),
    "padded on both sides": ([[7, 3, 5, 7]], [[0, 1, 1, 0]]),
    "ends with the padding token": ([[3, 5, 7], [2, 7, 7]], [[1, 1, 1], [1, 1, 1]]),
    "begins with it": ([[7, 3, 5], [7, 7, 2]], [[1, 1, 1], [1, 1, 1]]),
    "has it inside": ([[3, 7, 5], [3, 7, 7]], [[1, 1, 1], [1, 1, 0]]),
    "only padding tokens, which are text": ([[7, 7], [7, 7]], [[1, 1], [1, 0]]),
    "only padding tokens, padded left": ([[7, 7, 7], [3, 4, 5]], [[0, 0, 1], [1, 1, 1]]),
    "empty": ([[7, 7, 7], [3, 4, 5]], [[0, 0, 0], [1, 1, 1]]),
    "all empty": ([[7]], [[0]]),
}


@pytest.mark.parametrize("case", ROWS)
@torch.inference_mode()
def test_transformers_gives_the_same_scores(case: str, pair: tuple[Classifier, Any]) -> None:
    model, theirs = pair
    rows, mask = ROWS[case]
    tokens, masked = torch.tensor(rows), None if mask is None else torch.tensor(mask)
    wanted = theirs(tokens, attention_mask=masked).logits
    torch.testing.assert_close(model.scores(tokens, masked), wanted, atol=1e-4, rtol=0)


def test_without_a_padding_token_one_text_at_a_time(pair: tuple[Classifier, Any]) -> None:
    model = scrambled(replace(CONFIG, pad_token_id=None))
    tokens = some_tokens(1)
    wanted = judge(model)(tokens).logits
    torch.testing.assert_close(model.scores(tokens), wanted, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="2 texts at once need a padding token"):
        model.scores(some_tokens(2))
    with pytest.raises(ValueError, match="an empty text needs a padding token"):
        model.scores(tokens, torch.zeros_like(tokens))


def test_unclear_padding_is_refused(pair: tuple[Classifier, Any]) -> None:
    model, _ = pair
    with pytest.raises(ValueError, match="the mask has holes"):
        model.scores(torch.tensor([[3, 7, 5]]), torch.tensor([[1, 0, 1]]))
    with pytest.raises(ValueError, match="leaves out tokens other than the padding token, 7"):
        model.scores(torch.tensor([[3, 4, 5]]), torch.tensor([[1, 1, 0]]))


def test_scores_are_the_logits_of_the_last_token(pair: tuple[Classifier, Any]) -> None:
    model, _ = pair
    tokens = some_tokens(3).clamp(min=8)  # none is padding
    assert model(tokens).logits.shape == (3, 5, len(LABELS))
    torch.testing.assert_close(model.scores(tokens), model(tokens).logits[:, -1])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("labels", [2, 4, 17])
def test_the_gradient_of_the_loss_is_that_in_float64(
    labels: int, fused: bool, own_cache: None
) -> None:
    """With one target a row, as examples of texts and labels have, by autograd of the whole."""
    names = tuple(f"label {number}" for number in range(labels))
    model = scrambled(replace(CONFIG, labels=names)).train()
    exact = scrambled(model.config).double().train()
    if fused:
        fuse(model, open_library(SOURCE))
    tokens, targets = some_tokens(6, 9), torch.full((6, 9), -1)
    for row, length in enumerate((9, 4, 1, 7, 9, 2)):
        tokens[row, length:] = PAD
        targets[row, length - 1] = row % labels
    loss = model.loss(tokens, targets)
    loss.backward()
    found = exact(tokens, targets)
    assert found.loss is not None
    found.loss.backward()
    assert abs(loss.item() - found.loss.item()) < 1e-5
    for (name, parameter), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is not None
        assert wanted.grad is not None
        torch.testing.assert_close(
            parameter.grad.double(), wanted.grad, atol=2e-5, rtol=1e-4, msg=name
        )


def test_a_classifier_of_a_model_shares_its_weights() -> None:
    model = GPT(GPTConfig(**TINY))
    classifier = Classifier.of(model, LABELS, PAD)
    assert classifier.wte is model.wte
    assert classifier.lm_head.weight.shape == (len(LABELS), 12)
    assert classifier.config.body() == model.config
    features: Tensor = model.features(some_tokens())
    torch.testing.assert_close(classifier.features(some_tokens()), features)


def test_its_parameters_are_counted() -> None:
    model = Classifier(CONFIG)
    there = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {p.name: p.shape for p in components(CONFIG) if not p.absent} == there
    assert parameter_count(CONFIG) == sum(p.numel() for p in model.parameters())
    matrices = [
        p for n, p in model.named_parameters() if p.ndim == 2 and n[:3] not in ("wte", "wpe")
    ]
    assert multiplied_parameters(CONFIG) == sum(p.numel() for p in matrices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ("one",)}, "at least two different ones"),
        ({"labels": ("a", "a")}, "at least two different ones"),
        ({"tie_weights": True}, "cannot be tied"),
        ({"pad_token_id": 37}, "pad_token_id is 37: 0 to 36, or null"),
    ],
)
def test_bad_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_the_modern_block_is_refused() -> None:
    with pytest.raises(ValueError, match="modern block cannot be one"):
        ClassifierConfig.of(PRESETS["modern"], LABELS, PAD)
