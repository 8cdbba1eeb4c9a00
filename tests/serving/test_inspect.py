"""POST /inspect, and the page that a token of the server's page leads to."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch

from gptsmith import GPTConfig
from gptsmith.inspection import inspect
from gptsmith.serving.inspecting import MOST_TOKENS
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled, single_thread
from tests.serving.running import Running, serving

TOKENIZER = byte_tokenizer()
MODEL = scrambled(GPTConfig(**(TINY | {"vocab_size": 259, "context_length": 200})))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with single_thread(), serving(MODEL, TOKENIZER, key="secret") as running:
        yield running


def post(server: Running, body: Any, key: str = "secret") -> httpx2.Response:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.post(f"{server.url}/inspect", json=body, headers=headers, timeout=120)


@pytest.mark.slow
def test_it_returns_what_the_functions_do(server: Running) -> None:
    told = post(server, {"model": "toy", "prompt": "the cat"}).json()
    found = inspect(MODEL, [*b"the cat"], vocab_size=TOKENIZER.vocab_size)
    assert "".join(token["text"] for token in told["tokens"]) == "the cat"
    assert told["cut"] == 0
    assert told["heads"][3]["first"] == pytest.approx(found.scores["first"][1, 0], rel=1e-3)
    assert told["attention"][1][2][6][4] == pytest.approx(found.weights[1, 2, 6, 4], abs=6e-4)
    long = post(server, {"prompt": "x" + "y" * 150}).json()
    assert (len(long["tokens"]), long["cut"]) == (MOST_TOKENS, 151 - MOST_TOKENS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "says", "body"),
    [
        (400, "prompt", {"prompt": ""}),
        (400, "prompt", {}),
        (400, "prompt", {"prompt": [1, 2]}),
        (400, "but the model's context_length is 200", {"prompt": "x" * 5000}),
        (404, "no model", {"model": "other", "prompt": "x"}),
    ],
)
def test_mistakes_are_named(server: Running, status: int, says: str, body: Any) -> None:
    response = post(server, body)
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


@pytest.mark.slow
def test_it_needs_the_key_and_its_page_does_not(server: Running) -> None:
    assert post(server, {"prompt": "x"}, key="wrong").status_code == 401
    page = httpx2.get(f"{server.url}/inspect.html")
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'self'" in policy


@pytest.mark.slow
def test_looking_changes_nothing_of_what_is_generated(server: Running) -> None:
    """The engine and the hooks use the same weights at the same time."""
    client = server.client("secret")

    def written() -> str:
        made = client.completions.create(model="toy", prompt="the", max_tokens=150, temperature=0)
        return made.choices[0].text

    alone, looking = written(), threading.Event()

    def look() -> None:
        while not looking.is_set():
            assert post(server, {"prompt": "the cat sat"}).status_code == 200

    thread = threading.Thread(target=look)
    thread.start()
    try:
        assert [written() for _ in range(5)] == [alone] * 5
    finally:
        looking.set()
        thread.join()
    with torch.no_grad():  # its modules are as they were
        MODEL(torch.tensor([[1, 2, 3]]))
    assert not any(module._forward_hooks for module in MODEL.modules())


@pytest.mark.slow
def test_one_prompt_is_looked_at_at_a_time(server: Running) -> None:
    begun, go_on = threading.Event(), threading.Event()
    look = server.served.look
    assert look is not None

    def slowly(tokens: Any) -> Any:
        begun.set()
        go_on.wait(120)
        return look(tokens)

    object.__setattr__(server.served, "look", slowly)
    first: list[httpx2.Response] = []
    thread = threading.Thread(target=lambda: first.append(post(server, {"prompt": "ab"})))
    thread.start()
    try:
        assert begun.wait(120)
        refused = post(server, {"prompt": "cd"})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
    finally:
        go_on.set()
        thread.join()
        object.__setattr__(server.served, "look", look)
    assert first[0].status_code == 200


@pytest.mark.slow
def test_a_token_of_the_page_leads_inside(server: Running, browser: Any) -> None:
    context = browser.new_context()
    said: list[str] = []
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.add_init_script("sessionStorage.setItem('gptsmith.key', 'secret')")
    page.goto(server.url)
    page.fill("#prompt", "the cat")
    page.fill("#max_tokens", "12")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".sheet[data-finish]", timeout=120_000)
    page.locator(".sheet .token").nth(4).click()
    with context.expect_page() as opened:
        page.locator("#popup a").click()
    inside = opened.value
    inside.on("console", lambda message: said.append(message.text))
    inside.wait_for_selector("main:not([hidden])", timeout=120_000)
    data = inside.evaluate("JSON.stringify(data.tokens.map(token => token.text))")
    assert json.loads(data)[: len("the cat")] == list("the cat")
    count = inside.inner_text("#count")  # it stands before the token that was chosen
    place, length = (int(word) for word in count.split() if word.isdigit())
    assert place == length - 1
    assert inside.title() == "Inside toy"
    assert said == []
    inside.goto(f"{server.url}/inspect.html")
    assert "There is nothing to show" in inside.inner_text("#trouble")
    context.close()
