"""On whatever GPU the libraries in use offer: offloading, rounding, drift, sessions, memory. Skipped without one.

`make test-vulkan` and `make test-cuda` run these, and the tests of exactness and sessions, with all layers offloaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_stream import EdgeStreamError
from edge_stream.hardware import devices

Load = Callable[..., Any]
Draw = Callable[..., list[int]]

GPUS = [d for d in devices.devices() if d.is_local_gpu]
pytestmark = pytest.mark.skipif(not GPUS, reason="no GPU among the devices of the libraries in use")

N_CTX = 48


def pieces(stream: Any, tokens: list[int], size: int) -> np.ndarray:
    """Logits [n_tokens, n_vocab] of a stream fed in pieces of a size."""
    return np.concatenate([stream.logits_of(tokens[i : i + size]) for i in range(0, len(tokens), size)])


def test_everything_is_on_the_device(load: Load) -> None:
    engine = load("head64", n_ctx=N_CTX)
    assert [d.name for d in engine.devices] == [d.name for d in GPUS]
    assert engine.cache_bytes(N_CTX) == (0, N_CTX * engine.kv_bytes_per_token)
    assert load("head64", n_ctx=N_CTX, devices=["none"]).devices == []


@pytest.mark.parametrize(("size", "flash_attn"), [(7, "off"), (7, "on"), (1, "on")])
def test_sliding_adds_nothing_to_the_devices_rounding(
    size: int, flash_attn: str, load: Load, reference: Any, draw: Draw
) -> None:
    """Where a backend rounds to float16 (batches, flash attention), tokens after slides are as exact as before."""
    tokens = draw(4 * N_CTX)
    with load("head64", n_ctx=N_CTX, flash_attn=flash_attn).stream() as stream:
        got = pieces(stream, tokens, size)
        assert stream.stats.n_slides > 10
    expected = reference("head64").stream(N_CTX, 4)
    want = np.concatenate([expected.feed(tokens[i : i + size], size) for i in range(0, len(tokens), size)])
    error = np.abs(got - want).mean(axis=1)
    assert error[N_CTX:].mean() < 1.5 * error[10:N_CTX].mean() + 1e-5
    # a stream with other sinks is far away
    other = reference("head64").stream(N_CTX, 3)
    wrong = np.concatenate([other.feed(tokens[i : i + size], size) for i in range(0, len(tokens), size)])
    assert np.abs(got - wrong).mean(axis=1)[N_CTX:].mean() > 10 * error[N_CTX:].mean()


@pytest.mark.parametrize("type_k", ["f16", "q8_0"])
def test_no_drift(type_k: str, load: Load, draw: Draw) -> None:
    """16 cache lengths with rebases: |NLL - NLL of the CPU's float32 stream| does not grow."""
    tokens = draw(16 * N_CTX)
    nll = []
    for options in ({"devices": ["none"]}, {"cache_type_k": type_k}):
        with load("head64", n_ctx=N_CTX, rebase_at=2 * N_CTX, **options).stream() as stream:
            logits = pieces(stream, tokens, 11).astype(np.float64)
            assert stream.stats.n_rebases > 5
        top = logits.max(axis=1, keepdims=True)
        norm = np.log(np.exp(logits - top).sum(axis=1)) + top[:, 0]
        nll.append((norm - logits[np.arange(len(tokens)), np.roll(tokens, -1)])[:-1])
    error = np.abs(nll[1] - nll[0])
    third = len(error) // 3
    assert error[2 * third :].mean() < 1.5 * error[N_CTX : N_CTX + third].mean()


def test_a_layer_on_the_cpu_and_one_on_the_device(load: Load, draw: Draw) -> None:
    tokens = draw(3 * N_CTX)
    options = {"n_ctx": N_CTX, "rebase_at": N_CTX + 20}
    rows = []
    for placement in ({"devices": ["none"]}, {"n_gpu_layers": 2}):
        engine = load("head64", **options, **placement)
        with engine.stream() as stream:
            rows.append(pieces(stream, tokens, 1))
    assert 0 < engine.cache_bytes(N_CTX)[1] < N_CTX * engine.kv_bytes_per_token
    assert np.abs(rows[0] - rows[1]).max() < 1e-3


def test_a_session_goes_from_the_device_to_the_cpu_and_back(load: Load, draw: Draw, tmp_path: Path) -> None:
    on_device, on_cpu = load("head64", n_ctx=N_CTX), load("head64", n_ctx=N_CTX, devices=["none"])
    tail = draw(2 * N_CTX, seed=2)
    with on_device.stream() as stream:
        pieces(stream, draw(3 * N_CTX), 1)
        stream.save(tmp_path / "s")
        want = pieces(stream, tail, 1)
    with on_cpu.restore(tmp_path / "s") as stream:
        half = pieces(stream, tail[:N_CTX], 1)
        stream.save(tmp_path / "s")
    with on_device.restore(tmp_path / "s") as stream:
        got = np.concatenate([half, pieces(stream, tail[N_CTX:], 1)])
    assert np.abs(got - want).max() < 1e-3


def test_a_cache_too_large_for_the_device_names_what_fits(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that is almost full; the size named is most of what is free, and it loads."""
    per_token = load("head64", n_ctx=N_CTX).kv_bytes_per_token
    free = 300 * per_token
    told = devices.device
    monkeypatch.setattr(devices, "device", lambda handle: replace(told(handle), free=free // len(GPUS)))
    with pytest.raises(EdgeStreamError, match="MiB free") as refused:
        load("head64", n_ctx=512)
    found = re.search(r"-c (\d+) is the largest that fits", str(refused.value))
    assert found and 150 < int(found[1]) <= 300
    load("head64", n_ctx=int(found[1])).close()
