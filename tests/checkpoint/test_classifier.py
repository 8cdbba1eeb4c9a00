"""Folders of classifiers: ours in transformers 5 and 4.57, and theirs here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gptsmith
from gptsmith.checkpoint.training_state import load_training
from gptsmith.config.classifier import ClassifierConfig
from gptsmith.config.model import GPTConfig
from gptsmith.model.classifier import Classifier
from gptsmith.tokenizers import Tokenizer, Usage, byte_tokenizer, gpt2_tokenizer

from ..conftest import TINY
from ..model.test_classifier import CONFIG, LABELS, judge, scrambled
from ..versions import Ask
from .test_saved import difference

TEXTS = ["To be, or not to be", "that is", "the question: whether 'tis nobler"]
SMALL = ClassifierConfig.of(
    GPTConfig(**(TINY | {"vocab_size": 50257, "context_length": 32, "qkv_bias": True})),
    LABELS,
    50256,
)
USED = """
import json, sys, warnings
warnings.simplefilter("error")
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, __version__, pipeline
folder, *texts = sys.argv[1:]
m = AutoModelForSequenceClassification.from_pretrained(folder)
t = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    found = {}
    for t.padding_side in ("right", "left"):
        batch = t(texts, return_tensors="pt", padding=True)
        found[t.padding_side] = m(**batch).logits.tolist()
found["pipeline"] = pipeline("text-classification", model=folder)(texts)
found["batch"] = pipeline("text-classification", model=folder)(texts, batch_size=3)
found |= {"version": __version__, "id2label": m.config.id2label, "label2id": m.config.label2id}
print(json.dumps(found))
"""
MADE = """
import sys
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification
torch.manual_seed(0)
sizes = dict(vocab_size=37, n_positions=11, n_embd=12, n_layer=2, n_head=3, initializer_range=0.3)
for name, more in (("two", {}), ("named", {"id2label": {0: "ham", 1: "spam", 2: "egg"}})):
    model = GPT2ForSequenceClassification(
        GPT2Config(**sizes, pad_token_id=None if name == "two" else 7, bos_token_id=None,
                   eos_token_id=None, **more)
    ).eval()
    model.save_pretrained(name)
    with torch.no_grad():
        torch.save(model(torch.tensor([[3, 4, 5]])).logits, name + ".pt")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier") / "model"
    gptsmith.save(scrambled(SMALL), gpt2_tokenizer(), folder)
    return folder


def test_a_folder_comes_back(saved: Path) -> None:
    model, tokenizer = gptsmith.load(saved)
    assert isinstance(model, Classifier)
    assert model.config == SMALL
    assert model.labels == LABELS
    assert tokenizer is not None
    for name, tensor in scrambled(SMALL).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5", "4.57"])
def test_transformers_labels_as_we_do(version: str, saved: Path, ask: Ask) -> None:
    (line,) = ask(version, saved, USED, str(saved), *TEXTS)
    found = json.loads(line)
    assert found["version"].startswith(version)
    assert found["id2label"] == {str(n): label for n, label in enumerate(LABELS)}
    assert found["label2id"] == {label: n for n, label in enumerate(LABELS)}
    model, tokenizer = gptsmith.load(saved)
    assert isinstance(model, Classifier)
    assert tokenizer is not None
    rows = [tokenizer.encode(text) for text in TEXTS]
    T = max(map(len, rows))
    right = torch.tensor([[*row, *[50256] * (T - len(row))] for row in rows])
    left = torch.tensor([[*[50256] * (T - len(row)), *row] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    scores = model.scores(right)
    assert difference(found["right"], scores) < 1e-4
    assert difference(found["left"], model.scores(left, mask.flip(1))) < 1e-4
    for answers in (found["pipeline"], found["batch"]):
        for answer, p in zip(answers, scores.softmax(1), strict=True):
            assert answer["label"] == LABELS[int(p.argmax())]
            assert abs(answer["score"] - float(p.detach().max())) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("version", ["5", "4.57"])
def test_folders_of_transformers_are_read(version: str, tmp_path: Path, ask: Ask) -> None:
    ask(version, tmp_path, MADE)
    labels = {"two": ("LABEL_0", "LABEL_1"), "named": ("ham", "spam", "egg")}
    for name, wanted in labels.items():
        model, _ = gptsmith.load(tmp_path / name)
        assert isinstance(model, Classifier)
        assert model.labels == wanted
        assert model.pad_token_id == (None if name == "two" else 7)
        scores = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(
            model.scores(torch.tensor([[3, 4, 5]])), scores, atol=1e-4, rtol=0
        )
        # As transformers saves it again, so do we.
        gptsmith.save(model, None, tmp_path / f"{name}-again")
        again, _ = gptsmith.load(tmp_path / f"{name}-again")
        assert again.config == model.config
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_absent_biases_stay_absent_and_transformers_scores_alike(tmp_path: Path) -> None:
    model = scrambled(replace(CONFIG, bias=False, qkv_bias=False, activation="gelu_erf"))
    gptsmith.save(model, None, tmp_path / "model")
    again, _ = gptsmith.load(tmp_path / "model")
    assert again.config == model.config
    import transformers

    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    torch.testing.assert_close(model.scores(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def test_the_folders_tokenizer_pads_with_the_models_token(tmp_path: Path) -> None:
    """Else other tools would take their padding for the end of the text."""
    import transformers

    tokenizer = byte_tokenizer()
    end = tokenizer.end_of_text
    assert end is not None
    tokenizer = Tokenizer(tokenizer.backend, Usage(tokenizer={"pad_token": "a"}))
    sizes = TINY | {"vocab_size": tokenizer.vocab_size, "qkv_bias": True}
    for pad, token in ((end, "<|endoftext|>"), (5, "a")):
        model = scrambled(ClassifierConfig.of(GPTConfig(**sizes), LABELS, pad))
        gptsmith.save(model, tokenizer, tmp_path / str(pad))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / str(pad))
        assert theirs.pad_token == token
        again, _ = gptsmith.load(tmp_path / str(pad))
        assert again.config == model.config


def test_training_state_is_written_beside_it(tmp_path: Path) -> None:
    model = scrambled(CONFIG)
    gptsmith.save(model, None, tmp_path / "m", optimizer={"a": torch.ones(2)}, state={"step": 3})
    assert load_training(tmp_path / "m")[1] == {"step": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem_type": "multi_label_classification"}, "only 'single_label_classification'"),
        ({"id2label": {"0": "a"}}, "at least two different"),
        ({"id2label": {"1": "a", "2": "b"}}, 'names of "0", "1" and so on'),
        ({"id2label": {"0": "a", "1": 2}}, "every label must be a text"),
        ({"id2label": {"0": "a", "1": "b"}}, r"score.weight is \(4, 12\), but .* \(2, 12\)"),
        ({"pad_token_id": 37}, "pad_token_id is 37"),
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "lacks 1 tensors of a GPT-2, lm_head.weight first",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    gptsmith.save(scrambled(CONFIG), None, tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        gptsmith.load(tmp_path / "m")


def test_describe_counts_the_head(tmp_path: Path) -> None:
    gptsmith.save(scrambled(CONFIG), None, tmp_path / "m")
    page = gptsmith.describe(tmp_path / "m")
    assert page.to_json()["sizes"]["K"] == 4
    assert page.to_json()["parameters"]["total"] == sum(
        p.numel() for p in judge(scrambled(CONFIG)).parameters()
    )
    assert "(B, T, K)" in str(page)
    assert "4 x 12" in str(page)
