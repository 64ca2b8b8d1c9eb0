"""Memory and latencies."""

from __future__ import annotations

import subprocess
import sys

import pytest

from edge_stream.measure import metrics
from edge_stream.measure.metrics import Latencies, MemoryWatch, percentile


def test_percentiles() -> None:
    assert percentile([3, 1, 2], 50) == 2
    assert percentile([1, 2], 75) == 1.75
    assert percentile([5], 99) == 5
    assert percentile([], 50) != percentile([], 50)  # nan
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile([1], 101)


def test_latencies_agree_with_exact_percentiles_in_constant_space() -> None:
    values = [0.001 * 1.01**i for i in range(1500)]
    times = Latencies()
    size = len(times._counts)
    for value in values:
        times.add(value)
    for q in (1, 50, 99, 100):
        exact = sorted(values)[max(0, -(-len(values) * q // 100) - 1)]
        assert times.percentile(q) == pytest.approx(exact, rel=0.011)
    assert times.max_ms == max(values)
    assert times.per_second == pytest.approx(1000 * len(values) / sum(values))
    for extreme in (0.0, 1e12):
        times.add(extreme)
    assert len(times._counts) == size


def test_memory_start_is_when_the_cache_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([100.0, 150.0, 999.0])
    monkeypatch.setattr(metrics, "resident_mib", lambda: next(sizes))
    watch = MemoryWatch()
    watch.sample(full=False)
    watch.sample(full=False)
    assert watch.start == 100.0
    watch.sample(full=True)
    watch.sample(full=True)
    assert watch.start == 150.0


def test_resident_memory_sees_an_allocation() -> None:
    """In a process of its own: what earlier tests left is given back at any moment."""
    program = """
from edge_stream.measure.metrics import resident_mib
before = resident_mib()
block = bytearray(64 << 20)
block[::4096] = b"x" * len(block[::4096])
print(resident_mib() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 50 < float(done.stdout) < 80
