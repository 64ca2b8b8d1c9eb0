"""The stream's logits equal those of an independent NumPy float64 StreamingLLM (in-cache positions, no tricks)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest

from edge_stream import EdgeStreamError, UnsupportedModelError
from edge_stream.hardware import devices

N_CTX = 48
N_TOKENS = 4 * N_CTX  # three cache lengths past the end
TOLERANCE = 1e-3
# llama.cpp's GPU backends round batches to float16 in places, slides or not (up to 8e-3 on tokens before the first one,
# measured on Vulkan); test_gpu.py asserts that slides add nothing to it
BATCH_TOLERANCE = 2e-2 if any(d.is_local_gpu for d in devices.devices()) else TOLERANCE

Draw = Callable[..., list[int]]
Load = Callable[..., Any]


def split(tokens: list[int], size: int) -> list[list[int]]:
    """Pieces of a size."""
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def streamed(engine: Any, tokens: list[int], size: int) -> np.ndarray:
    """Logits [n_tokens, n_vocab] of an engine fed in pieces of a size."""
    with engine.stream() as stream:
        return np.concatenate([stream.logits_of(piece) for piece in split(tokens, size)])


@pytest.fixture(scope="module")
def expected(reference: Any) -> Callable[..., np.ndarray]:
    """Reference logits, computed once per setting."""

    @cache
    def get(name: str, n_keep: int, size: int, tokens: tuple[int, ...]) -> np.ndarray:
        stream = reference(name).stream(N_CTX, n_keep)
        return np.concatenate([stream.feed(piece, len(piece)) for piece in split(list(tokens), size)])

    return get


@pytest.mark.parametrize("sink_move", ["bank", "redecode"])
@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize("n_keep", [0, 1, 4, 17])
@pytest.mark.parametrize("name", ["gqa", "mha"])
def test_logits_equal_reference(
    name: str, n_keep: int, size: int, sink_move: str, load: Load, expected: Any, draw: Draw
) -> None:
    tokens = draw(N_TOKENS)
    engine = load(name, n_ctx=N_CTX, n_keep=n_keep, sink_move=sink_move, n_slide=1)
    got = streamed(engine, tokens, size)
    # redecoding feeds the sinks as a batch
    tolerance = TOLERANCE if size == 1 and sink_move == "bank" else BATCH_TOLERANCE
    assert np.abs(got - expected(name, n_keep, size, tuple(tokens))).max() < tolerance


def test_the_tolerance_can_fail(load: Load, expected: Any, draw: Draw) -> None:
    """A stream with other sinks or another window is far outside of the tolerance."""
    tokens = draw(N_TOKENS)
    want = expected("gqa", 4, 1, tuple(tokens))
    for n_ctx, n_keep in ((N_CTX, 3), (N_CTX - 1, 4)):
        got = streamed(load("gqa", n_ctx=n_ctx, n_keep=n_keep), tokens, 1)
        assert np.abs(got - want).max() > 20 * TOLERANCE


@pytest.mark.parametrize("sink_move", ["bank", "redecode"])
@pytest.mark.parametrize("name", ["linear", "yarn", "factors", "qwen2", "gemma3", "head64"])
def test_rope_kinds_and_rebase(name: str, sink_move: str, load: Load, expected: Any, draw: Draw) -> None:
    """Scaled RoPE, YaRN's magnitude, Llama 3 factors, sliding-window layers; with a rebase every few tokens."""
    if sink_move == "redecode" and name in ("yarn", "gemma3"):
        with pytest.raises(UnsupportedModelError, match="needs the sink bank"):
            load(name, n_ctx=N_CTX, sink_move=sink_move)
        return
    tokens = draw(N_TOKENS)
    engine = load(name, n_ctx=N_CTX, n_keep=4, sink_move=sink_move, n_slide=1, rebase_at=N_CTX + 20)
    with engine.stream() as stream:
        got = np.concatenate([stream.logits_of([token]) for token in tokens])
        assert stream.stats.n_rebases > 5
    tolerance = TOLERANCE if sink_move == "bank" else BATCH_TOLERANCE
    assert np.abs(got - expected(name, 4, 1, tuple(tokens))).max() < tolerance


