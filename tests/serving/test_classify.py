"""A server of a classifier: vLLM's /classify, asked by a plain client and by its description."""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

import gptsmith
from gptsmith.config.classifier import ClassifierConfig
from gptsmith.config.model import GPTConfig
from gptsmith.model.classifier import Classifier
from gptsmith.serving.app import make_app
from gptsmith.serving.classify import ServedClassifier
from gptsmith.serving.guard import Access, Guard
from gptsmith.serving.http import UvicornServer, listen, url
from gptsmith.serving.labelling import LabelService
from gptsmith.serving.metrics import Metrics
from gptsmith.tokenizers import byte_tokenizer
from tests.cli.test_serve import started
from tests.conftest import TINY, single_thread
from tests.model.test_classifier import scrambled
from tests.serving.test_page import PICTURES
from tests.serving.test_schemathesis import NAMES, REASONS

TOKENIZER = byte_tokenizer()
LABELS = ("ham", "spam", "egg")
SIZES = TINY | {"vocab_size": 259, "context_length": 48}
PAD = 258


def toy(pad: int | None = PAD) -> Classifier:
    return scrambled(ClassifierConfig.of(GPTConfig(**SIZES), LABELS, pad))


def served_toy(pad: int | None = PAD, *, timeout: float = 600.0) -> ServedClassifier:
    service = LabelService(toy(pad), slots=4, waiting=16)
    return ServedClassifier(
        service=service,
        tokenizer=TOKENIZER,
        name="toy",
        aliases=frozenset({"models/toy"}),
        timeout=timeout,
        metrics=Metrics(service.counts, slots=4),
    )


