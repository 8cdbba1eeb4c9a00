"""What `config.json` says of a classifier: the fields of GPT2ForSequenceClassification.

Knows nothing of the other fields (`config_json.py`), of files or tensors.
"""

from collections.abc import Mapping
from typing import Any

from ..config.classifier import ClassifierConfig
from ..config.model import GPTConfig

CLASS = "GPT2ForSequenceClassification"
KIND = "single_label_classification"  # each text has one label, and probabilities add up to 1


def from_hugging_face(config: GPTConfig, theirs: Mapping[str, Any]) -> GPTConfig:
    """Return the classifier that a GPT-2's `config.json` describes, or the GPT-2 if it is none.

    ValueError for labels that are not numbered from 0, and for what gives a text no single label.
    """
    classes = theirs.get("architectures")
    if not (isinstance(classes, list) and CLASS in classes):
        return config
    kind = theirs.get("problem_type")
    if kind not in (None, KIND):
        raise ValueError(f"config.json has problem_type {kind!r}: only {KIND!r} is understood")
    return ClassifierConfig.of(config, labels_in(theirs), theirs.get("pad_token_id"))


def labels_in(theirs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the labels in `config.json`; like transformers, LABEL_0 and LABEL_1 if it names none.

    transformers leaves out `id2label` where it is the same as in a new configuration.
    """
    names = theirs.get("id2label")
    if names is None:
        count = theirs.get("num_labels", 2)
        return tuple(f"LABEL_{number}" for number in range(count if type(count) is int else 0))
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise ValueError(
            f'config.json has id2label {names!r}: names of "0", "1" and so on are needed'
        )
    labels = [names[str(number)] for number in range(len(names))]
    if not all(isinstance(label, str) for label in labels):
        raise ValueError(f"config.json has id2label {names!r}: every label must be a text")
    return tuple(labels)


def to_hugging_face(config: ClassifierConfig) -> dict[str, Any]:
    """Return the fields of `config.json` that make a GPT-2 a classifier."""
    return {
        "architectures": [CLASS],
        "problem_type": KIND,
        "id2label": {str(number): label for number, label in enumerate(config.labels)},
        "label2id": {label: number for number, label in enumerate(config.labels)},
        "pad_token_id": config.pad_token_id,
    }
