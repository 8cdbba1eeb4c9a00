"""/docs: whole, and from this machine only."""

import re
from html.parser import HTMLParser
from importlib.metadata import PackageNotFoundError

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from gptsmith import GPT, GPTConfig
from gptsmith.serving import pages
from gptsmith.serving.app import make_app
from gptsmith.serving.handler import ServedModel
from gptsmith.serving.metrics import Metrics
from gptsmith.serving.pages import START, WRITING, add_docs, add_page
from gptsmith.serving.worker import Service
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY


def application() -> FastAPI:
    app = FastAPI(title="A <b>title</b> & more", docs_url=None, redoc_url=None)
    add_page(app, "/", WRITING)
    add_docs(app)
    return app


class Page(HTMLParser):
    """What a page asks for, what it says, and what in it would run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.tag = self.title = ""
        self.ids: list[str] = []
        self.inline: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        for name, value in attributes:
            if name in ("src", "href"):
                self.asked.append(value or "")
            if name == "id":
                self.ids.append(value or "")
            if name == "style" or name.startswith("on"):
                self.inline.append(name)

    def handle_data(self, data: str) -> None:
        if self.tag == "title":
            self.title += data.strip()
        if self.tag in ("script", "style"):
            self.inline.append(data.strip())


def test_everything_that_the_page_needs_is_here() -> None:
    client = TestClient(application())
    answer = client.get("/docs")
    assert answer.status_code == 200
    page = Page(answer.text)
    assert page.title == "A <b>title</b> & more"
    assert not any(page.inline)
    fetched = {}
    for address in page.asked:
        if not address.startswith("data:"):
            assert ":" not in address
            assert not address.startswith("/")  # relative, for a proxy that adds a prefix
            fetched[address] = client.get(f"/{address}")
    assert {address: answer.status_code for address, answer in fetched.items()} == {
        "docs/swagger-ui.css": 200,
        "docs/swagger-ui-bundle.js": 200,
        "docs/start.js": 200,
        "openapi.json": 200,
    }
    kinds = {
        address.rpartition(".")[2]: answer.headers["content-type"].partition(";")[0]
        for address, answer in fetched.items()
    }
    assert kinds == {"css": "text/css", "js": "text/javascript", "json": "application/json"}


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    policy = TestClient(application()).get("/docs").headers["content-security-policy"]
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split("; ")}
    assert rules.pop("img-src") == ["'self'", "data:"]
    assert {source for sources in rules.values() for source in sources} == {"'none'", "'self'"}
    assert rules["default-src"] == rules["frame-ancestors"] == ["'none'"]


def test_the_script_that_starts_it() -> None:
    """What it calls exists in the bundle, and it names no other machine."""
    client = TestClient(application())
    bundle = client.get("/docs/swagger-ui-bundle.js").text
    assert "SwaggerUIBundle" in bundle
    assert client.get("/docs/start.js").text == START
    assert not re.search(r"https?:|//", START)
    for option in re.findall(r"^  (\w+):", START, flags=re.MULTILINE):
        assert option in bundle, option
    assert "validatorUrl: null" in START
    page = Page(client.get("/docs").text)
    assert re.search(r'dom_id: "#(\w+)"', START)[1] in page.ids  # type: ignore[index]
    assert ".dark-mode" in client.get("/docs/swagger-ui.css").text


def test_the_description_speaks_of_a_key_where_there_is_one() -> None:
    service = Service(GPT(GPTConfig(**(TINY | {"vocab_size": 259}))), slots=1)
    metrics = Metrics(service.counts, slots=1)
    served = ServedModel(service=service, tokenizer=byte_tokenizer(), name="toy", metrics=metrics)
    plain = TestClient(make_app(served)).get("/openapi.json").json()
    assert "securitySchemes" not in plain.get("components", {})
    for operations in plain["paths"].values():
        assert not any("security" in operation for operation in operations.values())
    app = make_app(served, with_key=True)
    for _ in range(2):  # FastAPI keeps the first description
        told = TestClient(app).get("/openapi.json").json()
        assert told["components"]["securitySchemes"] == {
            "key": {"type": "http", "scheme": "bearer"}
        }
        guarded = [path for path in told["paths"] if path.startswith("/v1/")]
        assert len(guarded) == 4
        for path in guarded:
            for operation in told["paths"][path].values():
                assert operation["security"] == [{"key": []}]
        assert "security" not in told["paths"]["/health"]["get"]
    assert not [path for path in told["paths"] if path.startswith("/docs")]


def test_an_application_with_fastapis_own_page_is_refused() -> None:
    with pytest.raises(AssertionError, match="CDN"):
        add_docs(FastAPI())


def test_what_is_said_where_the_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pages, "distribution", missing)
    with pytest.raises(ImportError, match=r"pip install 'gptsmith\[serve\]'"):
        application()
