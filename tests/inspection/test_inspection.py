"""What is seen inside a model, held to transformers' GPT-2 and to plain formulas in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gptsmith
from gptsmith import GPT, GPTConfig
from gptsmith.inspection.attribution import Part, Question, attribute
from gptsmith.inspection.heads import (
    head_scores,
    highest_scores,
    names,
    pattern_scores,
    repeated_tokens,
)
from gptsmith.inspection.lens import logit_lens, surprise
from gptsmith.inspection.patching import Patching, complete, patch
from gptsmith.inspection.recording import head_outputs, record
from gptsmith.model.attention import WAYS
from tests.conftest import TINY, scrambled, some_tokens

T = 7
MODERN = {"block": "modern", "n_head": 6, "n_kv_head": 3, "n_embd": 36}
FORMS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "nanogpt": {"bias": False, "activation": "gelu_erf"},
    "book": {"qkv_bias": False, "tie_weights": False},
    "modern": MODERN,
}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Transformers' model with our weights, which returns its attention weights too."""
    from transformers import GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("model")
    gptsmith.save(scrambled(GPTConfig(**TINY)), None, folder / "gpt2")
    return GPT2LMHeadModel.from_pretrained(
        folder / "gpt2", attn_implementation="eager", dtype=torch.float64
    ).eval()


@pytest.fixture(scope="module")
def ours() -> GPT:
    return scrambled(GPTConfig(**TINY)).double()


@pytest.mark.slow
def test_attention_and_stream_are_those_of_transformers(theirs: Any, ours: GPT) -> None:
    tokens = some_tokens(length=T)
    found = record(ours, tokens)
    with torch.no_grad():
        wanted = theirs(tokens, output_attentions=True, output_hidden_states=True)
        torch.testing.assert_close(found.weights, torch.stack(wanted.attentions))
        torch.testing.assert_close(found.stream[:-1], torch.stack(wanted.hidden_states[:-1]))
        torch.testing.assert_close(ours.ln_f(found.stream[-1]), wanted.hidden_states[-1])
    torch.testing.assert_close(found.stream[1:], found.stream[:-1] + found.attn + found.mlp)


@pytest.mark.parametrize("form", FORMS)
def test_recording_changes_nothing(form: str) -> None:
    model = scrambled(GPTConfig(**(TINY | FORMS[form])))
    model.attend_by(WAYS["blocks"])
    tokens = some_tokens(length=T)
    before = model(tokens).logits
    found = record(model, tokens)
    torch.testing.assert_close(model.lm_head(model.ln_f(found.stream[-1])), before)
    assert torch.equal(model(tokens).logits, before)
    assert {block.attn.attend for block in model.h} == {WAYS["blocks"]}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_failing_pass_leaves_no_trace() -> None:
    model = scrambled(GPTConfig(**TINY))
    with pytest.raises(ValueError, match="12 tokens are more than the context_length of 11"):
        record(model, some_tokens(length=12))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {block.attn.attend for block in model.h} == {WAYS["kernel"]}


# -- heads


def test_scores_are_shares_of_attention() -> None:
    """Against sums over single weights, as the words say it."""
    tokens = torch.tensor([[3, 5, 3, 3, 5, 9], [1, 2, 1, 2, 1, 1]])
    L, H, T = 2, 3, tokens.shape[1]
    weights = torch.rand(L, 2, H, T, T, generator=torch.Generator().manual_seed(0)).tril()
    weights /= weights.sum(-1, keepdim=True)
    found = pattern_scores(weights, tokens)

    def looks(kind: str, row: list[int], q: int, k: int) -> bool:
        return {
            "previous": k == q - 1,
            "duplicate": k < q and row[k] == row[q],
            "induction": 0 < k <= q and row[k - 1] == row[q] and k - 1 < q,
            "first": k == 0,
        }[kind]

    for kind, scores in found.items():
        for layer in range(L):
            for head in range(H):
                shares = [
                    sum(
                        float(weights[layer, b, head, q, k])
                        for q in range(T)
                        for k in range(T)
                        if looks(kind, row, q, k)
                    )
                    / T
                    for b, row in enumerate(tokens.tolist())
                ]
                assert scores[layer, head] == pytest.approx(sum(shares) / 2, abs=1e-6)


def test_heads_that_are_made_are_named() -> None:
    """Weights that look nowhere else have the highest score of their kind, and its name."""
    tokens = repeated_tokens(37, 8, rows=3)
    B, T = tokens.shape
    assert torch.equal(tokens[:, :8], tokens[:, 8:])
    weights = torch.zeros(1, B, 5, T, T)
    for q in range(T):
        weights[0, :, 0, q, max(q - 1, 0)] = 1
        weights[0, :, 1, q, q - 8 if q >= 8 else 0] = 1
        weights[0, :, 2, q, q - 7 if q >= 8 else 0] = 1
        weights[0, :, 3, q, 0] = 1
        weights[0, :, 4, q, : q + 1] = 1 / (q + 1)
    scores, highest = pattern_scores(weights, tokens), highest_scores(tokens)
    kinds = ["previous", "duplicate", "induction", "first"]
    for head, kind in enumerate(kinds[:3]):
        assert scores[kind][0, head] == pytest.approx(highest[kind])
    assert highest == {"previous": 15 / 16, "duplicate": 0.5, "induction": 0.5, "first": 1}
    assert names(scores, highest) == [[*kinds, ""]]


