"""The server, asked by OpenAI's own client over real sockets."""

import asyncio
import json
import math
import re
import socket
import threading
import time
from collections.abc import Iterator

import httpx2
import openai
import pytest
import torch

from gptsmith import GPT, GPTConfig, complete
from gptsmith.config.settings import SamplingSettings
from gptsmith.serving.answers import ChatCompletion, Completion
from gptsmith.serving.errors import ErrorResponse
from gptsmith.serving.worker import suitable_slots
from gptsmith.tokenizers import Tokenizer, byte_tokenizer
from gptsmith.tokenizers.chat import ChatTemplate
from tests.conftest import TINY, scrambled, until
from tests.serving.running import Running, serving

TOKENIZER = byte_tokenizer()
END = 256
LONG = 800  # tokens that take some seconds, where a step is slowed down
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
)


def toy(context_length: int = 48) -> GPT:
    return scrambled(GPTConfig(**(TINY | {"vocab_size": 259, "context_length": context_length})))


MODEL = toy()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(MODEL, TOKENIZER, ends=frozenset({END})) as running:
        yield running


@pytest.fixture(scope="module")
def slow() -> Iterator[Running]:
    """Two slots, room for one more, and 5 ms for each step."""
    with serving(toy(1024), TOKENIZER, slots=2, waiting=1, step_seconds=0.005) as running:
        yield running


@pytest.fixture(scope="module")
def talker() -> Iterator[Running]:
    template = ChatTemplate(TEMPLATE, TOKENIZER, {})
    with serving(MODEL, TOKENIZER, ends=frozenset({END}), template=template) as running:
        yield running


def ours(prompt: str, count: int, seed: int, **choices: float) -> str:
    """What the library writes, with the same settings."""
    sampling = SamplingSettings(**({"temperature": 1.0} | choices))
    return complete(MODEL, TOKENIZER, prompt, max_tokens=count, seed=seed, sampling=sampling)[0]


