"""The server's metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "litune_requests", "Requests answered", ["method", "path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "litune_request_seconds", "Seconds to answer", ["path"], buckets=SECONDS, registry=self.registry
        )
        self.batches = Histogram(
            "litune_batch_size", "Texts, pictures or searches done at once", ["kind"], buckets=SIZES,
            registry=self.registry,
        )  # fmt: skip
        self.texts = Counter("litune_texts", "Texts asked for", ["from"], registry=self.registry)
        self.running = Gauge("litune_running_requests", "Requests being answered", registry=self.registry)
        queue = Gauge("litune_queue", "Jobs that wait for the model", registry=self.registry)
        queue.set_function(waiting)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
