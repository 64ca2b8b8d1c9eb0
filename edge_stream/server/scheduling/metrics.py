"""Prometheus metrics, prefix edge_stream_, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """What the server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"edge_stream_{name}", text, labels, registry=self.registry)

        self.read = counter("tokens_read", "Prompt tokens decoded")
        self.written = counter("tokens_written", "Tokens generated")
        self.steps = counter("steps", "Batches of generated tokens")
        self.requests = counter("requests", "Requests by how their history was matched", ("history",))
        self.restored = counter("sessions_restored", "Conversations restored from disk")
        self.refused = counter("requests_refused", "Requests refused because too many were waiting")
        self.mismatches = counter("log_disagreements", "Conversations whose log did not match their stream")
        self.save_failures = counter("save_failures", "Turns after which the session could not be saved")
        self.save_seconds = Histogram(
            "edge_stream_save_seconds", "Time from the end of a turn until it is on disk", registry=self.registry
        )

        self._gauges = {
            name: Gauge(f"edge_stream_{name}", text, registry=self.registry)
            for name, text in {
                "slots": "Conversations that can be in the cache at once",
                "busy": "Conversations being read or written",
                "in_slots": "Conversations in the cache",
                "known": "Conversations that can be continued",
                "waiting": "Requests waiting for a slot",
                "disk_bytes": "Bytes of saved sessions",
            }.items()
        }

    def text(self, counts: dict[str, int]) -> bytes:
        """The exposition format. counts: what the gauges show, see Scheduler.counts."""
        for name, gauge in self._gauges.items():
            gauge.set(counts[name])
        return generate_latest(self.registry)
