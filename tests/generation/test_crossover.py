"""Up to how many tokens the compiled step is used: as measured, as remembered, or by default."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptsmith import GPT, GPTConfig
from gptsmith.generation import compiled, crossover
from gptsmith.generation.compiled import CompiledDecoder, open_decoder
from gptsmith.generation.crossover import COUNTS, about, remembered_rows, tune
from gptsmith.machine import chooser
from gptsmith.model.cache import KVCache
from tests.conftest import TINY, scrambled

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is remembered by one test alone."""
    monkeypatch.setattr(chooser, "FOLDER", str(tmp_path))


class Step:
    """A compiled step that takes a millisecond a token, beside a PyTorch that takes as long for any
    number of tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.model, self.now, self.seen = scrambled(GPTConfig(**TINY)), 0.0, set[int]()
        features = GPT.features

        def slow(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
            self.now += seconds
            self.seen.add(tokens.numel())
            return features(model, tokens, cache)

        monkeypatch.setattr(GPT, "features", slow)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def logits(self, tokens: Sequence[int], *_: Any) -> Tensor:
        self.now += 0.001 * len(tokens)
        return torch.zeros(1)


@pytest.mark.parametrize(
    ("seconds", "rows"), [(0.0001, 1), (0.0101, 8), (0.05, 48), (0.07, 64), (0.2, 192), (9, 512)]
)
@pytest.mark.usefixtures("own_figures")
def test_it_is_where_pytorch_becomes_faster(
    seconds: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(monkeypatch, seconds)
    assert remembered_rows(step.model) is None
    tune(step)
    assert remembered_rows(step.model) == rows
    assert len(step.seen) <= 5  # of 13 that are possible
    step.seen.clear()
    tune(step)
    assert not step.seen  # remembered


@pytest.mark.usefixtures("own_figures")
def test_what_is_remembered_is_used_and_else_the_constants() -> None:
    model = scrambled(GPTConfig(**TINY))
    decoder = open_decoder(model, "yes")
    assert isinstance(decoder, CompiledDecoder)
    assert decoder.most_rows == compiled.MOST_ROWS
    chooser.remember("rows", about(model), {"rows": 24})
    assert decoder.takes(compiled.MOST_ROWS)  # it asks once
    again = open_decoder(model, "yes")
    assert isinstance(again, CompiledDecoder)
    assert again.takes(24)
    assert not again.takes(25)
    other = open_decoder(scrambled(GPTConfig(**TINY | {"n_layer": 1})), "yes")
    assert isinstance(other, CompiledDecoder)
    assert other.most_rows == compiled.MOST_ROWS


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.slow
def test_both_ways_read_the_same_tokens(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In as many rows as the context needs; the logits agree."""
    decoder = open_decoder(scrambled(GPTConfig(**TINY)), "yes")
    assert isinstance(decoder, CompiledDecoder)
    found: dict[str, Tensor] = {}
    steps, head = decoder.logits, decoder.model.lm_head.forward

    def kept(name: str, work: Any) -> Any:
        def call(*given: Any) -> Tensor:
            found[name] = work(*given)
            return found[name]

        return call

    monkeypatch.setattr(decoder, "logits", kept("compiled", steps))
    monkeypatch.setattr(decoder.model.lm_head, "forward", kept("pytorch", head))
    crossover.is_faster(decoder, count)
    torch.testing.assert_close(found["pytorch"].flatten(0, 1), found["compiled"])
