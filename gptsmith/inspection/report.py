"""Look inside a model: everything about its pass over one prompt, as arrays and as plain values.

Shapes:  T tokens    L layers    H heads    N parts of a logit    K alternatives
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch

from ..config.cost import parameter_count
from ..model.gpt import GPT
from ..tokenizers import Tokenizer
from .attribution import Attribution, Question, attribute
from .heads import head_scores, highest_scores, names, repeated_tokens, tested_half
from .lens import Lens, Surprise, logit_lens, surprise
from .over_training import Moment
from .patching import Patching
from .recording import record
from .words import Words

DIGITS = 5  # significant ones of a number in a report


@dataclass(frozen=True)
class Inspection:
    """What is inside a model's pass over one prompt."""

    tokens: np.ndarray  # (T,)
    surprise: Surprise
    weights: np.ndarray  # (L, H, T, T), attention of each query (row) to each key (column)
    scores: dict[str, np.ndarray]  # of each kind of head, (L, H)
    names: list[list[str]]  # (L, H), the kind of each head, or ""
    lens: Lens
    attribution: Attribution  # of each next token; at the last place, of the most likely
    question: Question | None = None
    answer: Attribution | None = None  # of the question, whose place is the last
    corrupt: Sequence[int] | None = None  # (T,), the prompt that was patched
    patching: Patching | None = None
    training: list[Moment] | None = None


def inspect(
    model: GPT,
    tokens: Sequence[int],
    *,
    vocab_size: int = 0,
    scores: dict[str, np.ndarray] | None = None,
    question: Question | None = None,
    corrupt: Sequence[int] | None = None,
    patching: Patching | None = None,
    training: list[Moment] | None = None,
) -> Inspection:
    """Look at a model's pass over tokens (T,), and at what its heads do.

    `vocab_size` is the tokenizer's, where the model's is padded. What takes longer is done before,
    and given: the `scores` of the heads if they are known, the `patching` of a corrupted prompt
    (T,), and `training`. ValueError for no tokens, more than the context_length, or a context too
    short to score heads.
    """
    if not len(tokens):
        raise ValueError("there are no tokens: at least one can be inspected")
    vocab_size = vocab_size or model.config.vocab_size
    row = torch.tensor(tokens, device=model.device)  # (T,)
    recording = record(model, row.unsqueeze(0))
    seen = surprise(model, recording)
    last = torch.tensor(seen.alternatives[-1:, 0], device=model.device)
    if scores is None:
        scores = head_scores(model, vocab_size=vocab_size)
    answer = None
    if question is not None:
        other = None if question.instead is None else torch.full_like(row, question.instead)
        answer = attribute(model, recording, torch.full_like(row, question.target), other)
    return Inspection(
        tokens=row.cpu().numpy(),
        surprise=seen,
        weights=recording.weights[:, 0].float().cpu().numpy(),
        scores=scores,
        names=names(scores, highest_scores(repeated_tokens(vocab_size, tested_half(model)))),
        lens=logit_lens(model, recording),
        attribution=attribute(model, recording, torch.cat((row[1:], last))),
        question=question,
        answer=answer,
        corrupt=corrupt,
        patching=patching,
        training=training,
    )


def about(model: GPT, name: str) -> dict[str, Any]:
    """Return what a report says about the model itself."""
    config = model.config
    sizes = {key: getattr(config, key) for key in ("n_layer", "n_head", "n_embd", "vocab_size")}
    return {"name": name, "parameters": parameter_count(config), **sizes}


# -- as plain values


def to_json(found: Inspection, tokenizer: Tokenizer, model: dict[str, Any]) -> dict[str, Any]:
    """Return an inspection as plain values; `model` is what is said about the model itself.

    Attention is a list by layer, head, query and key, with the keys up to the query. It is rounded
    to thousandths, or it would be most of a file.
    """
    words = Words(tokenizer)
    seen, at = found.surprise, range(len(found.tokens))
    tokens = [words.about(int(id)) for id in found.tokens]
    for i in at:
        options = zip(seen.alternatives[i], seen.likelihoods[i], strict=True)
        tokens[i]["next"] = [{**words.named(id), "probability": rounded(p)} for id, p in options]
        if i:  # the first token was not predicted
            tokens[i] |= {
                "probability": rounded(seen.probability[i - 1]),
                "surprise": rounded(seen.nats[i - 1]),
                "rank": int(seen.rank[i - 1]),
            }
    result: dict[str, Any] = {"model": model, "tokens": tokens}
    result["heads"] = [
        {"layer": layer, "head": head, "name": found.names[layer][head]}
        | {kind: rounded(score[layer, head]) for kind, score in found.scores.items()}
        for layer, head in np.ndindex(found.weights.shape[:2])
    ]
    result["lens"] = lens_json(found.lens, words)
    result["attribution"] = attribution_json(found.attribution)
    if found.question is not None and found.answer is not None:
        asked = found.question
        result["answer"] = {
            "target": words.named(asked.target),
            "instead": None if asked.instead is None else words.named(asked.instead),
            "logit": rounded(found.answer.logits[-1]),
            "contributions": rounded(found.answer.contributions[:, -1]),
        }
    if found.patching is not None and found.corrupt is not None:
        grids = {f.name: rounded(getattr(found.patching, f.name)) for f in fields(Patching)}
        result["patching"] = {"tokens": [words.named(id) for id in found.corrupt], **grids}
    if found.training is not None:
        result["training"] = training_json(found.training, words)
    result["attention"] = triangles(found.weights)
    return result


def lens_json(lens: Lens, words: Words) -> dict[str, Any]:
    """Return what each layer would say, as lists by layer and place."""
    tokens = [[words.named(id) for id in row] for row in lens.token]
    return {"token": tokens} | {
        f.name: rounded(getattr(lens, f.name)) for f in fields(Lens) if f.name != "token"
    }


def attribution_json(found: Attribution) -> dict[str, Any]:
    """Return the parts, their contributions by part and place, and the logits by place."""
    return {
        "parts": [asdict(part) for part in found.parts],
        "contributions": rounded(found.contributions),
        "logits": rounded(found.logits),
    }


def training_json(moments: Sequence[Moment], words: Words) -> list[dict[str, Any]]:
    """Return what the model was like at each checkpoint, with the attention of the heads that have
    the highest score of each kind in the end."""
    last, heads = moments[-1], {}
    for kind, score in last.scores.items():
        layer, head = divmod(int(score.argmax()), score.shape[1])
        heads[kind] = {"kind": kind, "layer": layer, "head": head}
    return [
        {
            "step": moment.step,
            "loss": None if moment.loss is None else rounded(moment.loss),
            "scores": {kind: rounded(score) for kind, score in moment.scores.items()},
            "heads": [
                {**head, "attention": triangles(moment.weights[head["layer"], head["head"]])}
                for head in heads.values()
            ],
            "lens": lens_json(moment.lens, words),
        }
        for moment in moments
    ]


def triangles(weights: np.ndarray) -> list[Any]:
    """Return attention weights as nested lists, each query's up to itself.  (..., T, T)"""
    if weights.ndim > 2:
        return [triangles(each) for each in weights]
    return [row[: i + 1].astype(float).round(3).tolist() for i, row in enumerate(weights)]


def rounded(values: Any) -> Any:
    """Return an array or a number as plain values with few digits."""
    if isinstance(values, np.ndarray) and values.ndim:
        return [rounded(each) for each in values]
    if isinstance(values, int | np.integer):
        return int(values)
    return float(f"{float(values):.{DIGITS}g}")
