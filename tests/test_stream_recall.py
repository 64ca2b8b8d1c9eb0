"""What is recalled, between sinks and window: exact, moved with the sinks, and gone without a trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_stream import EdgeStreamError, UnsupportedModelError
from edge_stream.hardware import devices

N_CTX = 48
TOLERANCE = 2e-2 if any(d.is_local_gpu for d in devices.devices()) else 1e-3  # see test_stream_exact.py

Draw = Callable[..., list[int]]
Load = Callable[..., Any]

# what happens to a stream: feed n tokens one by one, recall a block of n, unrecall, feed n at once
STEPS: list[tuple[str, int]] = [
    ("feed", 20),  # before anything was evicted: the window must make way upwards
    ("recall", 7),
    ("feed", 30),
    ("unrecall", 0),
    ("feed", 5),
    ("recall", 5),
    ("feed", 60),
    ("recall", 10),
    ("chunk", 7),
    ("feed", 60),
    ("recall", 5),  # the first block of 5 again
    ("feed", 20),
    ("unrecall", 0),
    ("feed", 60),
]


def blocks(draw: Draw, n: int) -> list[int]:
    """The block of n tokens."""
    return draw(n, seed=100 + n)


def followed(stream: Any, draw: Draw, save: Callable[[Any], Any] | None = None) -> np.ndarray:
    """Logits after each fed token of STEPS. Stream: of the engine or of the reference."""
    is_reference = not hasattr(stream, "stats")
    tokens, rows = draw(400, seed=5), []
    for step, (what, n) in enumerate(STEPS):
        if what == "recall":
            stream.recall(blocks(draw, n))
        elif what == "unrecall":
            stream.unrecall()
        else:
            fed, tokens = tokens[:n], tokens[n:]
            for piece in [[t] for t in fed] if what == "feed" else [fed]:
                rows.append(stream.feed(piece, len(piece)) if is_reference else stream.logits_of(piece))
        if save is not None and not is_reference and step % 2 == 1:
            stream = save(stream)
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def expected(reference: Any) -> Callable[..., np.ndarray]:
    kept: dict[tuple[str, int], np.ndarray] = {}

    def get(name: str, n_keep: int, draw: Draw) -> np.ndarray:
        if (name, n_keep) not in kept:
            kept[name, n_keep] = followed(reference(name).stream(N_CTX, n_keep), draw)
        return kept[name, n_keep]

    return get


@pytest.mark.parametrize("rebase_at", [0, N_CTX + 20])
@pytest.mark.parametrize("n_keep", [0, 1, 4])
@pytest.mark.parametrize("name", ["gqa", "mha", "linear", "yarn", "factors", "qwen2", "gemma3", "head64"])
def test_logits_equal_reference(
    name: str, n_keep: int, rebase_at: int, load: Load, expected: Any, draw: Draw
) -> None:
    """With a block and without, before and after slides and rebases."""
    engine = load(name, n_ctx=N_CTX, n_keep=n_keep, sink_move="bank", rebase_at=rebase_at)
    with engine.stream() as stream:
        got = followed(stream, draw)
        assert stream.stats.n_rebases > 3 or not rebase_at
    assert np.abs(got - expected(name, n_keep, draw)).max() < TOLERANCE


@pytest.mark.parametrize("name", ["gqa", "qwen2"])
def test_mlc_equals_reference(name: str, load_mlc: Load, expected: Any, draw: Draw, tmp_path: Path) -> None:
    engine = load_mlc(name, n_ctx=N_CTX, rebase_at=N_CTX + 20)
    assert np.abs(followed(engine.stream(), draw) - expected(name, 4, draw)).max() < TOLERANCE


def test_a_session_holds_what_is_recalled(
    load: Load, load_mlc: Load, expected: Any, draw: Draw, tmp_path: Path
) -> None:
    for engine in (load("gqa", n_ctx=N_CTX, sink_move="bank"), load_mlc("gqa", n_ctx=N_CTX)):

        def save(stream: Any, engine: Any = engine) -> Any:
            stream.save(tmp_path / "session")
            n_recalled = stream.stats.n_recalled
            stream.reset()
            restored = engine.restore(tmp_path / "session")
            assert restored.stats.n_recalled == n_recalled
            return restored

        got = followed(engine.stream(), draw, save)
        assert np.abs(got - expected("gqa", 4, draw)).max() < TOLERANCE
