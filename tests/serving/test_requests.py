"""What a request may say, the jobs that it becomes, and how tokens become text and logprobs."""

import codecs
import json
import math
import typing

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gptsmith import GPTConfig
from gptsmith.config.settings import SamplingSettings
from gptsmith.generation.job import Job, News, Scored
from gptsmith.generation.text import Piece, Text, joined
from gptsmith.serving.answers import ChatCompletionBuilder, CompletionBuilder, event
from gptsmith.serving.errors import ApiError, mistake, refused
from gptsmith.serving.jobs import jobs
from gptsmith.serving.logprobs import completion_logprobs, token_name
from gptsmith.serving.requests import ChatCompletionRequest, CompletionRequest
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY

CONFIG = GPTConfig(**TINY)
JOB = Job(prompt=[1], max_tokens=5, sampling=SamplingSettings(), seed=0)


def refusal(kind: type, body: object) -> tuple[str, str | None]:
    """The message and field of the error that a body is refused with."""
    try:
        kind.model_validate(body)
    except ApiError as error:
        found = error
    except ValidationError as error:
        found = mistake(error.errors())
    else:
        raise AssertionError(f"{body} was accepted")
    assert found.status == 400
    assert found.body.error.type == "invalid_request_error"
    return found.body.error.message, found.body.error.param


def asked(request, rows=([1, 2],), config=CONFIG) -> list[Job]:
    return jobs(request, rows, config, beginning=[0], ends=frozenset({3}), deadline=9.0)


# -- what is refused


