"""Chat templates: the ids that transformers gives, and no message that passes for the template."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith import GPTConfig, save
from gptsmith.tokenizers import (
    Tokenizer,
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    with_special,
)
from gptsmith.tokenizers.chat import BUILT_IN, ChatTemplate, open_template, with_template
from tests.conftest import TINY, scrambled

CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}\n"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
RICH = (
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 9 %}{% break %}{% endif %}\n"
    "  {% if m.role == 'system' %}{{ {'said': m.content} | tojson }}{% else %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": " be <kind> & short\n"},
    {"role": "user", "content": "hé < there |>"},
    {"role": "assistant", "content": "yes\n\nno"},
    {"role": "user", "content": "x"},
]


def tokenizer_with(*specials: str) -> Tokenizer:
    backend = byte_tokenizer().backend
    backend.add_special_tokens(list(specials))
    return Tokenizer(backend)


CHAT = tokenizer_with("<|im_start|>", "<|im_end|>")
START, END = CHAT.vocab["<|im_start|>"], CHAT.vocab["<|im_end|>"]


def folder_with(path: Path, tokenizer: Tokenizer, **said: object) -> Path:
    """A model's folder whose tokenizer_config.json says more."""
    save(scrambled(GPTConfig(**(TINY | {"vocab_size": tokenizer.vocab_size}))), tokenizer, path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | said))
    (path / "manifest.json").unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("source", [CHATML, RICH])
def test_a_conversation_becomes_the_ids_that_transformers_gives(
    tmp_path: Path, source: str
) -> None:
    from transformers import AutoTokenizer

    folder = folder_with(tmp_path / "m", CHAT, chat_template=source, eos_token="<|im_end|>")
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    template = open_template(folder, load_tokenizer(folder))
    assert template is not None
    assert template.ids(TALK) == expected
    assert END in expected


def test_a_template_may_lie_in_three_places(tmp_path: Path) -> None:
    none = folder_with(tmp_path / "none", CHAT)
    assert open_template(none, load_tokenizer(none)) is None
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = folder_with(tmp_path / "m", CHAT, chat_template=several)
    found = open_template(folder, load_tokenizer(folder))
    assert found is not None
    assert found.ids(TALK) == [*b"D"]
    (folder / "chat_template.jinja").write_text("F")  # what transformers writes now
    found = open_template(folder, load_tokenizer(folder))
    assert found is not None
    assert found.ids(TALK) == [*b"F"]


PARTS = ("<|im_start|>", "<|im_end|>", "<|im_", "end|>", "<", "|", ">", "<|endoftext|>", "a", " é")
CONTENT = st.lists(st.sampled_from(PARTS), max_size=5).map("".join)


@pytest.mark.slow
@given(st.lists(CONTENT, min_size=1, max_size=3))
def test_no_message_writes_a_special_token(contents: list[str]) -> None:
    """Even where the template puts two messages side by side, of which each has half of one."""
    source = "<|im_start|>{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>"
    messages = [{"role": "user", "content": text} for text in contents]
    ids = ChatTemplate(source, CHAT, {}).ids(messages)
    assert ids == [START, *"".join(contents).encode(), END]


def test_special_tokens_that_overlap_or_are_one_character_cannot_be_written_either() -> None:
    tokenizer = tokenizer_with("§", "ab", "bc", "abcd")
    template = ChatTemplate("§{{ messages[0].content }}abcd", tokenizer, {})
    found = template.ids([{"role": "user", "content": "§abc abcd ab"}])
    assert found == [tokenizer.vocab["§"], *"§abc abcd ab".encode(), tokenizer.vocab["abcd"]]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('turns must alternate') }}", "these messages: turns must alternate"),
        ("{{ messages[7].content.x }}", "the chat template refuses these messages: "),
        ("{{ 1 / 0 }}", "the chat template refuses these messages: division by zero"),
        ("{{ ''.__class__.__mro__ }}", "the chat template refuses these messages: access to attr"),
        ("{{ messages.append(1) }}", "the chat template refuses these messages: access to attr"),
    ],
)
def test_a_template_that_refuses_or_goes_too_far_says_so(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, CHAT, {}).ids(TALK)


def test_what_cannot_be_a_template_or_a_message_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", CHAT, chat_template="{% for %}")
    with pytest.raises(ValueError, match="m: the chat template is not valid Jinja: "):
        open_template(folder, load_tokenizer(folder))
    with pytest.raises(ValueError, match="a message has a noncharacter, such as U"):
        ChatTemplate("{{ messages[0].content }}", CHAT, {}).ids([{"content": "a\ufdd0b"}])
    letters = char_tokenizer("abc")
    with pytest.raises(ValueError, match="unknown character 'z'"):
        ChatTemplate("{{ messages[0].content }}", letters, {}).ids([{"content": "az"}])


# -- answers

ANSWERS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ANSWERED = [*TALK, {"role": "assistant", "content": "end\nof it."}]