@pytest.mark.parametrize("sink_move", ["bank", "redecode"])
def test_long_prompt_is_chunked_by_the_rule(sink_move: str, load: Load, reference: Any, draw: Draw) -> None:
    """A prompt of many cache lengths in one call: chunks of min(n_batch, n_window / 4), nothing truncated."""
    n_ctx, n_keep, n_batch = 96, 5, 16
    tokens = draw(1000)
    engine = load("gqa", n_ctx=n_ctx, n_keep=n_keep, n_batch=n_batch, sink_move=sink_move, n_slide=1)
    with engine.stream() as stream:
        got = stream.logits_of(tokens)
        stats = stream.stats
    n_chunk = min(n_batch, (n_ctx - n_keep) // 4)
    fill = [n_keep] + [n_batch] * ((n_ctx - n_keep) // n_batch)
    chunks = [*fill]
    if (rest := n_ctx - sum(fill)) >= n_chunk:
        chunks.append(rest)
    while (left := len(tokens) - sum(chunks)) > 0:
        chunks.append(min(n_chunk, left))
    want = reference("gqa").stream(n_ctx, n_keep).feed(tokens, chunks)
    assert stats.n_chunk == n_chunk
    assert stats.n_past == len(tokens)
    assert stats.n_cached == n_ctx
    assert np.abs(got - want).max() < BATCH_TOLERANCE


@pytest.mark.parametrize("n_slide", [5, 20])
def test_larger_slides(n_slide: int, load_each: Load, reference: Any, draw: Draw) -> None:
    """Evicting n_slide tokens at once: between slides the sinks' keys are not written."""
    tokens = draw(N_TOKENS)
    got = streamed(load_each("gqa", n_ctx=N_CTX, n_slide=n_slide), tokens, 1)
    want = reference("gqa").stream(N_CTX, 4, n_slide).feed(tokens, 1)
    assert np.abs(got - want).max() < TOLERANCE


@pytest.mark.parametrize("flash_attn", ["off", "on"])
@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8_0", "q4_0"])
def test_cache_types(type_k: str, flash_attn: str, load: Load, draw: Draw) -> None:
    """Moving the sinks adds no error to a cache type's own: 10 cache lengths on, a stream that moved its sinks
    hundreds of times differs from the float32 stream as much as one whose sinks never moved did."""
    tokens = draw(12 * N_CTX)
    type_v = type_k if flash_attn == "on" else "f32"
    options = {"n_ctx": N_CTX, "sink_move": "auto", "n_slide": 1}
    exact = streamed(load("head64", **options), tokens, 1)
    rounded = streamed(
        load("head64", cache_type_k=type_k, cache_type_v=type_v, flash_attn=flash_attn, **options), tokens, 1
    )
    error = np.abs(rounded - exact).mean(axis=1)
    before, after = error[N_CTX // 2 : N_CTX].mean(), error[10 * N_CTX :].mean()
    assert after < 1.5 * before


@pytest.mark.parametrize("sink_move", ["bank"])
@pytest.mark.parametrize("size", [3, 11])
def test_sliding_window_layers_in_chunks(sink_move: str, size: int, load: Load, expected: Any, draw: Draw) -> None:
    """llama.cpp would reuse cells outside of the sliding window, the sinks' among them."""
    tokens = draw(8 * N_CTX)
    got = streamed(load("gemma3", n_ctx=N_CTX, sink_move=sink_move), tokens, size)
    assert np.abs(got - expected("gemma3", 4, size, tuple(tokens))).max() < BATCH_TOLERANCE


@pytest.mark.parametrize("size", [1, 2])
def test_rebase_between_turns_with_room_left(size: int, load: Load, draw: Draw) -> None:
    """The sinks' keys follow even if the next feed needs no slide."""
    tokens = draw(200)
    rows = []
    for idle in (False, True):
        with load("gqa", n_ctx=64, n_slide=16).stream() as stream:
            for token in tokens[:170]:
                stream.feed([token])
            assert stream.stats.n_cached < 64
            if idle:
                stream.rebase()
            rows.append(np.concatenate([stream.logits_of(tokens[i : i + size]) for i in range(170, 172, size)]))
            if stream.stats.sink_move == "bank":
                assert stream.stats.n_rebases == int(idle)
    assert np.abs(rows[0] - rows[1]).max() < (TOLERANCE if size == 1 else BATCH_TOLERANCE)


def test_a_placed_stream_goes_on_as_it_would(load_each: Load, draw: Draw) -> None:
    tokens = draw(200)
    with load_each("gqa", n_ctx=32) as engine, engine.stream() as stream:
        with pytest.raises(EdgeStreamError, match="once its cache is full"):
            stream.place(1000)
        stream.feed(tokens[:100])
        stream.feed(tokens[100:150])
        expected = stream.logits
        stream.reset()
        stream.feed(tokens[:100])
        with pytest.raises(EdgeStreamError, match="not before where it is"):
            stream.place(99)
        stream.mark()
        stream.place(5_000_000_000)
        stream.feed(tokens[100:150])
        assert (stream.stats.n_past, stream.stats.n_evicted) == (5_000_000_050, 5_000_000_018)
        assert np.array_equal(stream.logits, expected)


def test_a_new_stream_takes_the_cache_over(load_each: Load, draw: Draw) -> None:
    """Closing the old one, even late, leaves the new one alone."""
    engine = load_each("gqa", n_ctx=64)
    with engine.stream() as alone:
        want = alone.logits_of(draw(100))[-1]
    old = engine.stream()
    old.feed(draw(50, seed=3))
    new = engine.stream()
    new.feed(draw(100)[:60])
    old.close()
    assert np.array_equal(new.logits_of(draw(100)[60:])[-1].argmax(), want.argmax())
    with pytest.raises(EdgeStreamError, match="stream is closed"):
        old.feed([10])


@pytest.mark.skipif(BATCH_TOLERANCE != TOLERANCE, reason="hours on a software GPU")
def test_endless_counters_and_logits(load: Load, reference: Any, draw: Draw) -> None:
    """Far along, with many rebases, every counter is exact and the logits still equal the reference's."""
    n_ctx, n_far = 64, 100_000
    engine = load("gqa", n_ctx=n_ctx, n_keep=4, sink_move="auto", n_slide=1)
    tail = draw(16 * n_ctx, seed=9)  # the layers look back 2 windows; 16 are plenty
    head = draw(n_far)
    with engine.stream() as stream:
        stream.feed(head)
        stats = stream.stats
        assert (stats.n_past, stats.n_cached, stats.n_evicted) == (n_far, n_ctx, n_far - n_ctx)
        assert stats.n_rebases >= n_far // 4096 - 1
        assert stats.pos_next <= 4096
        got = stream.logits_of(tail)
    assert np.isfinite(got).all()
    # the reference sees the sinks and the tail only: what came between left the cache long ago
    want = reference("gqa").stream(n_ctx, 4).feed(head[:4] + tail, _sizes(len(tail), n_ctx, 4))
    assert np.abs(got[-n_ctx:] - want[-n_ctx:]).max() < BATCH_TOLERANCE


def _sizes(n_tail: int, n_ctx: int, n_keep: int) -> list[int]:
    """Chunks that evict at the same places as a stream that is full already."""
    n_chunk = (n_ctx - n_keep) // 4
    sizes, left = [n_keep], n_tail
    while left:
        sizes.append(min(n_chunk, left))
        left -= sizes[-1]
    return sizes