@pytest.mark.parametrize(
    ("said", "message", "param"),
    [
        (
            {"temprature": 1},
            "unknown field 'temprature', did you mean 'temperature",
            "temprature",
        ),
        ({"temperature": "hot"}, "temperature is 'hot': a number is needed", "temperature"),
        ({"temperature": "1"}, "temperature is '1': a number is needed", "temperature"),
        ({"temperature": 2.1}, "temperature is 2.1: at most 2.0 is needed", "temperature"),
        ({"temperature": math.nan}, "temperature is NaN: a finite number is needed", "temperature"),
        ({"temperature": True}, "temperature is true: a number is needed", "temperature"),
        ({"max_tokens": True}, "max_tokens is true: a whole number is needed", "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5: a whole number is needed", "max_tokens"),
        ({"max_tokens": -1}, "max_tokens is -1: at least 0 is needed", "max_tokens"),
        ({"top_p": 0}, "top_p is 0: above 0.0 is needed", "top_p"),
        ({"n": 129}, "n is 129: at most 128 is needed", "n"),
        ({"n": 0}, "n is 0: at least 1 is needed", "n"),
        ({"stream": 1}, "stream is 1: true or false is needed", "stream"),
        ({"logprobs": 21}, "logprobs is 21: at most 20 is needed", "logprobs"),
        ({"n": 3, "best_of": 2}, "best_of is 2: at least n, 3, is needed", "best_of"),
        (
            {"best_of": 2, "stream": True},
            "best_of cannot be streamed, because the best is known only at the end",
            "best_of",
        ),
        (
            {"suffix": "x"},
            "suffix is not supported: GPT-2 writes from left to right, leave it out",
            "suffix",
        ),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options needs stream true: leave it out",
            "stream_options",
        ),
        (
            {"stream_options": {"include_usge": True}},
            "unknown field 'include_usge', did you mean 'include_usage'?",
            "include_usge",
        ),
        ({"stream_options": 3}, "stream_options is 3: an object is needed", "stream_options"),
        ({"stop": ""}, "stop: a stop string is empty: at least one character", "stop"),
        ({"stop": [1]}, "stop: a text or a list of texts is needed", "stop"),
        (
            {"stop": ["a"] * 17},
            "stop: at most 16 strings of at most 1,000 characters are possible",
            "stop",
        ),
        (
            {"prompt": []},
            "prompt: text, token ids, or a list of either is needed",
            "prompt",
        ),
        (
            {"prompt": [[]]},
            "prompt: one of its lists of token ids is empty: at least one",
            "prompt",
        ),
        ({"prompt": ["a", 1]}, "prompt: a list must hold only texts, only token ids, or", "prompt"),
        ({"prompt": [True]}, "prompt: a list must hold only texts, only token ids, or", "prompt"),
        ({"logit_bias": {"a": 1}}, "logit_bias: 'a' is not a token id", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias: '-1' is not a token id", "logit_bias"),
        (
            {"logit_bias": {"1": 101}},
            "logit_bias: 101 for token 1: a number from -100",
            "logit_bias",
        ),
        ({"logit_bias": {"1": math.nan}}, "logit_bias: NaN for token 1: a number", "logit_bias"),
        ({"model": 3}, "model is 3: text is needed", "model"),
        ({"model": None}, "model is missing", "model"),
        ({"x" * 100: 3}, "unknown field '" + "x" * 40 + "…'", "x" * 40 + "…"),
    ],
)
def test_a_completion_that_cannot_be_is_refused_in_a_line(said, message, param) -> None:
    got, field = refusal(CompletionRequest, {"model": "m"} | said)
    assert got.startswith(message)
    assert field == param
    assert "\n" not in got


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"messages": []}, "messages is a list: at least 1 is needed"),
        ({"messages": None}, "messages is missing"),
        ({"messages": ["hi"]}, "messages.0 is 'hi': an object is needed"),
        (
            {"messages": [{"role": "king", "content": "x"}]},
            "messages.0.role is 'king': 'system', 'developer', 'user' or 'assistant' is needed",
        ),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content: parts of type 'image_url' are not supported: only text is",
        ),
        *(
            (
                {name: value},
                f"{name} is not supported: this model only writes text, leave it out{rest}",
            )
            for name, value, rest in (
                ("tools", [{"type": "function"}], ", or send []"),
                ("tool_choice", "required", ', or send "none" or "auto"'),
                ("functions", [{"name": "f"}], ", or send []"),
                ("function_call", {"name": "f"}, ', or send "none" or "auto"'),
                ("modalities", ["text", "audio"], ', or send ["text"]'),
                ("audio", {"voice": "ash", "format": "wav"}, ""),
                ("prediction", {"type": "content", "content": "x"}, ""),
                ("web_search_options", {}, ""),
                ("reasoning_effort", "high", ', or send "none"'),
                ("store", True, ", or send false"),
                ("store", 0, ", or send false"),
                ("response_format", {"type": "json_object"}, ', or send {"type": "text"}'),
                (
                    "response_format",
                    {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
                    ', or send {"type": "text"}',
                ),
            )
        ),
        (
            {"messages": [{"role": "user", "content": "x", "annotations": [{}]}]},
            "annotations is not supported: this model only writes text, leave it out, or send []",
        ),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens is 5: at most max_tokens, 4, is possible"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0 is -1: at least 0 is needed"),
        ({"metadata": {"a": 1}}, "metadata.a is 1: text is needed"),
        (
            {"paralel_tool_calls": True},
            "unknown field 'paralel_tool_calls', did you mean 'parallel_tool_calls'?",
        ),
        ({"toolz": []}, "unknown field 'toolz', did you mean 'tools'?"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs true: set it"),
        ({"logprobs": 2}, "logprobs is 2: true or false is needed"),
        (
            {"max_tokens": 1, "max_completion_tokens": 1},
            "max_tokens is the older name of max_completion_tokens: give only one",
        ),
    ],
)
def test_a_chat_that_cannot_be_is_refused_in_a_line(said, message) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
    assert refusal(ChatCompletionRequest, body | said)[0] == message


@pytest.mark.parametrize("body", [3, [1], "x", None])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    assert refusal(CompletionRequest, body)[0].startswith("the body is ")