def test_scores_do_not_depend_on_padding_or_rows_of_a_batch() -> None:
    model = scrambled(GPTConfig(**TINY))
    scores = head_scores(model, vocab_size=30, rows=3, seed=4)
    tokens = repeated_tokens(30, 5, rows=3, seed=4)
    assert tokens.max() < 30
    whole = pattern_scores(record(model, tokens).weights, tokens)
    for kind, score in scores.items():
        np.testing.assert_allclose(score, whole[kind], rtol=1e-5)
    with pytest.raises(ValueError, match="the context_length is 3"):
        head_scores(scrambled(GPTConfig(**(TINY | {"context_length": 3}))))


# -- lens and surprise


@pytest.mark.slow
def test_the_lens_is_transformers_stream_through_its_head(theirs: Any, ours: GPT) -> None:
    tokens = some_tokens(1, T)
    found = logit_lens(ours, record(ours, tokens))
    with torch.no_grad():
        hidden = theirs(tokens, output_hidden_states=True).hidden_states
        normed = [*map(theirs.transformer.ln_f, hidden[:-1]), hidden[-1]]  # the last is already
        logits = torch.stack([theirs.lm_head(x)[0] for x in normed]).numpy()  # (L + 1, T, V)
    assert (found.token == logits.argmax(-1)).all()
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    final = logits[-1].argmax(-1)
    np.testing.assert_allclose(found.probability, p.max(-1), rtol=1e-5)
    np.testing.assert_allclose(found.final_probability, p[:, np.arange(T), final], rtol=1e-5)
    order = (-logits).argsort(-1)
    wanted = [[list(order[l, t]).index(final[t]) + 1 for t in range(T)] for l in range(len(order))]  # noqa: E741
    assert found.final_rank.tolist() == wanted
    for l, x in enumerate(hidden[:-1]):  # noqa: E741
        np.testing.assert_allclose(found.norm[l], np.linalg.norm(x[0].numpy(), axis=-1), rtol=1e-5)


def test_surprise_is_minus_the_logarithm_of_the_probability(ours: GPT) -> None:
    tokens = some_tokens(1, T)
    found = surprise(ours, record(ours, tokens), alternatives=4)
    p = ours(tokens).logits[0].softmax(-1).detach().numpy()
    seen = p[np.arange(T - 1), tokens[0, 1:]]
    np.testing.assert_allclose(found.nats, -np.log(seen), rtol=1e-5)
    np.testing.assert_allclose(found.probability, seen, rtol=1e-5)
    assert found.rank.tolist() == (1 + (p[:-1] > seen[:, None]).sum(-1)).tolist()
    assert found.alternatives.tolist() == (-p).argsort(-1)[:, :4].tolist()
    np.testing.assert_allclose(found.likelihoods, -np.sort(-p)[:, :4], rtol=1e-5)


# -- attribution


@pytest.mark.parametrize("form", FORMS)
def test_the_parts_of_a_logit_add_up(form: str) -> None:
    model = scrambled(GPTConfig(**(TINY | FORMS[form]))).double()
    tokens, targets = some_tokens(1, T), some_tokens(1, T)[0].flip(0)
    recording = record(model, tokens)
    logits = model(tokens).logits[0].detach()
    places = torch.arange(T)
    for instead in (None, (targets + 1) % 37):
        found = attribute(model, recording, targets, instead)
        wanted = logits[places, targets] - (0 if instead is None else logits[places, instead])
        np.testing.assert_allclose(found.logits, wanted, atol=1e-10)
        np.testing.assert_allclose(found.contributions.sum(0), wanted, atol=1e-10)
        kinds = {part.kind for part in found.parts}
        assert ("wpe" in kinds) == (form != "modern")
        assert ("ln_f bias" in kinds) == ("mlp bias" in kinds) == (form in ("gpt2", "book"))
        heads = [(part.layer, part.head) for part in found.parts if part.kind == "head"]
        assert heads == [(i, j) for i in range(2) for j in range(model.config.n_head)]


@pytest.mark.slow
def test_a_heads_part_is_its_values_through_the_output_matrix(theirs: Any, ours: GPT) -> None:
    """By transformers' attention weights and matrices, a head at a time."""
    tokens, C, H = some_tokens(1, T), TINY["n_embd"], TINY["n_head"]
    recording, D = record(ours, tokens), C // H
    with torch.no_grad():
        out = theirs(tokens, output_attentions=True, output_hidden_states=True)
        block = theirs.transformer.h[1]
        v = block.attn.c_attn(block.ln_1(out.hidden_states[1]))[0, :, 2 * C :]  # (T, C)
        for head in range(H):
            own = slice(head * D, (head + 1) * D)
            written = out.attentions[1][0, head] @ v[:, own] @ block.attn.c_proj.weight[own]
            torch.testing.assert_close(head_outputs(ours, recording, 1)[0, :, head], written)


