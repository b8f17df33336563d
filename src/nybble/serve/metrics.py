"""The server's metrics, which Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one server, and its generator's observer. Their registry is their own, so that two servers in one process
    are counted separately."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "nybble_requests", "Requests by route and HTTP status", ["route", "status"], registry=registry
        )
        self.answers = Counter(
            "nybble_answers", "Answers by model and why they ended", ["model", "finish"], registry=registry
        )
        self.tokens = Counter(
            "nybble_tokens", "Tokens read (prompt) and made (answer)", ["model", "kind"], registry=registry
        )
        self.first_token = Histogram(
            "nybble_first_token_seconds", "From request to first token", ["model"], buckets=SECONDS, registry=registry
        )
        self.seconds = Histogram(
            "nybble_answer_seconds", "From request to last token", ["model"], buckets=SECONDS, registry=registry
        )
        self.batch_rows = Histogram(
            "nybble_batch_rows", "Answers a batch began with", buckets=BATCHES, registry=registry
        )
        self.running = Gauge("nybble_running", "Answers that are being made", registry=registry)
        self.waiting = Gauge("nybble_waiting", "Answers that wait for their turn", registry=registry)

    def batch_started(self, rows: int) -> None:
        """The generator has started a batch of so many requests."""
        self.batch_rows.observe(rows)

    def load_changed(self, running: int, waiting: int) -> None:
        """So many of the generator's requests are running, and so many wait."""
        self.running.set(running)
        self.waiting.set(waiting)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