def test_an_enormous_list_of_mistakes_is_refused_at_its_first() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"model": "m", "messages": [1] * 100_000})
    assert len(caught.value.errors()) == 1


@pytest.mark.slow
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists), st.data())
def test_whatever_is_sent_is_taken_or_refused_in_a_line(value: object, data: st.DataObject) -> None:
    for kind in (CompletionRequest, ChatCompletionRequest):
        name = data.draw(st.sampled_from(sorted(kind.model_fields)))
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        if kind is CompletionRequest:
            del body["messages"]
        try:
            kind.model_validate(body | {name: value})
        except (ApiError, ValidationError):
            message, _ = refusal(kind, body | {name: value})
            assert len(message) < 200
            assert "\n" not in message
            json.loads(refused(message).body.model_dump_json())


# -- what is taken


def test_null_is_as_if_it_were_not_there() -> None:
    names = [name for name in CompletionRequest.model_fields if name != "model"]
    said = CompletionRequest.model_validate({"model": "m"} | dict.fromkeys([*names, "suffix"]))
    assert said == CompletionRequest(model="m")
    schema = CompletionRequest.model_json_schema()
    for name in names:
        assert {"type": "null"} in schema["properties"][name]["anyOf"], name
    assert schema["properties"]["model"]["type"] == "string"


@pytest.mark.parametrize(
    "said",
    [
        {"suffix": ""},
        {"min_tokens": 0},
        {"stop_token_ids": []},
        {"ignore_eos": False},
        {"top_k": -1},
        {"top_k": 0},
        {"min_p": 0},
        {"min_p": 0.0},
        {"logprobs": False},
        {"logit_bias": {}},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False, "include_obfuscation": False}},
        {"max_tokens": 16.0, "n": 1.0, "temperature": 1},
    ],
    ids=str,
)
def test_what_asks_for_nothing_is_as_if_it_were_not_there(said: dict[str, object]) -> None:
    assert CompletionRequest.model_validate({"model": "m"} | said) == CompletionRequest(model="m")


def test_what_asks_for_nothing_in_a_chat_is_as_if_it_were_not_there() -> None:
    """Every field of OpenAI's type, at the value that its documentation calls the default."""
    message = {"role": "assistant", "content": "hi"}
    plain = {"model": "m", "messages": [message]}
    said = {
        "audio": None,
        "function_call": "none",
        "functions": [],
        "logprobs": False,
        "modalities": ["text"],
        "reasoning_effort": "none",
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "store": False,
        "stream_options": None,
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "verbosity": "medium",
    }
    odd = message | {"annotations": [], "audio": None, "refusal": None, "tool_calls": []}
    request = ChatCompletionRequest.model_validate(plain | said | {"messages": [odd]})
    assert request == ChatCompletionRequest.model_validate(plain)
    unused = {
        "metadata": {"run": "1"},
        "parallel_tool_calls": True,
        "prompt_cache_key": "k",
        "prompt_cache_options": {"mode": "explicit"},
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "user": "u",
    }
    ChatCompletionRequest.model_validate(plain | unused)


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_each_field_of_openai_s_own_types_is_known(kind: str) -> None:
    """None is an unknown field: it is used, accepted, or refused by its own name."""
    params = openai.types.completion_create_params
    request: type = CompletionRequest
    if kind == "chat":
        params, request = openai.types.chat.completion_create_params, ChatCompletionRequest
    names = {*typing.get_type_hints(params.CompletionCreateParamsNonStreaming)}
    assert len(names) > 15
    assert names <= {*request.model_fields, *request.neutral}


def test_whole_numbers_may_be_written_with_a_point() -> None:
    said = {"prompt": [[1.0, 2], [3.0]], "seed": 5.0, "stop_token_ids": [3.0], "logprobs": 2.0}
    request = CompletionRequest.model_validate({"model": "m"} | said)
    assert request.prompt == [[1, 2], [3]]
    assert (request.seed, request.stop_token_ids, request.logprobs) == (5, [3], 2)
    for value in (1.5, [1.5], [[1.5]], math.inf, math.nan):
        assert refusal(CompletionRequest, {"model": "m", "prompt": value})[1] == "prompt"