def logits_after(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return MODEL(torch.tensor([ids])).logits[0, -1]


# -- completions


@pytest.mark.parametrize("temperature", [0, 0.7, 1])
def test_the_same_seed_gives_the_library_s_text(server: Running, temperature: float) -> None:
    found = server.client().completions.create(
        model="toy", prompt="To be", max_tokens=20, seed=5, temperature=temperature
    )
    assert found.choices[0].text == ours("To be", 20, 5, temperature=temperature)
    assert found.model == "toy"
    assert found.id.startswith("cmpl-")
    assert abs(found.created - time.time()) < 60


def test_extensions_are_the_library_s_settings(server: Running) -> None:
    how = {"top_k": 9, "min_p": 0.05, "repetition_penalty": 1.3}
    found = server.client().completions.create(
        model="toy", prompt="ab", max_tokens=20, seed=5, top_p=0.9, extra_body=how
    )
    assert found.choices[0].text == ours("ab", 20, 5, top_p=0.9, **how)


def test_a_prompt_in_each_form_and_n_texts_of_each(server: Running) -> None:
    create = server.client().completions.create
    texts = ["ab", "", "xyz"]
    found = create(model="toy", prompt=texts, n=2, max_tokens=9, seed=7, temperature=1)
    assert [choice.index for choice in found.choices] == list(range(6))
    expected = [ours(texts[i // 2], 9, 7 + i) for i in range(6)]
    assert [choice.text for choice in found.choices] == expected
    assert len(set(expected)) == 6
    rows = [[*text.encode()] for text in ("ab", "xyz")]
    found = create(model="toy", prompt=rows, max_tokens=9, seed=7)
    assert [choice.text for choice in found.choices] == [ours("ab", 9, 7), ours("xyz", 9, 8)]
    assert create(model="toy", prompt=rows[0], max_tokens=9, seed=7).choices[0].text == expected[0]


def test_tokens_are_counted_once_for_a_prompt_and_for_every_text(server: Running) -> None:
    create = server.client().completions.create
    bias = {str(END): -100}
    found = create(
        model="toy", prompt=["abc", "de"], n=2, best_of=3, max_tokens=4, seed=1, logit_bias=bias
    )
    assert found.usage is not None
    assert found.usage.prompt_tokens == 5
    assert found.usage.completion_tokens == 2 * 3 * 4
    assert found.usage.total_tokens == 5 + 24


def test_the_best_are_those_of_highest_mean_log_probability(server: Running) -> None:
    create = server.client().completions.create
    how = {"model": "toy", "prompt": ["ab", "c"], "max_tokens": 6, "seed": 3, "logprobs": 0}
    every = create(n=4, **how).choices
    means = [math.fsum(c.logprobs.token_logprobs) / 6 for c in every]
    assert all(len(c.logprobs.tokens) == 6 for c in every)
    expected = []
    for group in (range(4), range(4, 8)):
        best = sorted(group, key=lambda i: means[i], reverse=True)[:2]
        expected += [every[i].text for i in best]
    found = create(n=2, best_of=4, **how).choices
    assert [choice.text for choice in found] == expected
    assert [choice.index for choice in found] == [0, 1, 2, 3]


def test_a_stream_says_what_the_whole_answer_says(server: Running) -> None:
    create = server.client().completions.create
    how = {"model": "toy", "prompt": ["ab", "é"], "n": 2, "max_tokens": 20, "seed": 11}
    how |= {"logprobs": 2, "echo": True, "stop": ["q", "x"]}
    whole = create(**how)
    texts, tokens = ["", "", "", ""], [[], [], [], []]
    finish: list[str | None] = [None] * 4
    events = list(create(stream=True, stream_options={"include_usage": True}, **how))
    assert len({event.id for event in events}) == 1
    for event in events[:-1]:
        (choice,) = event.choices
        assert finish[choice.index] is None, "nothing comes after the end"
        assert event.usage is None
        texts[choice.index] += choice.text
        tokens[choice.index] += choice.logprobs.tokens
        finish[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert finish == [choice.finish_reason for choice in whole.choices]
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage


def test_a_stream_is_events_and_ends_with_done(server: Running) -> None:
    body = {"model": "toy", "prompt": "a", "max_tokens": 3, "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = "".join(answer.iter_text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["object"] == "text_completion"


def test_a_stop_string_ends_a_text_and_is_no_part_of_it(server: Running) -> None:
    create = server.client().completions.create
    text = ours("ab", 40, 2)
    stop = text[6:8]
    found = create(model="toy", prompt="ab", max_tokens=40, seed=2, stop=[stop, "never there"])
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.completion_tokens < 40


def test_logit_bias_bans_a_token_and_forces_one(server: Running) -> None:
    create = server.client().completions.create
    likeliest = int(logits_after([*b"ab"]).argmax())
    how = {"model": "toy", "prompt": "ab", "temperature": 0, "max_tokens": 1, "logprobs": 0}
    free = create(**how).choices[0].logprobs.top_logprobs[0]
    banned = create(logit_bias={str(likeliest): -100}, **how).choices[0]
    assert banned.logprobs.top_logprobs[0].keys() != free.keys()
    forced = create(logit_bias={"122": 100}, **(how | {"max_tokens": 5})).choices[0]
    assert forced.text == "zzzzz"
    assert set(forced.logprobs.tokens) == {"z"}
    # What is told is what the model itself thinks.
    expected = logits_after([*b"ab"]).log_softmax(0)[122].item()
    assert forced.logprobs.token_logprobs[0] == pytest.approx(expected, abs=1e-4)


def test_penalties_keep_tokens_from_coming_again(server: Running) -> None:
    create = server.client().completions.create
    bias = {"120": 50, "121": 49}  # x is likelier by 1 of logit, roughly, until it was written

    def text(**penalties: float) -> str:
        how = {"model": "toy", "prompt": "ab", "temperature": 0, "max_tokens": 6}
        return create(logit_bias=bias, **how, **penalties).choices[0].text

    ids, written = [*b"ab"], ""
    for _ in range(6):  # the definition, restated
        logits = logits_after(ids)
        logits[120] += 50 - 1.5 * written.count("x") - 0.5 * ("x" in written)
        logits[121] += 49 - 1.5 * written.count("y") - 0.5 * ("y" in written)
        written += chr(int(logits.argmax()))
        ids.append(ord(written[-1]))
    assert {"x", "y"} <= set(written)
    assert text(frequency_penalty=1.5, presence_penalty=0.5) == written != text()


def test_echo_and_logprobs_score_a_prompt(server: Running) -> None:
    create = server.client().completions.create
    found = create(model="toy", prompt="aéb", max_tokens=0, echo=True, logprobs=3).choices[0]
    ids = [*"aéb".encode()]
    assert found.text == "aéb"
    assert found.finish_reason == "length"
    assert found.logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9", "b"]
    assert found.logprobs.text_offset == [0, 1, 1, 2]
    assert found.logprobs.token_logprobs[0] is None
    for at in range(1, 4):
        logprobs = logits_after(ids[:at]).log_softmax(0)
        expected = logprobs[ids[at]].item()
        assert found.logprobs.token_logprobs[at] == pytest.approx(expected, abs=1e-4)
        best = logprobs.topk(3).values.tolist()
        told = sorted(found.logprobs.top_logprobs[at].values(), reverse=True)
        assert told[:3] == pytest.approx(best, abs=1e-4)
    more = create(model="toy", prompt="aéb", max_tokens=4, seed=1, echo=True).choices[0]
    assert more.text == "aéb" + ours("aéb", 4, 1)
    assert more.logprobs is None


def test_a_text_ends_at_the_context_limit(server: Running) -> None:
    create = server.client().completions.create
    how = {"model": "toy", "max_tokens": 1000, "logit_bias": {str(END): -100}}
    found = create(prompt=[65] * 40, **how)
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert 8 <= found.usage.completion_tokens <= 9
    assert create(prompt=[65] * 48, **how).choices[0].finish_reason == "length"


def test_the_end_of_text_ends_a_text(server: Running) -> None:
    found = server.client().completions.create(
        model="toy", prompt="ab", logit_bias={str(END): 100}, logprobs=1
    )
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("", "stop")
    assert found.choices[0].logprobs.tokens == ["<|endoftext|>"]


def test_a_prompt_is_scored_also_where_the_text_ends_at_once(server: Running) -> None:
    how = {"model": "toy", "prompt": "abc", "echo": True, "logprobs": 1, "temperature": 0}
    create = server.client().completions.create
    alone, ended = (
        create(max_tokens=count, logit_bias={str(END): 100}, **how).choices[0].logprobs
        for count in (0, 1)
    )
    assert ended.tokens == [*alone.tokens, "<|endoftext|>"]
    assert ended.token_logprobs[:-1] == alone.token_logprobs
    assert ended.text_offset == [0, 1, 2, 3]


def test_many_clients_at_once_get_what_each_would_get_alone(server: Running) -> None:
    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="any", max_retries=0
        ) as client:

            async def one(seed: int) -> str:
                if seed % 2:
                    found = await client.completions.create(
                        model="toy", prompt="ab", max_tokens=15, seed=seed
                    )
                    return found.choices[0].text
                events = await client.completions.create(
                    model="toy", prompt="ab", max_tokens=15, seed=seed, stream=True
                )
                return "".join([event.choices[0].text async for event in events])

            return await asyncio.gather(*map(one, range(12)))

    assert asyncio.run(everybody()) == [ours("ab", 15, seed) for seed in range(12)]


# -- what OpenAI's client and vLLM's send unasked


def test_what_asks_for_nothing_changes_nothing(server: Running, talker: Running) -> None:
    create = server.client().completions.create
    how = {"model": "toy", "prompt": "ab", "max_tokens": 9, "seed": 5}
    plain = create(**how).choices[0].text
    neutral = {"min_tokens": 0, "stop_token_ids": [], "ignore_eos": False, "top_k": -1, "min_p": 0}
    assert create(**how, suffix="", user="u", extra_body=neutral).choices[0].text == plain
    assert create(**(how | {"max_tokens": 9.0, "seed": 5.0})).choices[0].text == plain
    for k in (0, 259, 260, 10**12):
        assert create(**how, extra_body={"top_k": k}).choices[0].text == plain

    messages = [{"role": "user", "content": "hi"}]
    talk = talker.client().chat.completions.create
    how = {"model": "toy", "max_completion_tokens": 9, "seed": 5}
    first = talk(messages=messages, **how).choices[0].message
    answer = first.to_dict() | {"annotations": [], "audio": None, "tool_calls": []}
    found = talk(
        messages=messages,
        function_call="none",
        functions=[],
        logprobs=False,
        metadata={"a": "b"},
        modalities=["text"],
        parallel_tool_calls=False,
        prompt_cache_key="k",
        response_format={"type": "text"},
        safety_identifier="s",
        service_tier="auto",
        store=False,
        tool_choice="none",
        tools=[],
        **how,
    )
    assert found.choices[0].message.content == first.content
    assert talk(messages=[*messages, answer], **how).choices[0].message.content is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
        ("tools", [{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        ("reasoning_effort", "high"),
        ("store", True),
        ("modalities", ["text", "audio"]),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_own_name(
    talker: Running, name: str, value: object
) -> None:
    with pytest.raises(openai.BadRequestError, match=f"{name} is not supported") as caught:
        talker.client().chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "x"}], **{name: value}
        )
    assert caught.value.param == name


def test_a_benchmark_gets_as_many_tokens_as_it_wants(server: Running) -> None:
    """As guidellm and `vllm bench serve` ask."""
    create = server.client().completions.create
    how = {"model": "toy", "prompt": "ab", "max_tokens": 20, "logit_bias": {str(END): 100}}
    assert create(**how).usage.completion_tokens == 1
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"ignore_eos": True, "repetition_penalty": 1.0}
    *events, last = create(stream=True, stream_options=options, extra_body=body, **how)
    assert events[-1].choices[0].finish_reason == "length"
    counts = [event.usage.completion_tokens for event in events]
    assert counts == sorted(counts)
    assert (last.choices, last.usage.completion_tokens) == ([], 20)
    assert {event.usage.prompt_tokens for event in [*events, last]} == {2}
    found = create(extra_body={"min_tokens": 6}, **how)
    assert (found.usage.completion_tokens, found.choices[0].finish_reason) == (7, "stop")


def test_a_text_ends_at_a_token_of_the_request(server: Running) -> None:
    text = ours("ab", 20, 3)
    last = next(letter for letter in text[3:] if letter.isascii())
    body = {"stop_token_ids": [ord(last)]}
    create = server.client().completions.create
    found = create(model="toy", prompt="ab", max_tokens=20, seed=3, extra_body=body).choices[0]
    assert found.text == text[: text.index(last)]
    assert found.finish_reason == "stop"


def test_an_empty_prompt_has_no_tokens(server: Running) -> None:
    """The model reads <|endoftext|> in its place, which is neither counted nor echoed."""
    create = server.client().completions.create
    found = create(model="toy", prompt="", max_tokens=3, temperature=0, echo=True, logprobs=1)
    assert found.choices[0].text == ours("", 3, 1, temperature=0)
    assert found.usage.prompt_tokens == 0
    logprobs = found.choices[0].logprobs
    assert logprobs.text_offset[0] == 0
    assert len(logprobs.tokens) == found.usage.completion_tokens
    expected = logits_after([END]).log_softmax(0)
    assert logprobs.token_logprobs[0] == pytest.approx(expected.max().item(), abs=1e-4)
    scored = create(model="toy", prompt=["", "a"], max_tokens=0, echo=True, logprobs=1)
    assert [choice.logprobs.tokens for choice in scored.choices] == [[], ["a"]]
    assert scored.usage.total_tokens == 1


# -- chat


def test_a_chat_continues_what_the_template_makes(talker: Running) -> None:
    create = talker.client().chat.completions.create
    messages = [{"role": "user", "content": "hi"}]
    how = {"model": "toy", "messages": messages, "seed": 4, "n": 2, "temperature": 1}
    found = create(max_completion_tokens=12, logprobs=True, top_logprobs=2, **how)
    prompt = "<user>hi<assistant>"
    assert [c.message.content for c in found.choices] == [ours(prompt, 12, s) for s in (4, 5)]
    assert found.choices[0].message.role == "assistant"
    assert found.usage is not None
    assert found.usage.prompt_tokens == len(prompt)
    content = found.choices[0].logprobs.content
    assert bytes(b for token in content for b in token.bytes).decode(errors="replace") == (
        found.choices[0].message.content
    )
    assert all(len(token.top_logprobs) == 2 for token in content)
    texts, finish = ["", ""], [None, None]
    for event in create(max_completion_tokens=12, stream=True, **how):
        (choice,) = event.choices
        if not texts[choice.index] and choice.delta.role is None:
            assert finish[choice.index] is None
        texts[choice.index] += choice.delta.content or ""
        finish[choice.index] = choice.finish_reason
    assert texts == [c.message.content for c in found.choices]
    assert finish == ["length", "length"]


def test_parts_of_a_message_and_our_own_answers_are_taken_back(talker: Running) -> None:
    create = talker.client().chat.completions.create
    first = create(model="toy", messages=[{"role": "user", "content": "a"}], max_tokens=3, seed=1)
    answer = first.choices[0].message
    parts = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    talk = [{"role": "user", "content": "a"}, answer, {"role": "user", "content": parts}]
    found = create(model="toy", messages=talk, max_tokens=5, seed=1)
    prompt = f"<user>a<assistant>{answer.content}<user>b\nc<assistant>"
    assert found.choices[0].message.content == ours(prompt, 5, 1)


def test_the_token_that_ends_a_message_is_not_told(talker: Running) -> None:
    found = talker.client().chat.completions.create(
        model="toy",
        messages=[{"role": "user", "content": "hi"}],
        logit_bias={str(END): 100},
        logprobs=True,
    )
    assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("", "stop")
    assert found.choices[0].logprobs is not None
    assert found.choices[0].logprobs.content == []


def test_a_chat_goes_on_up_to_the_context_limit(talker: Running) -> None:
    found = talker.client().chat.completions.create(
        model="toy", messages=[{"role": "user", "content": "hi"}], logit_bias={str(END): -100}
    )
    assert found.choices[0].finish_reason == "length"
    assert found.usage is not None
    assert 48 <= found.usage.total_tokens <= 49


def test_what_the_template_refuses_is_said(talker: Running) -> None:
    with pytest.raises(openai.BadRequestError, match="these messages: no system here"):
        talker.client().chat.completions.create(
            model="toy", messages=[{"role": "system", "content": "x"}]
        )


def test_a_model_without_a_template_points_to_completions(server: Running) -> None:
    with pytest.raises(
        openai.BadRequestError, match="send the prompt as text to /v1/completions"
    ) as caught:
        server.client().chat.completions.create(
            model="toy", messages=[{"role": "user", "content": "x"}]
        )
    assert caught.value.code == "no_chat_template"


# -- what else there is


def test_the_models_are_one(server: Running) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").id == "toy"
    with pytest.raises(openai.NotFoundError, match="this server has no model 'gpt-5': use 'toy'"):
        client.models.retrieve("gpt-5")
    assert client.completions.create(model="models/toy", prompt="a", max_tokens=1).model == "toy"


def test_answers_are_as_they_are_described(server: Running, talker: Running) -> None:
    body = {"model": "toy", "max_tokens": 3, "logprobs": 1, "echo": True}
    found = httpx2.post(f"{server.url}/v1/completions", json=body)
    Completion.model_validate(found.json(), strict=True, extra="forbid")
    chat = {"model": "toy", "messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    chat |= {"logprobs": True, "top_logprobs": 1}
    found = httpx2.post(f"{talker.url}/v1/chat/completions", json=chat)
    ChatCompletion.model_validate(found.json(), strict=True, extra="forbid")
    found = httpx2.get(f"{server.url}/v1/none")
    ErrorResponse.model_validate(found.json(), strict=True, extra="forbid")
    described = httpx2.get(f"{server.url}/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/health"} <= described["paths"].keys()
    for path in described["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]


def test_tokens_of_a_text_and_of_a_conversation_and_back(server: Running, talker: Running) -> None:
    def post(running: Running, path: str, **body: object) -> httpx2.Response:
        headers = {"content-type": "application/json"}
        return httpx2.post(running.url + path, content=json.dumps(body), headers=headers)

    found = post(server, "/tokenize", model="toy", prompt="a é", return_token_strs=True).json()
    ids = [*"a é".encode()]
    names = [TOKENIZER.backend.id_to_token(id) for id in ids]
    assert found == {"count": 4, "max_model_len": 48, "tokens": ids, "token_strs": names}
    assert names[:2] == ["a", "Ġ"]
    assert post(server, "/detokenize", tokens=ids).json() == {"prompt": "a é"}
    assert post(server, "/detokenize", tokens=[]).json() == {"prompt": ""}
    empty = post(server, "/tokenize", prompt="", add_special_tokens=True).json()
    assert (empty["count"], empty["tokens"], empty["token_strs"]) == (0, [], None)
    assert post(server, "/tokenize", prompt="x" * 100).json()["count"] == 100  # more than fit

    messages = [{"role": "user", "content": "hi <|endoftext|>"}]
    neutral = {"add_generation_prompt": True, "continue_final_message": False}
    talk = post(talker, "/tokenize", messages=messages, **neutral).json()
    text = "<user>hi <|endoftext|><assistant>"
    assert talk["tokens"] == [*text.encode()]
    assert post(talker, "/detokenize", tokens=talk["tokens"]).json() == {"prompt": text}
    chat = talker.client().chat.completions.create(model="toy", messages=messages, max_tokens=1)
    assert chat.usage.prompt_tokens == talk["count"]

    for running, path, body, status, message in (
        (server, "/tokenize", {}, 400, "either prompt or messages is needed: send one of them"),
        (server, "/tokenize", {"prompt": "a", "messages": messages}, 400, "either prompt or mess"),
        (server, "/tokenize", {"prompt": "a", "model": "x"}, 404, "this server has no model 'x'"),
        (server, "/tokenize", {"prompt": "\ud800"}, 400, "the text has a lone surrogate"),
        (server, "/tokenize", {"promt": "a"}, 400, "unknown field 'promt', did you mean 'prompt'?"),
        (server, "/tokenize", {"messages": messages}, 400, "this model has no chat template"),
        (server, "/tokenize", {"prompt": "a" * 100_000}, 400, "the prompt has 100,000 characters"),
        (server, "/detokenize", {"tokens": [259]}, 400, "tokens has token 259: 0 to 258 are neede"),
        (server, "/detokenize", {"tokens": [-1]}, 400, "tokens.0 is -1: at least 0 is needed"),
        (server, "/detokenize", {}, 400, "tokens is missing"),
        (talker, "/tokenize", {"messages": [{}]}, 400, "messages.0.role is missing"),
    ):
        found = post(running, path, **body)
        assert (found.status_code, found.json()["error"]["message"][: len(message)]) == (
            status,
            message,
        )


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/docs", "/openapi.json"])
def test_head_is_answered_wherever_get_is(server: Running, path: str) -> None:
    with httpx2.Client(base_url=server.url) as client:
        found = [client.request(method, path) for method in ("HEAD", "GET", "HEAD")]
    assert {each.status_code for each in found} == {200}
    assert found[0].content == found[2].content == b""
    same = ("content-type", "content-length", "content-security-policy")
    for name in same if path != "/metrics" else same[:1]:
        assert found[0].headers.get(name) == found[1].headers.get(name)
    until(lambda: [access.method for access in server.accesses[-3:]] == ["HEAD", "GET", "HEAD"])
    assert server.accesses[-1].bytes == 0


def test_head_of_what_is_not_there_or_only_takes_posts(server: Running) -> None:
    for path, status in (("/v1/models", 200), ("/v1/none", 404), ("/v1/completions", 405)):
        found = httpx2.head(server.url + path)
        assert (found.status_code, found.content) == (status, b"")
        assert found.headers["x-request-id"]


def test_each_answer_has_an_id_and_a_sane_one_is_the_client_s(server: Running) -> None:
    client = server.client()
    how = {"model": "toy", "prompt": "a", "max_tokens": 2}
    found = [client.completions.create(**how)._request_id for _ in range(2)]
    assert found[0] != found[1]
    assert all(each.startswith("req_") for each in found)
    given = {"x-request-id": "7f3c-Bench.12:x"}
    for stream in (False, True):
        raw = client.completions.with_raw_response.create(stream=stream, extra_headers=given, **how)
        assert raw.headers["x-request-id"] == given["x-request-id"]
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**(how | {"max_tokens": -1}))
    assert caught.value.request_id.startswith("req_")
    for odd in ("", "two words", "x" * 129, "a\tb", '"quoted"', "<b>"):
        answer = httpx2.get(f"{server.url}/v1/none", headers={"x-request-id": odd})
        assert answer.headers["x-request-id"].startswith("req_")


def test_the_page_may_run_its_own_script_only(server: Running) -> None:
    found = httpx2.get(server.url)
    assert found.headers["content-type"].startswith("text/html")
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_health_and_metrics_count(slow: Running) -> None:
    client = slow.client()
    before = slow.served.metrics.text().decode()
    stream = client.completions.create(model="toy", prompt="a", max_tokens=LONG, n=3, stream=True)
    next(iter(stream))
    health = httpx2.get(f"{slow.url}/health").json()
    assert health == {"status": "ok", "model": "toy", "running": 2, "waiting": 1, "slots": 2}
    stream.close()
    slow.wait_until_idle()
    text = httpx2.get(f"{slow.url}/metrics").text
    assert 'gptsmith_tokens_total{kind="prompt"} ' in text
    assert text != before


# -- what goes wrong


@pytest.mark.parametrize(
    ("said", "kind", "message"),
    [
        ({"model": "x"}, openai.NotFoundError, "this server has no model 'x': use 'toy'"),
        ({"temperature": 3}, openai.BadRequestError, "temperature is 3: at most 2.0 is needed"),
        ({"prompt": [259]}, openai.BadRequestError, "outside the vocabulary: 0 to 258 are needed"),
        ({"prompt": "a" * 49}, openai.BadRequestError, "has 49 tokens, but the model's context_le"),
        (
            {"prompt": "a" * 100_000},
            openai.BadRequestError,
            "has 100,000 characters, but the model's context_length is 48: shorten it",
        ),
        ({"prompt": ["a"] * 21}, openai.BadRequestError, "the request is for 21 texts: at most"),
        ({"extra_body": {"top_q": 1}}, openai.BadRequestError, "'top_q', did you mean 'top_"),
        ({"suffix": "x"}, openai.BadRequestError, "suffix is not supported"),
        ({"prompt": "x" * (1 << 20)}, openai.APIStatusError, "larger than 1,048,576 bytes"),
    ],
)
def test_errors_are_those_that_openai_s_client_knows(server, said, kind, message) -> None:
    with pytest.raises(kind, match=message) as caught:
        server.client().completions.create(**({"model": "toy", "prompt": "a"} | said))
    assert "\n" not in caught.value.message
    assert caught.value.body.keys() == {"message", "type", "param", "code"}


def test_the_length_error_has_the_code_that_programs_look_for(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().completions.create(model="toy", prompt=[1] * 49)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "message"),
    [
        ("POST", "/v1/completions", b"{", 400, "the body is not JSON: "),
        ("POST", "/v1/completions", b"[" * 100_000, 400, "the body is not JSON: "),
        ("POST", "/v1/completions", b"\xff", 400, "the body is not JSON: "),
        ("POST", "/v1/completions", b"", 400, "the body is missing: a JSON object is needed"),
        ("GET", "/v1/completions", b"", 405, "'/v1/completions' does not support GET: use POST"),
        ("GET", "/v1/none", b"", 404, "there is nothing at '/v1/none': see /docs"),
    ],
)
def test_what_is_no_request_is_refused(
    server: Running, method: str, path: str, content: bytes, status: int, message: str
) -> None:
    headers = {"content-type": "application/json"}
    found = httpx2.request(method, server.url + path, content=content, headers=headers)
    assert found.status_code == status
    assert found.json()["error"]["message"].startswith(message)


def test_a_body_that_does_not_say_json_is_refused(server: Running) -> None:
    body = b'{"model": "toy"}'
    found = httpx2.post(
        f"{server.url}/v1/completions", content=body, headers={"content-type": "text/plain"}
    )
    assert found.status_code == 400
    assert "send Content-Type: application/json" in found.json()["error"]["message"]


def test_a_key_is_needed_where_there_is_one() -> None:
    with serving(MODEL, TOKENIZER, key="secret") as running:
        with pytest.raises(openai.AuthenticationError) as caught:
            running.client("wrong").models.list()
        assert caught.value.code == "invalid_api_key"
        assert running.client("secret").models.list().data[0].id == "toy"


def test_a_full_queue_says_when_to_ask_again(slow: Running) -> None:
    client = slow.client()
    stream = client.completions.create(model="toy", prompt="a", max_tokens=LONG, n=3, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="its queue is full: retry in") as caught:
        client.completions.create(model="toy", prompt="a")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    stream.close()
    slow.wait_until_idle()
    assert client.completions.create(model="toy", prompt="a", max_tokens=1).choices[0].finish_reason


def test_who_hangs_up_frees_the_slots_at_once(slow: Running) -> None:
    """In the middle of a stream, and while waiting for a whole answer."""
    client = slow.client()
    stream = client.completions.create(model="toy", prompt="a", max_tokens=LONG, n=2, stream=True)
    next(iter(stream))
    writers = [turn.writer for turn in slow.served.service.engine.turns]
    stream.close()
    slow.wait_until_idle()

    body = json.dumps({"model": "toy", "max_tokens": LONG, "n": 3}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", int(slow.url.rpartition(":")[2]))) as raw:
        raw.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        until(lambda: sum(slow.served.service.counts()) == 3)
        until(lambda: len(slow.served.service.engine.turns) == 2)
        writers += [turn.writer for turn in slow.served.service.engine.turns]
    slow.wait_until_idle()
    assert len(writers) == 4
    assert all(len(writer.new) < LONG for writer in writers), "written to the end"
    assert [access.status for access in slow.accesses[-2:]] == [499, 499]


def test_a_text_that_has_ended_frees_its_slot_while_others_go_on(slow: Running) -> None:
    create = slow.client().completions.create
    how = {"model": "toy", "prompt": ["a", "b"], "seed": 1}
    first, second = (choice.text for choice in create(max_tokens=40, **how).choices)
    stop = next(letter for letter in first if letter not in second)
    stream = create(max_tokens=LONG, stop=stop, stream=True, **how)
    for event in stream:
        if event.choices[0].finish_reason == "stop":
            break
    until(lambda: slow.served.service.counts().running < 2)
    assert slow.served.service.counts().running == 1, "the other one goes on"
    stream.close()
    slow.wait_until_idle()


@pytest.mark.slow
def test_a_request_has_its_time() -> None:
    with serving(toy(1024), TOKENIZER, slots=1, step_seconds=0.01, timeout=1.0) as running:
        client = running.client()
        begun = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="the request timed out") as caught:
            client.completions.create(model="toy", prompt="a", max_tokens=LONG)
        assert caught.value.status_code == 504
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert 0.95 < time.monotonic() - begun < LONG * 0.01
        events = iter(
            client.completions.create(model="toy", prompt="a", max_tokens=LONG, stream=True)
        )
        for _ in range(4):
            next(events)  # what comes before stays
        with pytest.raises(openai.APIError, match="the request timed out"):
            list(events)
        running.wait_until_idle()


def test_a_failure_inside_tells_the_client_nothing_of_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(MODEL, TOKENIZER) as running:

        def broken(jobs: object) -> None:
            raise KeyError("secret place")

        monkeypatch.setattr(running.served.service, "submit", broken)
        found = httpx2.post(f"{running.url}/v1/completions", json={"model": "toy"})
    assert found.status_code == 500
    assert found.json()["error"]["type"] == "server_error"
    assert "secret" not in found.text
    assert any(
        record.name == "gptsmith.serving.errors" and record.exc_info for record in caplog.records
    ), "the log has the traceback"


def test_a_step_that_fails_fails_its_requests_and_no_others() -> None:
    with serving(MODEL, TOKENIZER) as running:
        engine, client = running.served.service.engine, running.client()
        step = engine.step

        def broken(now: float) -> None:
            engine.step = step
            raise KeyError("secret place")

        engine.step = broken
        with pytest.raises(openai.InternalServerError, match="the model failed at this") as caught:
            client.completions.create(model="toy", prompt="ab")
        assert "secret" not in caught.value.message
        found = client.completions.create(model="toy", prompt="ab", max_tokens=9, seed=1)
        assert found.choices[0].text == ours("ab", 9, 1)


@pytest.mark.slow
def test_a_long_text_is_read_aside_while_others_go_on() -> None:
    """A tokenizer that takes its time stalls nobody's stream."""
    reading, go_on = threading.Event(), threading.Event()

    class Slow(Tokenizer):
        def encode(self, text: str, **how: object) -> list[int]:
            if len(text) > 10_000:
                reading.set()
                assert go_on.wait(120), "nobody's stream went on meanwhile"
            return super().encode(text[:5], **how)  # type: ignore[arg-type]

    tokenizer = Slow(byte_tokenizer().backend)
    with serving(toy(1024), tokenizer, step_seconds=0.002) as running:
        running.served.__dict__["longest_prompt"] = 1 << 20

        async def both() -> int:
            meanwhile = 0
            async with openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="x") as client:
                stream = await client.completions.create(
                    model="toy", prompt="a", max_tokens=300, stream=True
                )
                long = asyncio.create_task(
                    client.completions.create(model="toy", prompt="a" * 30_000, max_tokens=1)
                )
                async for _ in stream:
                    meanwhile += reading.is_set()
                    if meanwhile == 20:
                        go_on.set()
                await long
            return meanwhile

        assert asyncio.run(both()) >= 20


# -- what is advised

HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("route", "said", "message", "cure"),
    [
        ("completions", {"temprature": 1}, "did you mean 'temperature'?", {"temperature": 1}),
        ("completions", {"best_of": 2, "stream": True}, "leave it or stream out", {"best_of": 2}),
        ("completions", {"best_of": 2, "stream": True}, "leave it or stream out", {"stream": True}),
        ("completions", {"stream_options": {"include_usage": True}}, "leave it out", {}),
        ("completions", {"suffix": "x"}, "leave it out", {}),
        ("completions", {"prompt": "x" * 49}, "shorten it", {"prompt": "x" * 47}),
        ("completions", {"prompt": "x" * (1 << 20)}, "send less at once", {}),
        ("completions", {"prompt": [259]}, "0 to 258 are needed", {"prompt": [258]}),
        ("completions", {"logit_bias": {"259": 1}}, "0 to 258", {"logit_bias": {"258": 1}}),
        ("completions", {"model": "gpt-4"}, "use 'toy'", {"model": "toy"}),
        ("chat/completions", {"top_logprobs": 2}, "needs logprobs true: set it",
         {"top_logprobs": 2, "logprobs": True}),
        ("chat/completions", {"max_tokens": 1, "max_completion_tokens": 1}, "give only one",
         {"max_completion_tokens": 1}),
        ("chat/completions", {"tools": [{"type": "function"}]}, "leave it out, or send []", {}),
        ("chat/completions", {"tools": [{"type": "function"}]}, "or send []", {"tools": []}),
        ("chat/completions", {"messages": [{"role": "user", "content": "\ufdd0"}]}, "remove it",
         {"messages": HI}),
        ("completions", {"prompt": "\ud800"}, "remove it", {"prompt": ""}),
        ("completions", {"n": 21}, "at most 20 are possible", {"n": 20}),
        ("completions", {"stop": ""}, "at least one character", {"stop": "x"}),
        ("completions", {"stop": ["x"] * 17}, "at most 16 strings", {"stop": ["x"] * 16}),
        ("completions", {"prompt": [[]]}, "is empty: at least one", {"prompt": [[1]]}),
        ("completions", {"n": 3, "best_of": 2}, "at least n, 3, is", {"n": 3, "best_of": 3}),
        ("completions", {"logprobs": 21}, "at most 20 is needed", {"logprobs": 20}),
        ("completions", {"logit_bias": {"1": 101}}, "a number from -100 to 100",
         {"logit_bias": {"1": 100}}),
        ("completions", {"min_tokens": 5}, "at most max_tokens, 1, is", {"min_tokens": 1}),
        ("chat/completions", {"store": True}, "or send false", {"store": False}),
        ("chat/completions", {"reasoning_effort": "high"}, 'or send "none"',
         {"reasoning_effort": "none"}),
        ("chat/completions", {"tool_choice": "required"}, 'or send "none" or "auto"',
         {"tool_choice": "auto"}),
        ("chat/completions", {"response_format": {"type": "json_object"}},
         'or send {"type": "text"}', {"response_format": {"type": "text"}}),
    ],
)  # fmt: skip
def test_what_is_advised_is_accepted(
    route: str, said: dict, message: str, cure: dict, server: Running, talker: Running
) -> None:
    place = talker if route.startswith("chat") else server
    body = {"model": "toy", "max_tokens": 1}
    body |= {"messages": HI} if route.startswith("chat") else {"prompt": "hi"}
    if "max_completion_tokens" in said:
        del body["max_tokens"]
    headers = {"content-type": "application/json"}
    content = json.dumps(body | said)  # half a surrogate pair as well
    found = httpx2.post(f"{place.url}/v1/{route}", content=content, headers=headers)
    assert found.status_code >= 400
    assert message in found.json()["error"]["message"]
    found = httpx2.post(f"{place.url}/v1/{route}", json=body | cure)
    assert found.status_code == 200, found.text


def test_where_the_server_says_that_something_is(server: Running) -> None:
    said = httpx2.get(f"{server.url}/v1/complete").json()["error"]["message"]
    assert said.endswith("see /docs")
    assert httpx2.get(f"{server.url}/docs").status_code == 200
    said = httpx2.get(f"{server.url}/v1/completions").json()["error"]["message"]
    assert said.endswith("use POST")
    found = httpx2.post(f"{server.url}/v1/completions", json={"model": "toy", "max_tokens": 1})
    assert found.status_code == 200
    body = {"model": "toy", "messages": HI}
    for route in ("/v1/chat/completions", "/tokenize"):
        said = httpx2.post(server.url + route, json=body).json()["error"]["message"]
        advised = re.search(r"as text to (\S+), or (\S+)$", said)
        assert advised, said
        for place in advised.groups():
            found = httpx2.post(server.url + place, json={"model": "toy", "prompt": "hi"})
            assert found.status_code == 200
    said = httpx2.post(f"{server.url}/tokenize", json={"prompt": "hi", "messages": HI}).json()
    assert said["error"]["message"].endswith("send one of them")
    assert httpx2.post(f"{server.url}/tokenize", json={"prompt": "hi"}).status_code == 200


def test_a_body_that_says_json_as_advised(server: Running) -> None:
    where, body = f"{server.url}/v1/completions", b'{"model": "toy", "max_tokens": 1}'
    found = httpx2.post(where, content=body, headers={"content-type": "text/plain"})
    said = re.search(r"send (\S+): (\S+)$", found.json()["error"]["message"])
    assert said
    assert httpx2.post(where, content=body, headers={said[1]: said[2]}).status_code == 200


@pytest.mark.slow
def test_a_request_that_is_shorter_or_comes_later_has_time_enough() -> None:
    """What is advised to whoever has timed out, in each of its three parts."""
    with serving(toy(1024), TOKENIZER, slots=1, step_seconds=0.01, timeout=1.5) as running:
        client = running.client()

        def ask(**how: int) -> openai.types.Completion:
            return client.completions.create(model="toy", prompt="a", **({"max_tokens": 20} | how))

        def timed_out(**how: int) -> None:
            with pytest.raises(openai.APIStatusError) as caught:
                ask(**how)
            assert caught.value.status_code == 504
            assert "ask for fewer tokens or texts, or retry when the server is less" in str(caught)
            running.wait_until_idle()

        timed_out(max_tokens=LONG)
        assert ask().usage.completion_tokens > 0
        timed_out(n=15)
        assert len(ask(n=2).choices) == 2
        other = client.completions.create(model="toy", prompt="a", max_tokens=LONG, stream=True)
        next(iter(other))
        timed_out()
        assert ask().usage.completion_tokens > 0


@pytest.mark.slow
def test_who_retries_when_the_full_queue_says_is_answered(slow: Running) -> None:
    """As OpenAI's client does by itself, after the seconds in Retry-After."""
    client = slow.client()
    stream = client.completions.create(model="toy", prompt="a", max_tokens=99, n=3, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="retry in") as caught:
        client.completions.create(model="toy", prompt="a", max_tokens=1)
    seconds = re.search(r"retry in (\d+) s", str(caught.value))
    assert seconds
    assert seconds[1] == caught.value.response.headers["retry-after"]
    patient = client.with_options(max_retries=9)
    assert patient.completions.create(model="toy", prompt="a", max_tokens=1).choices
    stream.close()
    slow.wait_until_idle()


def test_fewer_slots_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptsmith.serving.worker.available_memory", lambda device: 30_000)
    with pytest.raises(ValueError, match="choose fewer slots"):
        suitable_slots(MODEL, None, 9)
    assert suitable_slots(MODEL, None, suitable_slots(MODEL, None)) >= 1