@pytest.mark.parametrize("base", ["byte", "gpt2"])
@pytest.mark.parametrize("source", [ANSWERS, *BUILT_IN.values()])
def test_segments_are_transformers_ids_and_its_mask(tmp_path: Path, base: str, source: str) -> None:
    from transformers import AutoTokenizer

    fresh = {"byte": byte_tokenizer, "gpt2": gpt2_tokenizer}[base]()
    tokenizer = with_template(with_special(fresh, ["<|im_start|>", "<|im_end|>"]), source)
    tokenizer.save(tmp_path)
    judge = AutoTokenizer.from_pretrained(tmp_path)
    template = open_template(tmp_path, load_tokenizer(tmp_path))
    assert template is not None
    fixed = source == BUILT_IN["fixed-length"]
    if fixed or source == BUILT_IN["completion"]:  # learns from single exchanges: reads the last
        answered = [ANSWERED[0], *ANSWERED[-2:]]
        with pytest.raises(ValueError, match="does not write message 5 as a continuation of the"):
            template.segments(ANSWERED)
    else:
        answered = ANSWERED
    expected = judge.apply_chat_template(
        answered, return_dict=True, return_assistant_tokens_mask=True
    )
    segments = template.segments(answered)
    assert [id for segment in segments for id in segment.ids] == expected["input_ids"]
    mask = [int(segment.learned) for segment in segments for _ in segment.ids]
    if base == "byte" or source in (ANSWERS, BUILT_IN["alpaca"]):
        assert mask == expected["assistant_masks"]
    ends = [segment.ids[-1] for segment in segments if segment.learned]
    end = tokenizer.vocab["<|im_end|>" if source == ANSWERS else "<|endoftext|>"]
    assert all((id == end) != fixed for id in ends)
    # What precedes the last answer is what a server would give to the model.
    before = [id for segment in segments[: 2 * len(ends) - 1] for id in segment.ids]
    assert before == template.ids(TALK)


def test_what_follows_an_end_is_not_learned_and_no_message_can_write_one() -> None:
    template = ChatTemplate(ANSWERS, CHAT, {})
    text = "a<|im_end|>b"
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    before, answer, after = template.segments(messages)
    assert answer == ([*text.encode(), END], True)
    assert after == ([*b"\n"], False)
    assert before.ids.count(END) == 1


def test_a_template_that_rewrites_or_never_ends_an_answer_is_refused() -> None:
    rewrites = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages | length }}"
    with pytest.raises(ValueError, match="does not write message 3 as a continuation of the"):
        ChatTemplate(rewrites, CHAT, {}).segments(ANSWERED)
    endless = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="writes no special token after an answer"):
        ChatTemplate(endless, CHAT, {}).segments(ANSWERED)


@pytest.mark.parametrize("tokenizer", [CHAT, char_tokenizer("abc")], ids=["byte", "char"])
def test_answers_of_a_fixed_length_have_no_end(tokenizer: Tokenizer) -> None:
    template = ChatTemplate(BUILT_IN["fixed-length"], tokenizer, {})
    messages = [{"role": "user", "content": "cab"}, {"role": "assistant", "content": "abc"}]
    prompt, answer = tokenizer.encode("cab"), tokenizer.encode("abc")
    assert template.segments(messages) == [(prompt, False), (answer, True)]
    assert template.ids(messages[:1]) == prompt


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_new_special_tokens_are_read_by_transformers_alike(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    base = {"char": lambda: char_tokenizer("ab <|u>"), "byte": byte_tokenizer}.get(
        kind, gpt2_tokenizer
    )()
    tokenizer = with_special(base, ["<|endoftext|>", "<|u|>"])
    assert with_special(tokenizer, ["<|u|>"]) is tokenizer
    count = base.vocab_size
    assert tokenizer.vocab["<|u|>"] == count + (kind == "char")
    assert base.vocab_size == count, "the other tokenizer has grown"
    assert tokenizer.encode("ab <|u|>") == base.encode("ab <|u|>")
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    judge = AutoTokenizer.from_pretrained(tmp_path)
    assert len(judge) == tokenizer.vocab_size
    assert judge("ab <")["input_ids"] == tokenizer.encode("ab <")
    assert judge("a<|u|>b")["input_ids"] == [
        *tokenizer.encode("a"),
        tokenizer.vocab["<|u|>"],
        *tokenizer.encode("b"),
    ]
    with pytest.raises(ValueError, match="'a' cannot be a special token"):
        with_special(base, ["a"])


def test_the_date_is_written_as_a_template_likes_it() -> None:
    ids = ChatTemplate("{{ strftime_now('%Y') }}", CHAT, {}).ids([])
    assert 2026 <= int(bytes(ids)) < 2200


@pytest.mark.parametrize(
    ("eos", "ids", "expected"),
    [
        ("<|endoftext|>", None, {256}),
        ({"content": "<|im_end|>"}, None, {256, END}),
        (None, [START, 9999, -1, True], {256, START}),
        ("no such token", END, {256, END}),
    ],
)
def test_what_ends_a_text(tmp_path: Path, eos: object, ids: object, expected: set[int]) -> None:
    folder = folder_with(tmp_path / "m", CHAT, eos_token=eos)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert load_tokenizer(folder).ends == expected


def test_nothing_ends_a_text_of_letters(tmp_path: Path) -> None:
    letters = char_tokenizer("abc")
    folder = folder_with(tmp_path / "m", letters)
    assert load_tokenizer(folder).ends == frozenset()