def test_a_text_ends_where_the_request_says() -> None:
    for said, ends in (
        ({}, {3}),
        ({"ignore_eos": True}, set()),
        ({"stop_token_ids": [5, 3]}, {3, 5}),
        ({"stop_token_ids": [5], "ignore_eos": True}, {5}),
    ):
        assert asked(CompletionRequest.model_validate({"model": "m"} | said))[0].ends == ends
    assert asked(CompletionRequest(model="m", min_tokens=3))[0].min_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "rows"),
    [
        ("ab", ["ab"]),
        ("", [""]),
        (["ab", "c"], ["ab", "c"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_the_four_forms_of_a_prompt(prompt: object, rows: list) -> None:
    assert CompletionRequest.model_validate({"model": "m", "prompt": prompt}).prompt == rows


def test_choices_are_numbered_prompt_by_prompt_and_draw_with_their_number() -> None:
    request = CompletionRequest.model_validate(
        {"model": "m", "n": 2, "best_of": 3, "seed": 40, "logit_bias": {"7": -100}, "top_k": 5}
    )
    found = asked(request, [[1, 2], [3]])
    assert [list(job.prompt) for job in found] == [[1, 2]] * 3 + [[3]] * 3
    assert [job.seed for job in found] == [40, 41, 42, 43, 44, 45]
    assert {job.alternatives for job in found} == {0}  # the best are to be found
    assert found[0].bias == {7: -100.0}
    assert found[0].sampling == SamplingSettings(temperature=1.0, top_k=5)
    assert (found[0].ends, found[0].deadline, found[0].max_tokens) == (
        {3},
        9.0,
        CONFIG.context_length,
    )


def test_without_a_seed_each_request_has_another() -> None:
    request = CompletionRequest(model="m")
    assert len({asked(request)[0].seed for _ in range(20)}) > 15


def test_a_prompt_is_scored_where_its_logprobs_are_told() -> None:
    for said, scored in (
        ({"echo": True, "logprobs": 0}, True),
        ({"echo": True}, False),
        ({"logprobs": 3}, False),
    ):
        assert asked(CompletionRequest(model="m", **said))[0].score_prompt is scored


def test_a_chat_goes_on_to_the_context_limit_unless_told() -> None:
    def most(**said: int) -> int:
        messages = [{"role": "user", "content": "hi"}]
        request = ChatCompletionRequest.model_validate({"model": "m", "messages": messages} | said)
        return asked(request)[0].max_tokens

    assert most() == CONFIG.context_length
    assert most(max_tokens=3) == 3
    assert most(max_completion_tokens=4) == 4
    assert most(max_completion_tokens=0) == 0


@pytest.mark.parametrize(
    ("said", "rows", "message", "code"),
    [
        (
            {},
            [[1] * 12],
            "the prompt has 12 tokens, but the model's context_length is 11: shorten it",
            "context_length_exceeded",
        ),
        (
            {},
            [[1], [37]],
            "the prompt has token ids outside the vocabulary: 0 to 36 are needed",
            None,
        ),
        ({}, [[-1]], "the prompt has token ids outside the vocabulary: 0 to 36 are needed", None),
        ({"logit_bias": {"37": 1}}, [[1]], "logit_bias has token 37: 0 to 36 are needed", None),
        ({"stop_token_ids": [37]}, [[1]], "stop_token_ids has token 37: 0 to 36 are needed", None),
    ],
)
def test_what_does_not_fit_the_model_is_refused(said, rows, message, code) -> None:
    with pytest.raises(ApiError, match=message) as caught:
        asked(CompletionRequest.model_validate({"model": "m"} | said), rows)
    assert caught.value.body.error.code == code


# -- tokens to text


def pushed(text: Text, ids: list[int], finish: str = "length") -> list[Piece]:
    """The pieces of a text of these ids, up to its end."""
    pieces = []
    for at, id in enumerate(ids):
        last = finish if at == len(ids) - 1 else None
        pieces.append(text.push(News(JOB, token=Scored(id, -1.0), finish=last)))
        if pieces[-1].finish:
            break
    return pieces


TOKENS = st.lists(st.sampled_from([*b"abc ", *"é€😀".encode(), 0xFF]), min_size=1, max_size=30)
STOPS = st.lists(st.text("abcé ", min_size=1, max_size=3), max_size=2)


def by_rule(ids: list[int], stop: list[str]) -> str:
    """The characters that are whole after each byte, up to the first stop string in them."""
    text = ""
    for count in range(1, len(ids) + 1):
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(bytes(ids[:count]), final=count == len(ids))
        if places := [text.find(word) for word in stop if word in text]:
            return text[: min(places)]
    return text


@given(TOKENS, STOPS)
def test_a_text_is_what_generation_gives_and_its_tokens_write_it(
    ids: list[int], stop: list[str]
) -> None:
    tokenizer = byte_tokenizer()
    pieces = pushed(Text(tokenizer, stop=stop, with_tokens=True), ids)
    whole = joined(pieces)
    assert whole.text == by_rule(ids, stop)
    assert whole.finish == ("stop" if any(s in tokenizer.decode(ids) for s in stop) else "length")
    told = [each.token.id for each in whole.tokens]
    assert told == ids[: len(told)]  # none is lost, none told twice
    if whole.finish == "length":
        assert told == ids
    offsets = [each.offset for each in whole.tokens]
    assert offsets == sorted(offsets)
    for each in whole.tokens:
        if each.token.id < 128:
            assert whole.text[each.offset] == chr(each.token.id)
    sent = 0
    for piece in pieces[:-1]:  # a token comes when all it writes has come
        sent += len(piece.text)
        assert all(each.offset < sent for each in piece.tokens)


def test_a_token_waits_for_its_character_and_a_stop_string_for_its_end() -> None:
    tokenizer = byte_tokenizer()
    pieces = pushed(Text(tokenizer, stop=["xyz"], with_tokens=True), [*"é".encode(), *b"axyb"])
    assert [piece.text for piece in pieces] == ["", "é", "a", "", "", "xyb"]
    assert [[told.token.id for told in piece.tokens] for piece in pieces] == [
        [],
        [*"é".encode()],
        [*b"a"],
        [],
        [],
        [*b"xyb"],
    ]


def test_the_token_that_ends_a_text_is_no_part_of_it() -> None:
    tokenizer = byte_tokenizer()
    whole = joined(pushed(Text(tokenizer, with_tokens=True), [*b"ab", 256], finish="stop"))
    assert (whole.text, whole.finish, len(whole.tokens)) == ("ab", "stop", 2)


def test_the_token_that_ends_a_text_is_told_where_wanted() -> None:
    tokenizer = byte_tokenizer()

    def told(ids: list[int], stop: list[str]) -> tuple[str, list[tuple[int, int]]]:
        text = Text(tokenizer, stop=stop, with_tokens=True, with_end=True)
        whole = joined(pushed(text, [*ids, 256], finish="stop"))
        return whole.text, [(each.token.id, each.offset) for each in whole.tokens]

    assert told([97, 98], []) == ("ab", [(97, 0), (98, 1), (256, 2)])
    assert told([], []) == ("", [(256, 0)])
    assert told([97, 0xC3], []) == ("a\ufffd", [(97, 0), (0xC3, 1), (256, 2)])
    assert told([97, 98], ["b"]) == ("a", [(97, 0)])
    assert told([97, 0xC3], ["\ufffd"]) == ("a", [(97, 0)])


def test_a_prompt_comes_first_with_its_tokens() -> None:
    tokenizer = byte_tokenizer()
    text = Text(tokenizer, echo="aé", with_tokens=True)
    prompt = tuple(Scored(id, None if id == 97 else -2.0) for id in "aé".encode())
    assert not text.push(News(JOB, prompt=prompt[:1]))
    assert not text.push(News(JOB, prompt=prompt[1:]))
    piece = text.push(News(JOB, token=Scored(98, -1.0)))
    assert piece.text == "aéb"
    assert [(told.token.id, told.offset) for told in piece.tokens] == [
        (97, 0),
        (0xC3, 1),
        (0xA9, 1),
        (98, 2),
    ]


def test_an_empty_prompt_is_read_as_its_beginning_which_nobody_is_told() -> None:
    request = CompletionRequest.model_validate({"model": "m", "echo": True, "logprobs": 1})
    empty, other = asked(request, [[], [5]])
    assert (list(empty.prompt), empty.score_prompt) == ([0], False)
    assert (list(other.prompt), other.score_prompt) == ([5], True)


def test_a_stop_string_does_not_end_a_text_before_min_tokens() -> None:
    text = Text(byte_tokenizer(), stop=["ab", "c"], min_tokens=3)
    pieces = pushed(text, [*b"abcabc"])
    assert "".join(piece.text for piece in pieces) == "abc"
    assert pieces[-1].finish == "stop"
    # The first token after the minimum may end it; one that began before it may not.
    assert (
        joined(pushed(Text(byte_tokenizer(), stop=["bc"], min_tokens=2), [*b"abc"])).text == "abc"
    )


# -- answers


def test_no_two_tokens_have_one_name() -> None:
    tokenizer = byte_tokenizer()
    names = [token_name(tokenizer, id) for id in range(tokenizer.vocab_size + 3)]
    assert len(set(names)) == len(names)
    assert names[0xE2] == "bytes:\\xe2"
    assert names[ord("a")] == "a"


def test_the_chosen_token_is_among_the_likeliest_and_json_can_hold_all() -> None:
    tokenizer = byte_tokenizer()
    tokens = [Scored(97, -math.inf, ((98, -0.5), (99, -1.5))), Scored(98, -0.5, ((98, -0.5),))]
    text = Text(tokenizer, with_tokens=True)
    piece = joined([text.push(News(JOB, token=token)) for token in tokens])
    told = json.loads(event(completion_logprobs(tokenizer, piece.tokens))[len("data: ") :])
    assert told == {
        "tokens": ["a", "b"],
        "token_logprobs": [-9999.0, -0.5],
        "top_logprobs": [{"b": -0.5, "c": -1.5, "a": -9999.0}, {"b": -0.5}],
        "text_offset": [0, 1],
    }
    chat = ChatCompletionBuilder("m", tokenizer, logprobs=True).choice(0, piece)["logprobs"][
        "content"
    ]
    assert chat[1] == {
        "token": "b",
        "logprob": -0.5,
        "bytes": [98],
        "top_logprobs": [{"token": "b", "logprob": -0.5, "bytes": [98]}],
    }


def test_half_a_pair_of_utf_16_is_written_as_an_escape() -> None:
    """UTF-8 has no way to write it; a message may quote one that a client sent."""
    error = refused("what\ud800é", param="\udfff")
    told = json.loads(error.response().body)["error"]
    assert (told["message"], told["param"]) == ("what\\ud800é", "\\udfff")


def test_all_events_of_an_answer_have_one_id_and_two_answers_have_two() -> None:
    tokenizer = byte_tokenizer()
    answers = [CompletionBuilder("m", tokenizer, logprobs=False) for _ in range(2)]
    parts = [
        [a.chunk(0, Piece("x"), first=first)["id"] for first in (True, False)] for a in answers
    ]
    assert parts[0][0] == parts[0][1] != parts[1][0]