def test_a_part_that_is_taken_away_takes_its_contribution(ours: GPT) -> None:
    """With the norm's scale held, the logit without a part is less by what the part contributed."""
    tokens = some_tokens(1, T)
    recording = record(ours, tokens)
    found = attribute(ours, recording, torch.full((T,), 8))
    x, without = recording.stream[-1, 0], recording.mlp[0, 0] - ours.h[0].mlp.c_proj.bias
    scale = torch.rsqrt(x.var(-1, correction=0, keepdim=True) + ours.ln_f.eps)
    less = x - without
    normed = (less - less.mean(-1, keepdim=True)) * scale * ours.ln_f.weight + ours.ln_f.bias
    logits = (normed @ ours.lm_head.weight[8]).detach().numpy()
    of_mlp = found.contributions[found.parts.index(Part("mlp", 0))]
    np.testing.assert_allclose(logits, found.logits - of_mlp, atol=1e-10)


# -- patching


@contextmanager
def replaced(module: Any, values: Tensor, place: Any, *, at_input: bool) -> Iterator[None]:
    """Transformers' module with its input or output replaced at a place."""

    def put(x: Tensor) -> Tensor:
        x = x.clone()
        x[place] = values[place]
        return x

    def at_output(module: Any, inputs: Any, output: Any) -> Any:
        return (put(output[0]), *output[1:]) if isinstance(output, tuple) else put(output)

    if at_input:
        hook = module.register_forward_pre_hook(lambda module, xs: (put(xs[0]), *xs[1:]))
    else:
        hook = module.register_forward_hook(at_output)
    yield
    hook.remove()


@pytest.mark.slow
def test_patches_are_those_made_in_transformers(theirs: Any, ours: GPT) -> None:
    """One module at a time, one place at a time, by its own hooks."""
    clean, corrupt = some_tokens(2, T).tolist()
    asked = Question(target=4, instead=9)
    *shares, found = patch(ours, clean, corrupt, asked)
    assert isinstance(found, Patching)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    recording = record(ours, torch.tensor([clean]))

    def difference(tokens: list[int]) -> float:
        with torch.no_grad():
            logits = theirs(torch.tensor([tokens])).logits[0, -1]
        return (logits[4] - logits[9]).item()

    ends = difference(clean), difference(corrupt)
    assert (found.clean, found.corrupt) == pytest.approx(ends)
    h, D = theirs.transformer.h, TINY["n_embd"] // TINY["n_head"]
    grids: dict[str, Any] = {
        "stream": [(h[0], 0), (h[1], 1), (theirs.transformer.ln_f, 2)],
        "attn": [(h[0].attn, 0), (h[1].attn, 1)],
        "mlp": [(h[0].mlp, 0), (h[1].mlp, 1)],
        "heads": [(h[0].attn.c_proj, 0), (h[1].attn.c_proj, 1)],
    }
    for name, modules in grids.items():
        places = [(0, t) for t in range(T)]
        if name == "heads":
            places = [(..., slice(head * D, head * D + D)) for head in range(TINY["n_head"])]
        for module, layer in modules:
            values, at_input = getattr(recording, name)[layer], name in ("stream", "heads")
            for k, place in enumerate(places):
                with replaced(module, values, place, at_input=at_input):
                    share = (difference(corrupt) - ends[1]) / (ends[0] - ends[1])
                assert getattr(found, name)[layer, k] == pytest.approx(share, abs=1e-8), name


def test_what_patching_must_do() -> None:
    """The whole stream at the last place restores all, and a place that is the same nothing."""
    model = scrambled(GPTConfig(**(TINY | MODERN))).double()
    clean = some_tokens(1, T)[0].tolist()
    corrupt = [*clean[:3], (clean[3] + 1) % 37, *clean[4:]]
    *_, found = patch(model, clean, corrupt, complete(model, clean, corrupt, target=4, instead=9))
    np.testing.assert_allclose(found.stream[-1], [0] * (T - 1) + [1], atol=1e-8)
    np.testing.assert_allclose(found.stream[0], [0, 0, 0, 1, 0, 0, 0], atol=1e-8)
    assert found.heads.shape == (2, 6)


def test_what_cannot_be_patched_is_refused() -> None:
    model = scrambled(GPTConfig(**TINY))
    with pytest.raises(ValueError, match="corrupt has 3 tokens and the prompt 4: as many are"):
        next(patch(model, [1, 2, 3, 4], [1, 2, 3], Question(4, 9)))
    with pytest.raises(ValueError, match="the same after both prompts, so no patch"):
        next(patch(model, [1, 2, 3], [1, 2, 3], Question(4, 9)))
    with pytest.raises(ValueError, match="instead would be the target itself"):
        complete(model, [1, 2, 3], [1, 2, 4], target=4, instead=4)
    assert complete(model, [1, 2, 3], [1, 2, 3], target=4, instead=9) == Question(4, 9)
