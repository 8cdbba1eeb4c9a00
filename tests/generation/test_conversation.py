"""A conversation reads what the template writes, remembers, forgets the oldest, and ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gptsmith import GPT, GPTConfig, Tokenizer
from gptsmith.config.settings import GREEDY
from gptsmith.generation.compiled import open_decoder
from gptsmith.generation.conversation import Conversation
from gptsmith.generation.slots import Slots, Span
from gptsmith.generation.writing import generate_greedy
from gptsmith.tokenizers import byte_tokenizer, char_tokenizer
from gptsmith.tokenizers.build import with_special
from gptsmith.tokenizers.chat import PLAIN, open_template, with_template
from gptsmith.tokenizers.tokenizer import END_OF_TEXT
from tests.conftest import TINY, scrambled

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def parts(source: str = PLAIN, **sizes: Any) -> tuple[GPT, Tokenizer, Any]:
    """A model with a context of 200 bytes, a tokenizer and a template."""
    tokenizer = with_special(byte_tokenizer(), ["<|im_start|>", "<|im_end|>"])
    tokenizer = with_template(tokenizer, source)
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": 200, **sizes}
    model = scrambled(GPTConfig(**(TINY | sizes)))
    return model, tokenizer, open_template(Path("there"), tokenizer)


def talk(source: str = PLAIN, **choices: Any) -> Conversation:
    model, tokenizer, template = parts(source)
    return Conversation(
        model, tokenizer, template, **{"sampling": GREEDY, "max_tokens": 9, **choices}
    )


def test_each_answer_continues_the_whole_conversation() -> None:
    model, tokenizer, template = parts(CHATML)
    conversation = talk(CHATML, system="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for question in ("How are you?", "And then?"):
        messages.append({"role": "user", "content": question})
        found = "".join(conversation.answer(question))
        ids = template.ids(messages)
        new = generate_greedy(model, torch.tensor([ids]), 9)[0, len(ids) :].tolist()
        assert found == tokenizer.decode(new)
        assert conversation.finish == "length"
        messages.append({"role": "assistant", "content": found})
        assert conversation.messages == messages
    conversation.reset()
    assert conversation.messages == messages[:1]


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("compiled", [True, False])
def test_with_a_compiled_step_a_turn_reads_only_what_is_new(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = with_special(char_tokenizer("next question of thirty-two letters?"), [END_OF_TEXT])
    tokenizer = with_template(tokenizer, PLAIN)  # whatever a char model writes is read as the same
    template = open_template(Path("there"), tokenizer)
    assert template is not None
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": 200}
    model = scrambled(GPTConfig(**(TINY | sizes)))
    decoder = open_decoder(model, "yes") if compiled else None
    read: list[int] = []
    before = Slots.read

    def counted(self: Slots, spans: Sequence[Span]) -> torch.Tensor:
        read.extend(len(span.tokens) for span in spans)
        return before(self, spans)

    monkeypatch.setattr(Slots, "read", counted)
    conversation = Conversation(
        model, tokenizer, template, sampling=GREEDY, max_tokens=9, decoder=decoder
    )
    "".join(conversation.answer("question of thirty-two letters?"))
    read.clear()
    "".join(conversation.answer("next?"))
    # New are the answer's last token, <|endoftext|> after it, and the message.
    new = 7 if compiled else len(template.ids(conversation.messages[:3]))
    assert read[-8:] == [1] * 8  # of the answer
    assert sum(read[:-8]) == new


def test_it_ends_at_the_token_that_the_template_writes_after_an_answer() -> None:
    model, tokenizer, template = parts(CHATML, tie_weights=False)
    end = tokenizer.vocab["<|im_end|>"]
    assert end not in tokenizer.ends
    with torch.no_grad():  # it says nothing but that
        model.lm_head.weight.zero_()
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)  # type: ignore[union-attr, operator]
        model.lm_head.weight[end] = 1.0
    conversation = Conversation(model, tokenizer, template, sampling=GREEDY)
    assert "".join(conversation.answer("Well?")) == ""
    assert conversation.finish == "stop"
    assert conversation.messages[-1] == {"role": "assistant", "content": ""}


def test_the_oldest_turns_leave_and_the_system_stays() -> None:
    conversation = talk(system="Stay.")
    forgotten = []
    for number in range(12):
        "".join(conversation.answer(f"This is my question of number {number}."))
        forgotten.append(conversation.forgotten)
        assert len(conversation.template.ids(conversation.messages[:-1])) <= 200 - 9
        assert conversation.messages[0] == {"role": "system", "content": "Stay."}
        assert conversation.messages[-2]["content"].endswith(f" {number}.")
        assert [m["role"] for m in conversation.turns[:2]] == ["user", "assistant"]
    assert forgotten[0] == 0
    # Several at once, so that most turns go on from what is cached.
    assert {0} < {*forgotten}
    assert forgotten.count(0) > 6


def test_a_stopped_answer_is_kept_and_an_empty_one_forgotten() -> None:
    conversation = talk()
    pieces = conversation.answer("Go on")
    written = next(pieces) + next(pieces) + next(pieces)
    pieces.close()
    assert conversation.finish is None
    assert conversation.messages[-1] == {"role": "assistant", "content": written}
    assert conversation.engine.idle
    before = conversation.messages
    pieces = conversation.answer("x" * 100)  # more than a step reads
    assert next(pieces) == ""
    pieces.close()
    assert conversation.messages == before
    assert conversation.engine.idle


def test_what_does_not_fit_or_is_refused_is_forgotten() -> None:
    conversation = talk()
    with pytest.raises(ValueError, match=r"201 tokens, but the model's context_length is 200"):
        next(conversation.answer("x" * 201))
    assert conversation.messages == []
    picky = talk(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="no system"):
        picky.instruct("Be kind.")
    assert "".join(picky.answer("Hello"))


def test_answers_are_sampled_by_their_seeds() -> None:
    def answers(seed: int) -> list[str]:
        conversation = talk(seed=seed, sampling=GREEDY.__class__(temperature=1.0))
        return ["".join(conversation.answer("Again")) for _ in range(2)]

    assert answers(3) == answers(3)
    assert answers(3) != answers(4)
