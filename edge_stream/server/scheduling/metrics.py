"""Prometheus metrics: ours, prefix edge_stream_, in a registry of their own; and llama-server's, prefix llamacpp:."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """What the server counts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.llama = LlamaMetrics()
        self.t_start = int(time.time())

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
        return generate_latest(self.registry) + self.llama.text(counts["busy"], counts["waiting"]).encode()


@dataclass
class _Bucket:
    """Tokens, decode steps that they took, and seconds."""

    n: int = 0
    steps: int = 0
    seconds: float = 0.0
    _shown: tuple[int, float] = (0, 0.0)

    def add(self, n: int, steps: int, seconds: float) -> None:
        self.n += n
        self.steps += steps
        self.seconds += seconds

    def speed(self) -> float:
        """Steps per second since it was last asked for; 0 without any."""
        steps, seconds = self.steps - self._shown[0], self.seconds - self._shown[1]
        self._shown = (self.steps, self.seconds)
        return steps / seconds if seconds else 0.0


class LlamaMetrics:
    """What llama-server counts, by its names and in its sense. Thread-safe.

    Written without prometheus_client, which ends a counter's name in _total; llama-server's n_tokens_max does not.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._prompt, self._predicted = _Bucket(), _Bucket()
        self._n_cached = self._n_tokens_max = self._n_decode = self._n_busy = 0
        self._drafts = [0, 0, 0]

    def read(self, n: int, seconds: float) -> None:
        """Prompt tokens were decoded."""
        with self._lock:
            self._prompt.add(n, n, seconds)

    def cached(self, n: int) -> None:
        """Prompt tokens were in the cache."""
        with self._lock:
            self._n_cached += n

    def predicted(self, n: int, steps: int, seconds: float) -> None:
        """An answer has ended. steps: without the first token, which comes of the prompt's decode."""
        with self._lock:
            self._predicted.add(n, steps, seconds)

    def decoded(self, n_busy: int, n_tokens: int = 0) -> None:
        """A batch was decoded, while n_busy slots were busy, the longest of its sequences now n_tokens long."""
        with self._lock:
            self._n_decode += 1
            self._n_busy += n_busy
            self._n_tokens_max = max(self._n_tokens_max, n_tokens)

    def drafted(self, n_drafts: int, n_drafted: int, n_accepted: int) -> None:
        """So many more drafts, of so many tokens, so many of which came true."""
        with self._lock:
            self._drafts = [a + b for a, b in zip(self._drafts, (n_drafts, n_drafted, n_accepted), strict=True)]

    def text(self, n_processing: int, n_deferred: int) -> str:
        """The exposition format. The speeds are those since the last one."""
        with self._lock:
            rows = list(self._rows(n_processing, n_deferred))
        return "".join(
            f"# HELP llamacpp:{name} {text}\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value}\n"
            for kind, name, value, text in rows
        )

    def _rows(self, n_processing: int, n_deferred: int) -> Iterator[tuple[str, str, float, str]]:
        prompt, predicted = self._prompt, self._predicted
        yield "counter", "prompt_tokens_total", prompt.n, "Prompt tokens decoded, those in the cache left out"
        yield "counter", "prompt_tokens_cached_total", self._n_cached, "Prompt tokens that were in the cache"
        yield "counter", "prompt_seconds_total", prompt.seconds, "Seconds of decoding prompts"
        yield "counter", "tokens_predicted_total", predicted.n, "Tokens of answers that have ended"
        yield "counter", "tokens_predicted_seconds_total", predicted.seconds, "Seconds of writing these answers"
        yield "counter", "n_decode_total", self._n_decode, "Batches decoded"
        yield "counter", "n_tokens_max", self._n_tokens_max, "Length of the longest stream, evicted tokens included"
        names = {"drafts": "Drafts", "draft_tokens": "Tokens of drafts", "accepted_tokens": "Those that came true"}
        for n, (name, text) in zip(self._drafts, names.items(), strict=True):
            yield "counter", f"spec_decode_num_{name}_total", n, f"{text} (--spec-type)"
        yield "gauge", "prompt_tokens_seconds", prompt.speed(), "Prompt tokens per second since the last look"
        yield "gauge", "predicted_tokens_seconds", predicted.speed(), "Generated tokens per second since the last look"
        yield "gauge", "requests_processing", n_processing, "Requests being answered"
        yield "gauge", "requests_deferred", n_deferred, "Requests waiting for a slot"
        busy = self._n_busy / max(self._n_decode, 1)
        yield "gauge", "n_busy_slots_per_decode", busy, "Slots busy during a batch, on average"
