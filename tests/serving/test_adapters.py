"""A server with adapters: requests choose by name, and each gets what it would get alone."""

from pathlib import Path
from threading import Thread
from typing import Any

import openai
import pytest
import torch

import gptsmith
from gptsmith import GPTConfig
from gptsmith.cli.main import find_verb
from gptsmith.cli.serve import open_served
from gptsmith.config.fields import SettingError
from gptsmith.config.lora import LoRASettings
from gptsmith.config.settings import ServingSettings
from gptsmith.model.lora import add_lora, lora_layers, lora_parameters, own_bytes
from gptsmith.serving.handler import ServedModel
from gptsmith.serving.worker import Turns
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled
from tests.serving.running import serving

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "to"
NAMES = ("toy", "upper", "plain")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, tokenizer = tmp_path_factory.mktemp("adapters"), byte_tokenizer()
    sizes = {**TINY, "vocab_size": tokenizer.vocab_size, "context_length": 24}
    gptsmith.save(scrambled(GPTConfig(**sizes)), tokenizer, place / "base")
    for seed, name in enumerate(("one", "two")):
        model = scrambled(GPTConfig(**sizes))
        targets = ("c_attn",) if name == "two" else ("c_attn", "c_fc", "c_proj")
        add_lora(model, LoRASettings(rank=2, alpha=4, targets=targets, base=str(place / "base")))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.normal_(0, 0.5, generator=generator)
        assert list(lora_layers(model))
        gptsmith.save(model, tokenizer, place / name)
    return place


def opened(folders: Path, *more: str) -> ServedModel:
    """What `gptsmith serve` opens, given these words."""
    verb, parser = find_verb("serve")
    words = [str(folders / "base"), "--name", "toy", "--slots", "2", "--compile", "no", *more]
    options = parser.parse([*words, "--threads", "1"])
    settings = ServingSettings(
        **{n: v for n, v in vars(options).items() if n in ("name", "slots", "adapter")}
    )
    assert verb.open_served is open_served
    served: ServedModel = open_served(options, settings)
    return served


@pytest.fixture
def served(folders: Path) -> ServedModel:
    words = [f"{name}={folders / path}" for name, path in (("upper", "one"), ("plain", "two"))]
    return opened(folders, "--adapter", words[0], "--adapter", words[1])


def test_each_gets_what_it_would_get_alone(folders: Path, served: ServedModel) -> None:
    """Also when all are asked at once; the base among them."""
    greedy: dict[str, Any] = {"max_tokens": 20, "seed": 0}
    greedy["sampling"] = gptsmith.SamplingSettings(temperature=0)
    alone = {}
    for name, path in zip(NAMES, ("base", "one", "two"), strict=True):
        (alone[name],) = gptsmith.generate(*gptsmith.load(folders / path), [PROMPT], **greedy)
    assert len(set(alone.values())) == 3
    base = served.service.engine.slots.model
    with serving(base, served.tokenizer, adapters=served.adapters) as running:
        client = running.client()
        assert [model.id for model in client.models.list()] == [*NAMES]
        assert client.models.retrieve("upper").id == "upper"
        got: dict[tuple[str, int], str] = {}

        def ask(name: str, number: int) -> None:
            answer = client.completions.create(
                model=name, prompt=PROMPT, max_tokens=20, temperature=0
            )
            assert answer.model == name
            got[name, number] = answer.choices[0].text

        threads = [Thread(target=ask, args=(name, n)) for n in range(3) for name in NAMES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == {(name, n): alone[name] for n in range(3) for name in NAMES}
        with pytest.raises(openai.NotFoundError, match="use 'toy' or 'upper' or 'plain'"):
            ask("lower", 0)


def test_only_the_touched_matrices_are_in_memory_again(served: ServedModel) -> None:
    base = served.service.engine.slots.model
    upper, plain = (each.service.engine.slots.model for each in served.adapters)
    matrices = {"one": 12 * 12 * 12, "two": 3 * 12 * 12}  # numbers of the layers of a block
    assert own_bytes(upper, base) == 2 * 4 * matrices["one"]
    assert own_bytes(plain, base) == 2 * 4 * matrices["two"]
    assert plain.lm_head.weight is plain.wte.weight is base.wte.weight


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("upper",), "is .upper.: NAME=PATH is needed"),
        (("a=x", "a=y"), "the name 'a' twice"),
        (("=x",), "is .=x.: NAME=PATH is needed"),
    ],
)
def test_mistakes_in_the_flag(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ServingSettings(adapter=words)


def test_a_folder_that_is_no_adapter_is_refused(folders: Path) -> None:
    with pytest.raises(ValueError, match="is a whole model, and no adapter"):
        opened(folders, "--adapter", f"same={folders / 'base'}")


def test_nobody_has_two_turns_while_another_waits() -> None:
    turns, order = Turns(), []

    def work(name: str) -> Any:
        for _ in range(50):
            with turns:
                order.append(name)

    threads = [Thread(target=work, args=(name,)) for name in "ab"]
    with turns:
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join()
    assert sorted(order) == ["a"] * 50 + ["b"] * 50
