"""Clients that are broken, hostile or gone: each gets an answer or is cut off, and nobody else
notices. After every attack the server is idle, and says the same as before."""

import gc
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import pytest
import torch

from gptsmith import GPT, GPTConfig
from gptsmith.serving import http
from gptsmith.tokenizers import byte_tokenizer
from gptsmith.tokenizers.chat import ChatTemplate
from tests.conftest import TINY, processor_seconds, scrambled, single_thread, until
from tests.serving.running import Running, serving

TOKENIZER = byte_tokenizer()
CONTEXT = 1024
SLOTS, WAITING = 2, 3
PLAIN = {"model": "toy", "prompt": "To be", "max_tokens": 12, "seed": 5}
LONG = {"model": "toy", "prompt": "a", "max_tokens": 900, "logit_bias": {"256": -100}}
JSON = {"content-type": "application/json"}


def toy() -> GPT:
    return scrambled(GPTConfig(**(TINY | {"vocab_size": 259, "context_length": CONTEXT})))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


@pytest.fixture(scope="module")
def whole_server() -> Iterator[tuple[Running, str]]:
    """A server of few slots and slow steps, and what it says when nobody has been rude."""
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", TOKENIZER, {})
    how: dict[str, Any] = {"slots": SLOTS, "waiting": WAITING, "step_seconds": 0.002}
    with serving(toy(), TOKENIZER, template=template, **how) as running:
        yield running, plain(running)


@pytest.fixture
def server(whole_server: tuple[Running, str]) -> Iterator[Running]:
    """The server; after the attack it must be as it was."""
    running, before = whole_server
    yield running
    check_idle(running, before)


def plain(running: Running) -> str:
    """The text of a plain request."""
    found = httpx2.post(f"{running.url}/v1/completions", json=PLAIN, timeout=120)
    assert found.status_code == 200, found.text
    return found.json()["choices"][0]["text"]


def check_idle(running: Running, before: str) -> None:
    """Hold that every slot is free, and that a plain request says what it said before.

    What was sent before its sender left may still be on its way, so there is some time for it.
    """
    until(lambda: health(running) == (0, 0))
    running.wait_until_idle()
    assert plain(running) == before


def health(running: Running) -> tuple[int, int]:
    """How many texts are written and how many wait, by the server's own word."""
    told = httpx2.get(f"{running.url}/health").json()
    return told["running"], told["waiting"]


def post(running: Running, body: Any, path: str = "/v1/completions") -> httpx2.Response:
    content = body if isinstance(body, str | bytes) else json.dumps(body)
    return httpx2.post(running.url + path, content=content, headers=JSON, timeout=120)


def connected(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=120)


