"""Requests made up from the server's own description, sensible and not: it answers as it says."""

import re
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from gptsmith import GPT, GPTConfig
from gptsmith.cli.inspect import inspector_page
from gptsmith.serving.app import make_app
from gptsmith.serving.handler import ServedModel
from gptsmith.serving.metrics import Metrics
from gptsmith.serving.worker import Service
from gptsmith.tokenizers import byte_tokenizer
from gptsmith.tokenizers.chat import ChatTemplate
from tests.conftest import TINY, scrambled, single_thread
from tests.serving.running import Running, serving

TOKENIZER = byte_tokenizer()
NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)

# Why a body that fits the description may yet be refused: what a schema cannot say, or what depends
# on the model. All of it in the words that the client is told.
REASONS = re.compile(
    "|".join(
        [
            r"the prompt has [\d,]+ (tokens|characters), but the model's context_length is 48",
            r"the prompt has token ids outside the vocabulary: 0 to 258 are needed",
            r"(logit_bias|stop_token_ids|tokens) has token '?\d+…?'?: 0 to 258 are needed",
            r"min_tokens is \d+: at most max_tokens, \d+, is possible",
            r"either prompt or messages is needed: send one of them",
            r"the request is for [\d,]+ texts: at most 20 are possible",
            r"best_of is \d+: at least n, \d+, is needed",
            r"best_of cannot be streamed",
            r"stream_options needs stream true: leave it out",
            r"top_logprobs needs logprobs true: set it",
            r"max_tokens is the older name of max_completion_tokens: give only one",
            r"the text has a lone surrogate",
            r"seed is -?922337203685477\d{4}: ",  # the description rounds 2^63, as FastAPI writes
        ]
    )
)


def toy() -> GPT:
    return scrambled(GPTConfig(**(TINY | {"vocab_size": 259, "context_length": 48})))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template = ChatTemplate(source, TOKENIZER, {})
    with single_thread(), serving(toy(), TOKENIZER, template=template) as running:
        yield running


def described() -> Any:
    """What such a server says of itself, known before any runs: a test is made of each path."""
    service = Service(toy(), slots=1)
    metrics = Metrics(service.counts, slots=1)
    served = ServedModel(service=service, tokenizer=TOKENIZER, name="toy", metrics=metrics)
    return make_app(served, inspector=inspector_page()).openapi()


api = schemathesis.openapi.from_dict(described())


@api.hook
def map_body(context: Any, body: Any) -> Any:
    """The body, with the name of a model that there is where it has a name."""
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        return body | {"model": "toy"}
    return body


def test_the_description_is_the_servers(server: Running) -> None:
    assert httpx2.get(f"{server.url}/openapi.json").json() == api.raw_schema


@pytest.mark.slow
@api.parametrize()
@settings(
    max_examples=250, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
def test_it_answers_as_it_says(case: Any, server: Running) -> None:
    response = case.call(base_url=server.url)
    case.validate_response(response, checks=CHECKS.get_by_names(list(NAMES)))
    if response.status_code == 400 and case.meta.generation.mode is GenerationMode.POSITIVE:
        message = response.json()["error"]["message"]
        assert REASONS.match(message), f"{message}\n{case.body}"
    if response.status_code >= 400:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.slow
def test_afterwards_nobody_is_left(server: Running) -> None:
    server.wait_until_idle()
    assert len(server.accesses) > 400
    statuses = {access.status for access in server.accesses}
    assert {200, 400, 405} <= statuses
    assert not [status for status in statuses if status >= 500]
