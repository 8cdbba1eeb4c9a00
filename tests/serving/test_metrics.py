"""The figures, read back with Prometheus' own parser."""

import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gptsmith.serving.metrics import ENDPOINTS, OTHER, SHORT, Metrics, endpoint_of


def figures(metrics: Metrics) -> dict[tuple[Any, ...], float]:
    """(name, label values...) -> value, of every sample."""
    return {
        (sample.name.removeprefix("gptsmith_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def test_before_the_first_request() -> None:
    metrics = Metrics(lambda: (0, 0), slots=7)
    told = figures(metrics)
    assert told["slots",] == 7
    assert told["batch_size",] == told["queue_length",] == 0
    assert told["tokens_total", "prompt"] == told["tokens_total", "generated"] == 0
    assert told["time_to_first_token_seconds_count",] == 0
    assert metrics.content_type.startswith("text/plain; version=")


def test_what_is_told_adds_up() -> None:
    metrics = Metrics(lambda: (0, 0), slots=1)
    metrics.finished("/v1/completions", 200, 0.3)
    metrics.finished("/v1/completions", 200, 40.0)
    metrics.finished("/v1/completions", 429, 0.002)
    metrics.finished("/health", 200, 0.001)
    metrics.tokens("prompt", 5)
    metrics.tokens("generated", 3)
    metrics.tokens("generated", 4)
    metrics.first_token(0.2)
    for seconds in (0.02, 0.03, 11.0):
        metrics.next_token(seconds)
    told = figures(metrics)
    assert told["requests_total", "/v1/completions", "200"] == 2
    assert told["requests_total", "/v1/completions", "429"] == 1
    assert told["requests_total", "/health", "200"] == 1
    assert told["request_seconds_count", "/v1/completions"] == 3
    assert math.isclose(told["request_seconds_sum", "/v1/completions"], 40.302)
    assert told["request_seconds_bucket", "/v1/completions", "30.0"] == 2
    assert told["request_seconds_bucket", "/v1/completions", "60.0"] == 3
    assert told["tokens_total", "prompt"] == 5
    assert told["tokens_total", "generated"] == 7
    assert told["time_to_first_token_seconds_bucket", "0.1"] == 0
    assert told["time_to_first_token_seconds_bucket", "0.25"] == 1
    assert told["inter_token_seconds_bucket", "0.025"] == 1
    assert told["inter_token_seconds_bucket", str(SHORT[-1])] == 2
    assert told["inter_token_seconds_bucket", "+Inf"] == 3


def test_gauges_are_read_when_they_are_asked_for() -> None:
    now = [2, 9]
    metrics = Metrics(lambda: (now[0], now[1]), slots=4)
    assert figures(metrics)["batch_size",] == 2
    now[:] = 4, 30
    told = figures(metrics)
    assert (told["batch_size",], told["queue_length",], told["slots",]) == (4, 30, 4)


def test_two_servers_count_apart() -> None:
    one, other = (Metrics(lambda: (0, 0), slots=1) for _ in range(2))
    one.tokens("prompt", 3)
    assert figures(one)["tokens_total", "prompt"] == 3
    assert figures(other)["tokens_total", "prompt"] == 0


@pytest.mark.parametrize(
    ("path", "label"),
    [
        *((path, path) for path in ENDPOINTS),
        ("/v1/models/plays", "/v1/models"),
        ("/docs/swagger-ui.css", "/docs"),
        ("/v1/completions/", "/v1/completions"),
        ("/v1/models/a/b", OTHER),
        ("/favicon.ico", OTHER),
        ("/v1", OTHER),
        ("", OTHER),
    ],
)
def test_labels(path: str, label: str) -> None:
    assert endpoint_of(path) == label


@given(st.text(max_size=9))
def test_a_made_up_path_makes_no_label(path: str) -> None:
    for made in (path, f"/{path}", f"/v1/{path}", f"/v1/models/{path}", f"/docs/{path}"):
        assert endpoint_of(made) in (*ENDPOINTS, OTHER)


def test_a_token_is_counted_in_no_time() -> None:
    """64 streams of ten tokens a second must not be felt: about a microsecond each, ten at most."""
    metrics = Metrics(lambda: (0, 0), slots=64)
    fastest = math.inf
    for _ in range(5):
        begun = time.thread_time()
        for _ in range(1000):
            metrics.next_token(0.2)
        fastest = min(fastest, time.thread_time() - begun)
    assert fastest < 0.010
