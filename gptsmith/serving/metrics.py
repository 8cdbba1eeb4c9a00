"""Metrics for Prometheus: requests, tokens, latencies and load.

Knows nothing of HTTP or of the engine: others report events to it, and at each scrape it calls one
function for the numbers of running and waiting jobs. All state is in one object, so that two
servers in one process have separate metrics.
"""

from collections.abc import Callable
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

# The values of the label `endpoint`: an arbitrary path must not create a new time series.
ENDPOINTS = (
    "/",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/health",
    "/metrics",
    "/docs",
    "/openapi.json",
)
OTHER = "other"
KINDS = ("prompt", "generated")

# Upper bounds in seconds. A toy model makes a token in a millisecond, a large one on a busy CPU
# in seconds; a whole request may take minutes.
SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG = (*SHORT, 30.0, 60.0, 120.0, 300.0, 600.0)


def endpoint_of(path: str) -> str:
    """Return the label of a path: an endpoint, the one directly above it, or `other`."""
    if path in ENDPOINTS:
        return path
    parent = path.rpartition("/")[0]
    return parent if parent in ENDPOINTS else OTHER


class Metrics:
    """The metrics of one server.

    `counts` returns the numbers of running and waiting jobs; `slots` is the number of slots.
    """

    def __init__(self, counts: Callable[[], tuple[int, int]], *, slots: int) -> None:
        self._registry = CollectorRegistry()
        self._requests = self._counter(
            "requests", "Requests answered, by endpoint and HTTP status.", "endpoint", "status"
        )
        self._tokens = self._counter(
            "tokens", "Tokens read from prompts, and tokens generated.", "kind"
        )
        for kind in KINDS:  # both are zero, rather than missing, before the first request
            self._tokens.labels(kind)
        self._request_seconds = self._histogram(
            "request_seconds", "From a request's arrival to its last byte.", LONG, "endpoint"
        )
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to a text's first token.", LONG
        )
        self._next_token = self._histogram(
            "inter_token_seconds", "From one token of a text to its next.", SHORT
        )
        self._gauge("slots", "Texts that can be generated at once.", lambda: slots)
        self._gauge("batch_size", "Texts being generated now.", lambda: counts()[0])
        self._gauge("queue_length", "Texts waiting for a slot now.", lambda: counts()[1])

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"gptsmith_{name}", meaning, labels, registry=self._registry)

    def _histogram(
        self, name: str, meaning: str, bounds: tuple[float, ...], *labels: str
    ) -> Histogram:
        return Histogram(
            f"gptsmith_{name}", meaning, labels, buckets=bounds, registry=self._registry
        )

    def _gauge(self, name: str, meaning: str, value: Callable[[], float]) -> None:
        Gauge(f"gptsmith_{name}", meaning, registry=self._registry).set_function(value)

    def finished(self, path: str, status: int, seconds: float) -> None:
        """Record a request for `path` that got `status` after so many seconds."""
        endpoint = endpoint_of(path)
        self._requests.labels(endpoint, str(status)).inc()
        self._request_seconds.labels(endpoint).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Record the time from a request's arrival to a text's first token."""
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Record the time between two tokens of a text."""
        self._next_token.observe(seconds)

    def tokens(self, kind: Literal["prompt", "generated"], count: int) -> None:
        """Add to the number of tokens that were read or generated."""
        self._tokens.labels(kind).inc(count)

    @property
    def content_type(self) -> str:
        """The media type of `text`."""
        return CONTENT_TYPE_LATEST

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
