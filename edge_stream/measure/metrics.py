"""Measurements of a stream: resident memory, and latencies in constant space."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_stream.stream import Stream

MIB = 1024 * 1024


def resident_mib() -> float | None:
    """Resident memory of this process in MiB; None if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB
    except (OSError, ValueError, IndexError, AttributeError):
        return _resident_from_ps() or _resident_peak()


def _resident_from_ps() -> float | None:
    """For macOS and the BSDs, which have no statm: `ps`, which reports KiB."""
    import subprocess

    try:
        answer = subprocess.run(
            ["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, timeout=5, check=True
        )
        return int(answer.stdout) / 1024
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _resident_peak() -> float | None:
    """The peak so far: an upper bound, better than nothing."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile (0..100) of values, interpolated linearly; nan if there are none."""
    if not 0 <= q <= 100:
        raise ValueError("q must be between 0 and 100")
    if not values:
        return math.nan
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Latencies:
    """Durations of an endless run in constant space: a histogram with buckets that grow by 1%.

    Percentiles are accurate to 1% between a microsecond and a quarter of an hour; mean and maximum
    are exact.
    """

    _LEAST_MS = 1e-3
    _GROWTH = math.log(1.01)
    _BUCKETS = 2084

    def __init__(self) -> None:
        self._counts = [0] * self._BUCKETS
        self.count = 0
        self.total_ms = 0.0
        self.max_ms = 0.0

    def add(self, ms: float) -> None:
        """Count one duration."""
        bucket = math.ceil(math.log(max(ms, self._LEAST_MS) / self._LEAST_MS) / self._GROWTH)
        self._counts[min(bucket, self._BUCKETS - 1)] += 1
        self.count += 1
        self.total_ms += ms
        self.max_ms = max(self.max_ms, ms)

    def percentile(self, q: float) -> float:
        """The smallest bucket bound that q percent of the durations do not exceed; nan if there are none."""
        if not 0 <= q <= 100:
            raise ValueError("q must be between 0 and 100")
        if not self.count:
            return math.nan
        wanted, seen = max(1, math.ceil(self.count * q / 100)), 0
        for bucket, count in enumerate(self._counts):
            seen += count
            if seen >= wanted:
                return min(self._LEAST_MS * math.exp(bucket * self._GROWTH), self.max_ms)
        return self.max_ms

    @property
    def per_second(self) -> float:
        """Mean rate; 0 without durations."""
        return 1000 * self.count / self.total_ms if self.total_ms else 0.0


def is_full(stream: Stream) -> bool:
    """Whether a stream's cache is full, or has already slid."""
    stats = stream.stats
    return stats.n_slides > 0 or stats.n_cached >= stats.n_ctx


class MemoryWatch:
    """Resident memory from the moment the cache is full.

    `start` is taken when the cache is first full: until then some of its pages have not been touched and are
    not resident, and would later look like growth. If the cache never fills, `start` is the first sample.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._full: float | None = None

    def sample(self, full: bool) -> None:
        """Take a sample if `start` needs one."""
        if self._first is None:
            self._first = resident_mib()
        if full and self._full is None:
            self._full = resident_mib()

    @property
    def filled(self) -> bool:
        """Whether a sample saw the cache full."""
        return self._full is not None

    @property
    def start(self) -> float | None:
        """MiB when the cache was first full."""
        return self._full if self._full is not None else self._first
