"""What the server counts, for Prometheus to read at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one server, in a registry of their own: two servers in a process do not add up. It observes the generator."""

    def __init__(self) -> None:
        own = CollectorRegistry()
        self.registry = own
        self.requests = Counter(
            "nybble_requests", "Requests by route and HTTP status", ["route", "status"], registry=own
        )
        self.answers = Counter(
            "nybble_answers", "Answers by model and why they ended", ["model", "finish"], registry=own
        )
        self.tokens = Counter(
            "nybble_tokens", "Tokens read (prompt) and made (answer)", ["model", "kind"], registry=own
        )
        self.first = Histogram(
            "nybble_first_token_seconds", "From request to first token", ["model"], buckets=SECONDS, registry=own
        )
        self.seconds = Histogram(
            "nybble_answer_seconds", "From request to last token", ["model"], buckets=SECONDS, registry=own
        )
        self.batch_rows = Histogram("nybble_batch_rows", "Answers a batch began with", buckets=BATCHES, registry=own)
        self.running = Gauge("nybble_running", "Answers that are being made", registry=own)
        self.waiting = Gauge("nybble_waiting", "Answers that wait for their turn", registry=own)

    def batch_started(self, rows: int) -> None:
        """Of a generator: a batch of so many requests is computed from here on."""
        self.batch_rows.observe(rows)

    def load_changed(self, running: int, waiting: int) -> None:
        """Of a generator: so many requests are being answered, and so many wait."""
        self.running.set(running)
        self.waiting.set(waiting)

    def text(self) -> bytes:
        """All of it in Prometheus' text form."""
        return generate_latest(self.registry)