@contextmanager
def serving(served: ServedClassifier, **guard: Any) -> Iterator[str]:
    """Serve it as `gptsmith serve` does; its address."""
    ready = threading.Event()

    def seen(access: Access) -> None:
        served.metrics.finished(access.path, access.status, access.seconds)

    with single_thread(), listen("127.0.0.1", 0) as bound:
        app = Guard(
            make_app(served, with_key=bool(guard)),
            seen=seen,
            **({"api_key": None, "most_bytes": 1 << 20, "origins": ()} | guard),
        )
        server = UvicornServer(app, drain=5, ready=ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            assert ready.wait(120), "the server did not start"
            yield url(bound)
        finally:
            server.should_exit = True
            thread.join(120)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving(served_toy()) as address:
        yield address


def wanted(text: str) -> list[float]:
    ids = TOKENIZER.encode(text)
    tokens, mask = torch.tensor([ids or [PAD]]), torch.tensor([[1] * len(ids) or [0]])
    return toy().scores(tokens, mask).softmax(1)[0].tolist()


def test_labels_of_a_text_and_of_a_list_as_vllm_returns_them(server: str) -> None:
    for given in ("a text", ["one", "", "a longer text"], [[1, 2], [3]], [5, 6]):
        answer = httpx2.post(f"{server}/classify", json={"model": "toy", "input": given})
        assert answer.status_code == 200
        found = answer.json()
        assert [*found] == ["id", "object", "created", "model", "data", "usage"]
        assert found["id"].startswith("classify-")
        assert (found["object"], found["model"]) == ("list", "toy")
        rows = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
        read = 0
        for index, (each, text) in enumerate(zip(found["data"], rows, strict=True)):
            text = text if isinstance(text, str) else TOKENIZER.decode(text)
            read += len(TOKENIZER.encode(text))
            assert [*each] == ["index", "label", "probs", "num_classes"]
            assert (each["index"], each["num_classes"]) == (index, 3)
            assert each["probs"] == pytest.approx(wanted(text), abs=1e-5)
            assert each["label"] == LABELS[each["probs"].index(max(each["probs"]))]
        usage = {"prompt_tokens": read, "completion_tokens": 0, "total_tokens": read}
        assert found["usage"] == usage


def test_fields_that_ask_for_nothing_are_accepted(server: str) -> None:
    more = {"user": "me", "use_activation": True, "priority": 0, "add_special_tokens": False}
    assert httpx2.post(f"{server}/classify", json={"input": "a", **more}).status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"input": []}, 400, "input: text, token ids, or a list of either is needed"),
        ({"input": 3}, 400, "input: text, token ids, or a list of either is needed"),
        ({"input": ["a", 3]}, 400, "input: a list must hold only texts, only token ids"),
        ({"input": [[1], []]}, 400, "input: one of its lists of token ids is empty"),
        ({"input": [999]}, 400, "the prompt has token ids outside the vocabulary: 0 to 258"),
        ({"input": "a" * 49}, 400, "the prompt has 49 tokens, but the model's context_length is"),
        ({"input": "a" * 100_000}, 400, "the prompt has 100,000 characters, but the model's"),
        ({"input": ["a"] * 21}, 400, "the request is for 21 texts: at most 20 are possible"),
        ({}, 400, "input is missing"),
        ({"input": "a", "model": "other"}, 404, "this server has no model 'other': use 'toy'"),
        ({"input": "a", "imput": "b"}, 400, "unknown field 'imput', did you mean 'input'?"),
        ({"input": "a", "use_activation": False}, 400, "use_activation is not supported: the"),
        ({"input": "\ud800"}, 400, "the text has a lone surrogate"),
    ],
)
def test_mistakes_are_answered_as_on_the_other_routes(
    body: dict[str, Any], status: int, message: str, server: str
) -> None:
    answer = httpx2.post(
        f"{server}/classify",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"].startswith(message), error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_a_body_that_is_too_large_or_no_json_is_refused(server: str) -> None:
    assert httpx2.post(f"{server}/classify", content=b"{").status_code == 400
    large = {"input": "a" * (1 << 20)}
    assert httpx2.post(f"{server}/classify", json=large).status_code == 413


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "toy", "prompt": "a"}),
        ("/v1/completions", {"model": "toy", "prompt": "a", "stream": True}),
        ("/v1/chat/completions", {"model": "toy", "messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_it_says_that_it_does_not_write(path: str, body: dict[str, Any], server: str) -> None:
    answer = httpx2.post(f"{server}{path}", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "toy is a classifier, which labels texts and does not write: send the text to /classify"
    )


def test_the_other_routes_work(server: str) -> None:
    tokens = httpx2.post(f"{server}/tokenize", json={"prompt": "abc"}).json()
    assert tokens["tokens"] == TOKENIZER.encode("abc")
    assert httpx2.post(f"{server}/detokenize", json={"tokens": tokens["tokens"]}).json() == {
        "prompt": "abc"
    }
    (model,) = httpx2.get(f"{server}/v1/models").json()["data"]
    assert (model["id"], model["labels"]) == ("toy", [*LABELS])
    assert httpx2.get(f"{server}/v1/models/toy").json() == model
    health = httpx2.get(f"{server}/health").json()
    assert health == {"status": "ok", "model": "toy", "running": 0, "waiting": 0, "slots": 4}
    metrics = httpx2.get(f"{server}/metrics").text
    assert 'gptsmith_requests_total{endpoint="/classify",status="200"}' in metrics
    page = httpx2.get(f"{server}/")
    assert "Text to label" in page.text
    assert "'unsafe" not in page.headers["content-security-policy"]


def test_many_clients_share_batches_and_get_what_each_gets_alone() -> None:
    served, sizes = served_toy(), list[int]()
    scores = served.service.model.scores

    def counting(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        sizes.append(len(tokens))
        return scores(tokens, mask)

    served.service.model.scores = counting  # type: ignore[method-assign]
    with serving(served) as address, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> Any:
            body = {"input": f"text number {number % 10}"}
            return httpx2.post(f"{address}/classify", json=body, timeout=120).json()

        answers = list(pool.map(ask, range(96)))
    for number, answer in enumerate(answers):
        text = f"text number {number % 10}"
        assert answer["data"][0]["probs"] == pytest.approx(wanted(text), abs=1e-5)
    assert sum(sizes) == 96
    assert served.service.unfinished == 0


@contextmanager
def held(served: ServedClassifier) -> Iterator[threading.Event]:
    """The model waits until it is released."""
    scores, release = served.service.model.scores, threading.Event()

    def waiting(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        assert release.wait(120)
        return scores(tokens, mask)

    served.service.model.scores = waiting  # type: ignore[method-assign]
    yield release
    release.set()


def test_a_full_queue_says_when_to_come_again() -> None:
    served = served_toy()
    with serving(served) as address, held(served) as release, ThreadPoolExecutor(1) as pool:
        first = pool.submit(
            lambda: httpx2.post(f"{address}/classify", json={"input": ["a"] * 20}, timeout=120)
        )
        while served.service.unfinished < 20:
            pass
        answer = httpx2.post(f"{address}/classify", json={"input": "a"})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
        release.set()
        assert first.result().status_code == 200


def test_a_request_that_takes_too_long_ends() -> None:
    served = served_toy(timeout=0.2)
    with serving(served) as address, held(served):
        answer = httpx2.post(f"{address}/classify", json={"input": "a"}, timeout=120)
        assert answer.status_code == 504
        assert answer.json()["error"]["message"].startswith("the request timed out")


def test_a_failure_is_answered_and_the_next_request_is_served(
    caplog: pytest.LogCaptureFixture,
) -> None:
    served = served_toy()
    good = served.service.model.scores

    def bad(tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        raise ArithmeticError("broken")

    served.service.model.scores = bad  # type: ignore[method-assign]
    with serving(served) as address:
        answer = httpx2.post(f"{address}/classify", json={"input": "a"})
        assert answer.status_code == 500
        served.service.model.scores = good  # type: ignore[method-assign]
        assert httpx2.post(f"{address}/classify", json={"input": "a"}).status_code == 200


def test_a_client_that_leaves_costs_nobody_anything() -> None:
    served = served_toy()
    with serving(served) as address:
        with held(served) as release:
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as rude:
                body = json.dumps({"input": ["a"] * 3}).encode()
                rude.sendall(
                    b"POST /classify HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json"
                    b"\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
                )
                while served.service.unfinished < 3:
                    pass
            release.set()
        assert httpx2.post(f"{address}/classify", json={"input": "a"}).status_code == 200
        assert served.service.unfinished == 0


def test_without_a_padding_token_an_empty_text_is_refused() -> None:
    with serving(served_toy(None)) as address:
        answer = httpx2.post(f"{address}/classify", json={"input": ["a", ""]})
        assert answer.status_code == 400
        assert "has no padding token" in answer.json()["error"]["message"]
        both = httpx2.post(f"{address}/classify", json={"input": ["a", "bc"]}).json()["data"]
        assert both[1]["probs"] == pytest.approx(wanted("bc"), abs=1e-5)


def test_a_key_is_asked_for() -> None:
    with serving(served_toy(), api_key="secret") as address:
        assert httpx2.post(f"{address}/classify", json={"input": "a"}).status_code == 401
        key = {"authorization": "Bearer secret"}
        answer = httpx2.post(f"{address}/classify", json={"input": "a"}, headers=key)
        assert answer.status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "secret"])
def test_the_page_shows_labels_while_one_types(
    key: str | None,
    browser: Any,
) -> None:
    with serving(served_toy(), api_key=key) as address:
        page, said = browser.new_page(viewport={"width": 800, "height": 560}), list[str]()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.fill("#text", "a text")
        if key:
            page.fill("#key", key)  # which is there once it is asked for
        for row, (label, p) in enumerate(
            sorted(zip(LABELS, wanted("a text"), strict=True), key=lambda each: -each[1])
        ):
            shown = page.locator("#labels tr").nth(row)
            assert shown.locator("td").first.text_content() == label
            assert shown.locator("td").last.text_content() == f"{p:.4f}"
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / "labels.png")
        page.fill("#text", "a" * 49)
        page.locator("#trouble", has_text="the prompt has 49 tokens").wait_for()
        assert page.locator("#labels tr").count() == 0
        refused = "Failed to load resource: the server responded with a status of 4"
        assert [line for line in said if not line.startswith(refused)] == []
        page.close()


@pytest.mark.slow
def test_the_command_serves_a_classifier(tmp_path: Path) -> None:
    gptsmith.save(toy(), TOKENIZER, tmp_path / "spam")
    with started(tmp_path / "spam", "--threads", "1") as (_, ready):
        found = re.fullmatch(
            r"serving spam at (http://127\.0\.0\.1:\d+)  "
            r"\(labels: ham, spam, egg; page: /, docs: /docs; Ctrl-C ends\)\n",
            ready,
        )
        assert found, ready
        answer = httpx2.post(f"{found[1]}/classify", json={"model": "spam", "input": "one"})
        assert answer.json()["data"][0]["probs"] == pytest.approx(wanted("one"), abs=1e-5)


def test_the_service_ends_what_is_queued_first() -> None:
    async def ask() -> list[list[float]]:
        async with LabelService(toy(), slots=2, waiting=9) as service:
            return await service.label([[1], [2], [3], [4], [5]])

    with ThreadPoolExecutor(1) as other:  # a browser of another test runs a loop in this thread
        assert len(other.submit(lambda: asyncio.run(ask())).result()) == 5


# -- requests made up from its description

api = schemathesis.openapi.from_dict(make_app(served_toy()).openapi())


@api.hook
def map_body(context: Any, body: Any) -> Any:
    """The body, with the name of a model that there is where it has a name."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        return body | {"model": "toy"}
    return body


def test_its_description_has_what_it_does_and_no_more(server: str) -> None:
    assert httpx2.get(f"{server}/openapi.json").json() == api.raw_schema
    assert "/classify" in api.raw_schema["paths"]
    assert not [path for path in api.raw_schema["paths"] if "completions" in path]


ALSO = re.compile(r"toy is a classifier, which labels texts and does not write")


@pytest.mark.slow
@api.parametrize()
@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
def test_it_answers_as_it_says(case: Any, server: str) -> None:
    response = case.call(base_url=server)
    case.validate_response(response, checks=CHECKS.get_by_names(list(NAMES)))
    if response.status_code == 400 and case.meta.generation.mode is GenerationMode.POSITIVE:
        message = response.json()["error"]["message"]
        assert REASONS.match(message) or ALSO.match(message), f"{message}\n{case.body}"
