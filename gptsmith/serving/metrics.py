"""Metrics for Prometheus: requests, tokens, latencies and load.

Knows nothing of HTTP or of the engine: others report events to it, and at each scrape it calls one
function for the numbers of running and waiting jobs. All state is in one object, so that two
servers in one process have separate metrics.
"""

from collections.abc import Callable, Sequence
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
    "/classify",
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

    content_type = CONTENT_TYPE_LATEST  # of `text`

    def __init__(self, counts: Callable[[], tuple[int, int]], *, slots: int) -> None:
        self.registry = CollectorRegistry()
        self.requests = self.counter(
            "requests", "Requests answered, by endpoint and HTTP status.", "endpoint", "status"
        )
        self.token_counts = self.counter(
            "tokens", "Tokens read from prompts, and tokens generated.", "kind"
        )
        for kind in KINDS:  # both are zero, rather than missing, before the first request
            self.token_counts.labels(kind)
        self.request_seconds = self.histogram(
            "request_seconds", "From a request's arrival to its last byte.", LONG, "endpoint"
        )
        # Each of these two is called with the seconds that passed.
        self.first_token = self.histogram(
            "time_to_first_token_seconds", "From a request's arrival to a text's first token.", LONG
        ).observe
        self.next_token = self.histogram(
            "inter_token_seconds", "From one token of a text to its next.", SHORT
        ).observe
        for name, meaning, value in (
            ("slots", "Texts that can be generated at once.", lambda: slots),
            ("batch_size", "Texts being generated now.", lambda: counts()[0]),
            ("queue_length", "Texts waiting for a slot now.", lambda: counts()[1]),
        ):
            Gauge(f"gptsmith_{name}", meaning, registry=self.registry).set_function(value)

    def counter(self, name: str, meaning: str, *labels: str) -> Counter:
        """Return a new counter."""
        return Counter(f"gptsmith_{name}", meaning, labels, registry=self.registry)

    def histogram(
        self, name: str, meaning: str, bounds: Sequence[float], *labels: str
    ) -> Histogram:
        """Return a new histogram of seconds."""
        name = f"gptsmith_{name}"
        return Histogram(name, meaning, labels, buckets=bounds, registry=self.registry)

    def finished(self, path: str, status: int, seconds: float) -> None:
        """Record a request for `path` that got `status` after so many seconds."""
        endpoint = endpoint_of(path)
        self.requests.labels(endpoint, str(status)).inc()
        self.request_seconds.labels(endpoint).observe(seconds)

    def tokens(self, kind: Literal["prompt", "generated"], count: int) -> None:
        """Add to the number of tokens that were read or generated."""
        self.token_counts.labels(kind).inc(count)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
