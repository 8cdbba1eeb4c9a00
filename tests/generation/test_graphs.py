"""The step that a GPU captures is the model's step: run here on the CPU, as plain calls."""

from typing import Any

import pytest
import torch

from gptsmith import GPTConfig, SamplingSettings
from gptsmith.config.model import MODERN
from gptsmith.generation import graphs
from gptsmith.generation.graphs import GraphDecoder, StillCache
from gptsmith.generation.slots import Slots, Span
from gptsmith.generation.writing import generate_tokens
from gptsmith.model.cache import KVCache
from tests.conftest import TINY, scrambled

FORMS: dict[str, dict[str, Any]] = {
    "gpt2": TINY | {"context_length": 40},
    "modern": TINY | MODERN | {"context_length": 40, "n_embd": 24, "n_head": 4, "n_kv_head": 2},
}


@pytest.fixture(autouse=True)
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SPAN", 8)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", [(5,), (5, 5, 5), (7, 1, 12), (38, 45, 3)])
def test_tokens_are_those_of_plain_decoding(form: str, lengths: tuple[int, ...]) -> None:
    model = scrambled(GPTConfig(**FORMS[form]))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(37, (len(lengths), max(lengths)), generator=generator)
    for sampling in (SamplingSettings(temperature=0.0), SamplingSettings(temperature=1.2)):
        how: dict[str, Any] = {"lengths": lengths, "sampling": sampling, "seed": 3}
        wanted = [step.tolist() for step in generate_tokens(model, prompts, 45, **how)]
        decoder = GraphDecoder(model)
        found = [
            step.tolist() for step in generate_tokens(model, prompts, 45, decoder=decoder, **how)
        ]
        assert found == wanted


def test_what_is_captured_depends_on_no_number_of_python() -> None:
    """One captured step serves every length within its span, and every token."""
    model = scrambled(GPTConfig(**FORMS["gpt2"]))
    decoder = GraphDecoder(model)
    cache = KVCache(model.config, 2)
    text = torch.randint(37, (2, 40), generator=torch.Generator().manual_seed(2))
    found = [decoder.next_logits(text[:, [place]], cache) for place in range(40)]
    with torch.inference_mode():
        expected = model(text).logits
    assert (torch.cat(found, dim=1) - expected).abs().max() < 1e-4
    (steps,) = decoder.steps.values()
    assert sorted(steps) == [8, 16, 24, 32, 40]
    assert StillCache(cache, 16).keys.data_ptr() == cache.keys.data_ptr()
    with pytest.raises(ValueError, match="41 tokens do not fit a cache of 40"):
        decoder.next_logits(text[:, :1], cache)
    del steps, cache
    assert not decoder.steps  # a step goes with its cache


def test_places_to_come_are_hidden() -> None:
    model = scrambled(GPTConfig(**FORMS["gpt2"]))
    cache = KVCache(model.config, 1)
    cache.keys.fill_(1e30)
    cache.values.fill_(-1e30)
    token = torch.tensor([[3]])
    with torch.inference_mode():
        expected = model(token).logits
        found = model(token, cache=StillCache(cache, 16)).logits
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("in_chunks", [True, False])
def test_only_single_tokens_are_read_by_it(
    in_chunks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scrambled(GPTConfig(**FORMS["gpt2"]))
    slots, read = Slots(model, 3, GraphDecoder(model), in_chunks=in_chunks), []
    plain = GraphDecoder.next_logits
    monkeypatch.setattr(
        GraphDecoder, "next_logits", lambda *inputs: read.append(inputs[1].shape) or plain(*inputs)
    )
    slots.read([Span(0, [3, 4], 1), Span(1, [5], 1), Span(2, [6], 1)])
    assert read == ([(3, 1)] if in_chunks else [])  # else all in one pass that is padded
    slots.read([Span(0, [6], 1)])
    assert read[-1:] == [(3, 1)]
