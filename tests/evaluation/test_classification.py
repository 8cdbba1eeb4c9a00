"""Figures of labels against scikit-learn, and the two baselines."""

import random
from pathlib import Path

import numpy as np
import pytest

from gptsmith.evaluation.classification import (
    Confusion,
    NaiveBayes,
    baselines,
)
from gptsmith.evaluation.drawing import draw_confusion

LABELS = ("ham", "spam", "egg")
WORDS = "free win cash Now you're on a bus, at 5pm; naïve café don't I a_b x 42 über ΟΔΟΣ".split()


def texts(count: int, seed: int) -> list[tuple[str, int]]:
    """Texts of words that some labels like more than others."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.choices(range(3), (5, 3, 2))[0]
        likes = [1 + 4 * (n % 3 == label) for n in range(len(WORDS))]
        made.append((" ".join(draw.choices(WORDS, likes, k=draw.randrange(9))), label))
    return made


def test_naive_bayes_is_that_of_scikit_learn() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    training, test = texts(80, 1), [*texts(50, 2), ("unseen words only", 0), ("", 1)]
    count, judge = CountVectorizer(), MultinomialNB()
    judge.fit(count.fit_transform([text for text, _ in training]), [n for _, n in training])
    wanted = judge.predict_log_proba(count.transform([text for text, _ in test]))
    ours = NaiveBayes(iter(training), 3)
    assert ours.numbers.keys() == {*count.get_feature_names_out()}
    found = np.array([ours.log_probabilities(text) for text, _ in test])
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    given = judge.predict(count.transform([text for text, _ in test])).tolist()
    assert [ours.label(text) for text, _ in test] == given


def test_baselines_are_measured_on_the_test_texts() -> None:
    training = [("win cash", 1), ("win now", 1), ("see you", 0)]
    found = baselines(iter(training), iter([("see you", 0), ("cash now", 1), ("you", 0)]), 2)
    assert found.most_frequent == pytest.approx(1 / 3)
    assert found.naive_bayes == 1
    assert str(found).startswith("baselines: 0.3333 always the most frequent label")


def test_a_label_without_texts_is_never_given() -> None:
    bayes = NaiveBayes([("win cash", 1), ("see you", 0)], 3)
    assert bayes.log_probabilities("win")[2] == -np.inf
    with pytest.raises(ValueError, match="no words to learn from"):
        NaiveBayes([("?", 0), ("", 1)], 2)


def test_figures_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

    draw = random.Random(0)
    wanted = [draw.randrange(3) for _ in range(200)]
    given = [n if draw.random() < 0.7 else draw.randrange(3) for n in wanted]
    confusion = Confusion(LABELS)
    for pair in zip(wanted, given, strict=True):
        confusion.add(*pair)
    assert confusion.matrix.tolist() == confusion_matrix(wanted, given).tolist()
    assert confusion.accuracy == pytest.approx(accuracy_score(wanted, given))
    judged = precision_recall_fscore_support(wanted, given)
    for each, p, r, f1, n in zip(confusion.of_each_label(), *judged, strict=True):
        assert (each.precision, each.recall, each.f1) == pytest.approx((p, r, f1))
        assert each.texts == n


def test_a_share_of_nothing_is_no_figure() -> None:
    confusion = Confusion(("a", "b"))
    assert confusion.accuracy == 0
    confusion.add(0, 0)
    confusion.add(0, 0)
    figures = confusion.to_json()
    assert figures["labels"]["b"] == {"texts": 0, "precision": None, "recall": None, "f1": None}
    assert str(confusion).splitlines()[0] == "accuracy 1.0000 of 2 texts"
    assert str(confusion).splitlines()[-1].split() == ["b", "0", "-", "-", "-"]


@pytest.mark.parametrize("labels", [2, 3, 30])
def test_the_matrix_is_drawn(labels: int, tmp_path: Path) -> None:
    confusion = Confusion([f"${number} is " + "long " * (number % 9) for number in range(labels)])
    confusion.add(0, 1)
    draw_confusion(confusion, tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