def request(body: Any, version: str = "1.1", headers: Sequence[str] = ()) -> bytes:
    """A request for a completion, byte for byte."""
    content = json.dumps(body).encode()
    lines = [
        f"POST /v1/completions HTTP/{version}",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + content


def read_all(raw: socket.socket) -> bytes:
    """What comes until the other side ends it, or cuts it off."""
    found = b""
    try:
        while part := raw.recv(1 << 16):
            found += part
    except ConnectionResetError:
        pass
    return found


def last_event(text: str) -> Any:
    """The JSON of the last event of a stream, or that of a whole answer."""
    last = text.removesuffix("\n\n").rpartition("\n\n")[2]
    return json.loads(last.removeprefix("data: "))


def vanish(raw: socket.socket) -> None:
    """Leave without a word, as a process that is killed with data unread."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


# -- bodies

LAST = "9" * 4000  # a number that JSON can write and nothing can hold
REFUSED: dict[str, tuple[str | bytes, str]] = {
    "arrays in arrays": (b"[" * 100_000 + b"]" * 100_000, "the body is not JSON"),
    "arrays in a prompt": (
        b'{"model":"toy","prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "the body is not JSON",
    ),
    "objects in objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "the body is not JSON"),
    "deep, and yet JSON": (
        b'{"model":"toy","prompt":' + b"[" * 900 + b"]" * 900 + b"}",
        "prompt: a list must hold only texts",
    ),
    "no UTF-8": (b'{"model":"toy","prompt":"\xff\xc0"}', "the body is not JSON"),
    "only spaces": (b" " * 1000, "the body is not JSON"),
    "half a pair in a prompt": ('{"model":"toy","prompt":"\\ud800"}', "has a lone surrogate"),
    "half a pair in a name": ('{"model":"toy","\\ud800":1}', "unknown field '\\ud800'"),
    "half a pair as an id": (
        '{"model":"toy","logit_bias":{"\\ud800":1}}',
        "logit_bias: '\\ud800' is not a token id",
    ),
    "a name of megabytes": ('{"model":"toy","' + "x" * 900_000 + '":1}', "unknown field 'xxx"),
    "NaN": ('{"model":"toy","temperature":NaN}', "temperature is NaN: a finite number"),
    "infinity": ('{"model":"toy","min_p":Infinity}', "min_p is Infinity: a finite number"),
    "a number beyond floats": ('{"model":"toy","top_p":1e999}', "top_p is Infinity: a finite"),
    "a seed beyond floats": ('{"model":"toy","seed":1e999}', "seed is Infinity: a whole number"),
    "a huge seed": (f'{{"model":"toy","seed":{LAST}}}', "seed is 9999"),
    "a huge temperature": (f'{{"model":"toy","temperature":{LAST}}}', "temperature is 9999"),
    "a huge bias": (f'{{"model":"toy","logit_bias":{{"1":{LAST}}}}}', "logit_bias: 9999"),
    "a huge id": (f'{{"model":"toy","prompt":[{LAST}]}}', "ids outside the vocabulary"),
    "digits beyond Python": (f'{{"model":"toy","seed":{LAST * 2}}}', "the body is not JSON"),
    "an id below 0": ('{"model":"toy","prompt":[-1]}', "ids outside the vocabulary"),
    "an id of 2^63": (f'{{"model":"toy","prompt":[1,{2**63}]}}', "ids outside the vocabulary"),
    "a bias of 2^63": (f'{{"model":"toy","logit_bias":{{"{2**63}":1}}}}', "is not a token id"),
    "a bias for all of GPT-2": (
        json.dumps({"model": "toy", "n": 5, "logit_bias": dict.fromkeys(range(50_000), 1)}),
        "logit_bias has token 49999",
    ),
    "true for a count": ('{"model":"toy","n":true}', "n is true: a whole number"),
    "true for a number": ('{"model":"toy","temperature":true}', "temperature is true: a number"),
    "true for an id": ('{"model":"toy","prompt":[true]}', "a list must hold only"),
    "true for a bias": ('{"model":"toy","logit_bias":{"1":true}}', "logit_bias: true"),
    "a stop that is a number": ('{"model":"toy","stop":5}', "stop: a text or a list of texts"),
    "a stop in a stop": ('{"model":"toy","stop":[["x"]]}', "stop: a text or a list of texts"),
    "an empty stop": ('{"model":"toy","stop":[""]}', "stop: a stop string is empty"),
    "a long stop": (f'{{"model":"toy","stop":"{"x" * 1001}"}}', "stop: at most 16 strings"),
    "more texts than there is room": ('{"model":"toy","n":128}', "the request is for 128 texts"),
    "many prompts": (
        json.dumps({"model": "toy", "n": 128, "prompt": [[1]] * 50_000}),
        "the request is for 6,400,000 texts: at most 5",
    ),
    "too many ends": (
        json.dumps({"model": "toy", "stop_token_ids": [*range(100_000)]}),
        "stop_token_ids has token 99999",
    ),
    "ends that are no ids": (
        json.dumps({"model": "toy", "stop_token_ids": ["x"] * 100_000}),
        "stop_token_ids.0 is 'x': a whole number",
    ),
    "an end of 4000 digits": (f'{{"model":"toy","stop_token_ids":[{LAST}]}}', "has token 9999"),
    "a neutral field that is deep": (
        b'{"model":"toy","suffix":' + b"[" * 900 + b"]" * 900 + b"}",
        'suffix is not supported: GPT-2 writes from left to right, leave it out, or send ""',
    ),
    "too many tokens": (json.dumps({"model": "toy", "prompt": [1] * 200_000}), "200,000 tokens"),
}
TAKEN = {
    "null bytes": '{"model":"toy","prompt":"\\u0000a","stop":"\\u0000","max_tokens":3}',
    "half a pair in a stop string": '{"model":"toy","stop":"\\ud800","user":"\\udfff"}',
    "the last of two that are called alike": '{"model":"x","n":0,"n":1,"model":"toy"}',
    "every token forbidden alike": json.dumps(
        {"model": "toy", "logit_bias": {str(id): -100 for id in range(259)}}
    ),
    "more tokens than can be": f'{{"model":"toy","prompt":[{"1," * 1020}1],"max_tokens":{LAST}}}',
    "a whole number with a point": '{"model":"toy","max_tokens":3.0,"seed":1e15,"top_k":1e300}',
    "every token ends the text, and none may": json.dumps(
        {"model": "toy", "stop_token_ids": [*range(259)], "min_tokens": 3, "max_tokens": 9}
    ),
    "the largest seed": f'{{"model":"toy","seed":{2**63 - 1},"n":5}}',
    "the smallest seed": f'{{"model":"toy","seed":{-(2**63)}}}',
    **{
        f"{name} {value} at {heat}": json.dumps(
            {"model": "toy", "prompt": "aa", "max_tokens": 3, "temperature": heat, name: value}
        )
        for name, values in {
            "top_p": (5e-324, 1e-300),
            "min_p": (5e-324, 1e-300),
            "repetition_penalty": (5e-324, 1e-45, 1e45, 1e308),
        }.items()
        for value in values
        for heat in (0, 5e-324, 2)
    },
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_body_that_makes_no_sense_is_refused_in_a_line(server: Running, what: str) -> None:
    body, message = REFUSED[what]
    begun = processor_seconds()
    found = post(server, body)
    assert found.status_code == 400
    error = found.json()["error"]
    assert message in error["message"]
    assert len(error["message"]) < 200
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert processor_seconds() - begun < 2


@pytest.mark.parametrize("what", TAKEN)
def test_what_is_odd_and_yet_allowed_is_answered(server: Running, what: str) -> None:
    found = post(server, TAKEN[what])
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["finish_reason"] in ("stop", "length")


def test_megabytes_of_nothing_are_refused(server: Running) -> None:
    found = post(server, b" " * 10_000_000)
    assert found.status_code == 413
    assert found.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ("", 200),
        ([], 200),
        ("\ud800", 400),
        ("\ufdd0", 400),
        ([{"type": "\ud800"}], 400),
        ([{"type": {}}], 400),
        ([{"type": "image_url"}], 400),
        ([5], 400),
        (5, 400),
    ],
)
def test_messages_of_every_kind_are_answered(server: Running, content: Any, status: int) -> None:
    messages = [{"role": "user", "content": content}]
    body = {"model": "toy", "messages": messages, "max_tokens": 3}
    found = post(server, body, "/v1/chat/completions")
    assert found.status_code == status, found.text


def test_more_likeliest_tokens_than_there_are_tokens() -> None:
    """A vocabulary of ten letters has no twenty likeliest; whoever asks harms nobody beside."""
    from gptsmith.tokenizers import char_tokenizer

    tokenizer = char_tokenizer("abcdefghij")
    model = scrambled(GPTConfig(**(TINY | {"vocab_size": tokenizer.vocab_size})))
    with serving(model, tokenizer) as running:
        body = {"model": "toy", "prompt": "ab", "logprobs": 20, "echo": True, "max_tokens": 2}
        found = post(running, body)
        assert found.status_code == 200, found.text
        told = found.json()["choices"][0]["logprobs"]["top_logprobs"]
        assert [entry and len(entry) for entry in told] == [None, 10, 10, 10]


def test_a_bias_for_a_whole_vocabulary_stops_nobody() -> None:
    """128 texts, each with a bias for each of 50,000 tokens, begin within a second or two."""
    from gptsmith import SamplingSettings
    from gptsmith.generation.job import Job, Writer

    bias = dict.fromkeys(range(50000), 0.5)
    job = Job(prompt=[1], max_tokens=1, sampling=SamplingSettings(), seed=1, bias=bias)
    begun = processor_seconds()
    writers = [Writer.of(job, 50_257) for _ in range(16)]
    assert processor_seconds() - begun < 1
    assert writers[0].bias is not None
    assert writers[0].bias.sum() == 25_000


# -- bytes


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X: a\r\n" * 200_000 + b"\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00" + b"\0" * 300,  # how TLS begins
        b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /health HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
    ],
    ids=["header", "headers", "address", "TLS", "two lengths", "no chunk", "no host"],
)
def test_bytes_that_are_no_request_end_the_connection(server: Running, sent: bytes) -> None:
    with connected(server) as raw:
        try:
            raw.sendall(sent)
        except (BrokenPipeError, ConnectionResetError):
            return  # it has had enough before we had
        found = read_all(raw)
    assert found == b"" or found.startswith(b"HTTP/1.1 400")


def test_what_is_no_request_is_answered_as_all_errors_are(server: Running) -> None:
    with connected(server) as raw:
        raw.sendall(b"GET\r\n\r\n")
        head, _, body = read_all(raw).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"\r\nx-request-id: req_" in head
    assert b"\r\nconnection: close" in head
    assert "not an HTTP/1.1 request" in json.loads(body)["error"]["message"]


def test_a_target_may_name_the_host(server: Running) -> None:
    """As a proxy is asked, and as RFC 9112 wants every server to understand."""
    port = server.url.rpartition(":")[2]
    host = f"127.0.0.1:{port}"
    for target, status in (("/health", b"200"), ("", b"200"), ("/v1/x", b"404")):
        with connected(server) as raw:
            lines = [f"GET http://{host}{target} HTTP/1.1", f"Host: {host}", "Connection: close"]
            raw.sendall("\r\n".join([*lines, "", ""]).encode())
            assert read_all(raw).startswith(b"HTTP/1.1 " + status)


def test_a_body_that_breaks_off_in_the_middle_of_an_answer(server: Running) -> None:
    """The answer has begun, so that it can only be cut off."""
    chunked = "Transfer-Encoding: chunked\r\n\r\n"
    with connected(server) as raw:
        raw.sendall(f"POST /v1/none HTTP/1.1\r\nHost: x\r\n{chunked}1\r\nx\r\n".encode())
        assert raw.recv(1 << 16).startswith(b"HTTP/1.1 404")
        raw.sendall(b"no chunk\r\n")
        read_all(raw)


def test_one_connection_many_requests_at_once(server: Running) -> None:
    """Answers come whole, and in order, whoever is asked before the one before is answered."""
    prompts = ["a", "b", "c"]
    sent = [request(PLAIN | {"prompt": prompt}) for prompt in prompts]
    with connected(server) as raw:
        raw.sendall(b"".join(sent) + request(PLAIN, headers=["Connection: close"]))
        found = read_all(raw)
    texts = [post(server, PLAIN | {"prompt": prompt}).json() for prompt in [*prompts, "To be"]]
    bodies = [json.loads(part.partition(b"\r\n\r\n")[2]) for part in found.split(b"HTTP/1.1 ")[1:]]
    assert [each["choices"] for each in bodies] == [each["choices"] for each in texts]


def test_an_old_client_gets_no_chunks(server: Running) -> None:
    whole, streamed = b"", b""
    for stream in (False, True):
        with connected(server) as raw:
            raw.sendall(request(PLAIN | {"stream": stream}, version="1.0"))
            head, _, body = read_all(raw).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        assert b"transfer-encoding" not in head.lower()
        whole, streamed = (whole, body) if stream else (body, streamed)
    parts = [json.loads(event.removeprefix(b"data: ")) for event in streamed.split(b"\n\n")[:-2]]
    assert streamed.endswith(b"data: [DONE]\n\n")
    text = "".join(part["choices"][0]["text"] for part in parts)
    assert text == json.loads(whole)["choices"][0]["text"]


def test_a_path_with_a_slash_too_many_leads_nowhere(server: Running) -> None:
    """And certainly not to wherever the request says that it came."""
    found = httpx2.post(f"{server.url}/v1/completions/", json=PLAIN, headers={"host": "evil"})
    assert found.status_code == 404
    assert "location" not in found.headers


def test_an_upgrade_to_what_is_not_spoken_is_not_made(server: Running) -> None:
    how = ["Connection: Upgrade, close", "Upgrade: h2c", "HTTP2-Settings: AAA"]
    with connected(server) as raw:
        raw.sendall(request(PLAIN, headers=how))
        assert read_all(raw).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent", [b"", b"GET /hea", request(PLAIN)[:-5]], ids=["nothing", "half a head", "half a body"]
)
@pytest.mark.slow
def test_who_begins_and_does_not_go_on_is_cut_off(
    server: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(http, "PATIENCE", 0.3)
    with connected(server) as raw:
        begun = time.monotonic()
        raw.sendall(sent)
        assert read_all(raw) == b""
        assert time.monotonic() - begun > 0.2


def test_who_sends_drop_by_drop_is_cut_off_too(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "PATIENCE", 0.4)

    def drop_by_drop() -> None:  # all of it would take ten seconds
        for byte in request(PLAIN):
            raw.sendall(bytes([byte]))
            time.sleep(0.05)

    with connected(server) as raw, pytest.raises((BrokenPipeError, ConnectionResetError)):
        drop_by_drop()


@pytest.mark.slow
def test_a_text_that_takes_longer_than_patience_is_not_cut_off(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or in events, and the next on the same connection: only clients are waited for."""
    monkeypatch.setattr(http, "PATIENCE", 0.3)
    with httpx2.Client(timeout=120) as client:
        for stream in (False, True, False):
            body = LONG | {"max_tokens": 400, "stream": stream}
            begun = time.monotonic()
            found = client.post(f"{server.url}/v1/completions", json=body)
            assert time.monotonic() - begun > 0.6
            assert '"finish_reason":"length"' in found.text


@pytest.mark.slow
def test_who_reads_nothing_holds_up_nobody(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on, the slot is free when the text is written, and in the end it is cut off."""
    made = http.Connection.connection_made

    def with_small_buffer(self: http.Connection, transport: Any) -> None:
        buffer = (socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # else it grows to megabytes
        transport.get_extra_info("socket").setsockopt(*buffer)
        made(self, transport)

    monkeypatch.setattr(http.Connection, "connection_made", with_small_buffer)

    def who_reads_nothing() -> socket.socket:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
        raw.sendall(request(LONG | {"max_tokens": 300, "stream": True, "logprobs": 20}))
        return raw

    done = len(server.accesses)
    with who_reads_nothing():
        until(lambda: any(server.served.service.counts()))
        assert post(server, PLAIN).status_code == 200
        server.wait_until_idle()
        assert len(server.accesses) == done + 1, "it has been cut off already"
    until(lambda: len(server.accesses) == done + 2)
    monkeypatch.setattr(http, "PATIENCE", 0.3)
    with who_reads_nothing():
        until(lambda: len(server.accesses) == done + 3)
    assert [access.status for access in server.accesses[-3:]] == [200, 499, 499]


# -- clients that leave


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["waiting", "prefill", "middle", "end"])
def test_whoever_leaves_frees_the_slot(server: Running, phase: str, stream: bool) -> None:
    """Whatever a client was waiting for: within some steps nothing is written for it any more."""
    service = server.served.service
    others = [connected(server) for _ in range(SLOTS if phase == "waiting" else 0)]
    for other in others:
        other.sendall(request(LONG | {"stream": True}))
    until(lambda: service.counts().running == len(others))
    raw = connected(server)
    long = phase == "prefill"
    body = LONG | {"stream": stream, "prompt": [1] * (900 if long else 1)}
    raw.sendall(request(body | ({"max_tokens": 30} if phase == "end" else {})))
    until(lambda: sum(service.counts()) == len(others) + 1)
    if phase == "middle":
        until(lambda: any(len(turn.writer.new) > 5 for turn in service.engine.turns))
    elif phase == "end":
        until(lambda: any(len(turn.writer.new) >= 28 for turn in service.engine.turns))
    writers = [turn.writer for turn in service.engine.turns]
    vanish(raw)
    until(lambda: sum(service.counts()) == len(others))
    for other in others:
        vanish(other)
    server.wait_until_idle()
    assert all(len(writer.new) < LONG["max_tokens"] for writer in writers), "written to the end"


def test_hundreds_come_and_vanish(server: Running) -> None:
    sent = [b"", b"GET / HT", request(LONG)[:-9], request(LONG), request(LONG | {"stream": True})]
    for number in range(200):
        raw = connected(server)
        raw.sendall(sent[number % len(sent)])
        if number % 3:
            vanish(raw)
        else:
            raw.close()


def test_whoever_resets_after_an_answer_leaves_nothing_behind(server: Running) -> None:
    """A closed connection is forgotten at once, not only when it would have been idle too long."""

    def connections() -> int:
        gc.collect()
        return sum(type(each) is http.Connection for each in gc.get_objects())

    server.wait_until_idle()
    until(lambda: connections() <= 1)
    for _ in range(20):
        raw = connected(server)
        raw.sendall(request(LONG | {"max_tokens": 2, "stream": True}))
        found = b""
        while not found.endswith(b"\r\n0\r\n\r\n"):
            part = raw.recv(1 << 16)
            assert part, found
            found += part
        vanish(raw)
    until(lambda: connections() <= 1, seconds=20)


# -- too much, too late


@pytest.mark.slow
def test_who_finds_no_room_comes_again_later(server: Running) -> None:
    answers: list[httpx2.Response] = []

    def ask() -> None:
        answers.append(post(server, LONG | {"max_tokens": 300}))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    refused = [each for each in answers if each.status_code == 429]
    served = [each for each in answers if each.status_code == 200]
    assert len(refused) + len(served) == 12
    assert len(served) >= SLOTS + WAITING
    assert refused
    for each in refused:
        assert 1 <= int(each.headers["retry-after"]) <= 60
        assert each.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.slow
def test_time_is_over_while_waiting_and_while_running() -> None:
    with serving(toy(), TOKENIZER, slots=1, step_seconds=0.005, timeout=1.0) as running:
        before = plain(running)
        found: dict[str, httpx2.Response] = {}

        def ask(name: str, **how: Any) -> None:
            found[name] = post(running, LONG | how)

        threads = [
            threading.Thread(target=ask, args=(name,), kwargs=how)
            for name, how in {
                "runs": {},
                "waits": {},
                "waits to stream": {"stream": True},
            }.items()
        ]
        for number, thread in enumerate(threads, 1):
            thread.start()
            until(lambda number=number: sum(running.served.service.counts()) == number)
        for thread in threads:
            thread.join(120)
        late = found.pop("waits to stream")
        for each in found.values():
            assert each.status_code == 504
            assert each.headers["x-should-retry"] == "false"
            assert each.json()["error"]["type"] == "server_error"
        for each in (late, post(running, LONG | {"stream": True})):
            # It may have had the slot for a moment, when the time of the first was over.
            error = each.json() if each.status_code == 504 else last_event(each.text)
            assert "the request timed out" in error["error"]["message"]
        assert each.status_code == 200
        check_idle(running, before)


# -- what fails inside


def test_a_model_of_nan_is_an_error_and_the_server_lives(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = toy()
    with torch.no_grad():
        model.ln_f.weight.fill_(torch.nan)
    with serving(model, TOKENIZER) as running:
        for stream in (False, True):
            found = post(running, PLAIN | {"stream": stream, "n": 3})
            assert found.status_code == 500
            assert found.json()["error"]["type"] == "server_error"
            assert "Traceback" not in found.text
        running.wait_until_idle()
        assert httpx2.get(f"{running.url}/health").status_code == 200
    assert "its weights have diverged" in caplog.text


def test_a_step_that_fails_fails_its_texts_only(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams end with an error; whole answers are one; the next request is served."""
    slots = server.served.service.engine.slots
    read, steps = slots.read, [0]

    def broken(spans: Any) -> Any:
        steps[0] += 1
        if steps[0] == 20:
            raise RuntimeError("secret place")
        return read(spans)

    monkeypatch.setattr(slots, "read", broken)
    found: list[httpx2.Response] = []
    threads = [
        threading.Thread(target=lambda s=stream: found.append(post(server, LONG | {"stream": s})))
        for stream in (True, False)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(each.status_code for each in found) == [200, 500]
    for each in found:
        assert "secret" not in each.text
        assert "[DONE]" not in each.text
        assert last_event(each.text)["error"]["type"] == "server_error"


def test_an_error_of_ours_ends_the_connection_with_a_word(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that keeps its connections is not left with one that is about to be cut."""

    def broken(jobs: object) -> None:
        raise KeyError("secret place")

    with httpx2.Client() as client, monkeypatch.context() as patch:
        patch.setattr(server.served.service, "submit", broken)
        for _ in range(5):
            found = client.post(f"{server.url}/v1/completions", json=PLAIN)
            assert found.status_code == 500
            assert found.headers["connection"] == "close"
