"""Several streams in one engine: each is what it would be alone, however the others go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_stream import EdgeStreamError, Sampling

Load = Callable[..., Any]
Draw = Callable[..., list[int]]

N = 3


@pytest.mark.parametrize("sink_move", ["bank", "redecode"])
@pytest.mark.parametrize("name", ["gqa", "yarn", "gemma3"])
def test_streams_decoded_together_are_as_alone(name: str, sink_move: str, load: Load, draw: Draw) -> None:
    """Different prompts, all sliding and rebasing; a stream that pauses leaves a gap between the sequences."""
    if sink_move == "redecode" and name != "gqa":
        pytest.skip("needs the bank")
    options = {"n_ctx": 48, "n_keep": 4, "sink_move": sink_move, "rebase_at": 100, "n_slide": 1}
    together, alone = load(name, n_parallel=N, **options), load(name, **options)
    prompts = [draw(5 + 30 * i, seed=i) for i in range(N)]
    texts = [draw(150, seed=10 + i) for i in range(N)]
    paused = range(60, 90)  # steps without the middle stream

    streams = [together.stream(seq_id=i) for i in range(N)]
    for stream, prompt in zip(streams, prompts, strict=True):
        stream.feed(prompt)
    for step in range(150):
        fed = [i for i in range(N) if i != 1 or step not in paused]
        together.feed_each([streams[i] for i in fed], [texts[i][step] for i in fed])

    for i in range(N):
        single = alone.stream()
        single.feed(prompts[i])
        for step in range(150):
            if i != 1 or step not in paused:
                single.feed(texts[i][step : step + 1])
        assert streams[i].tokens() == single.tokens()
        assert streams[i].stats.n_slides == single.stats.n_slides > 0
        assert streams[i].stats.n_rebases == single.stats.n_rebases > 0
        assert np.abs(streams[i].logits - single.logits).max() < 1e-3


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_many_streams_may_slide_at_once(cache_type: str, load: Load, draw: Draw) -> None:
    """The sinks of every sequence are in one decode graph, which must have room for them."""
    n = 64
    engine = load("head64", n_parallel=n, n_ctx=32, cache_type_k=cache_type, cache_type_v=cache_type, flash_attn="on")
    streams = [engine.stream(seq_id=i) for i in range(n)]
    for i, stream in enumerate(streams):
        stream.feed(draw(40, seed=i))
    for step in range(20):
        engine.feed_each(streams, draw(n, seed=100 + step))
    for stream in streams:
        assert stream.stats.n_past == 60 and stream.stats.n_slides >= 20
        assert np.isfinite(stream.logits).all()


def test_generations_side_by_side_have_their_own_logits_and_samplers(load: Load, draw: Draw) -> None:
    engine, alone = load("gqa", n_parallel=N, n_ctx=48), load("gqa", n_ctx=48)
    prompts = [draw(20, seed=i) for i in range(N)]
    sampling = [Sampling(seed=i, temp=0.9) for i in range(N)]

    streams = [engine.stream(seq_id=i) for i in range(N)]
    for stream, prompt in zip(streams, prompts, strict=True):
        stream.feed(prompt)
    writers = [s.writer(40, sampling=g, ignore_eos=True) for s, g in zip(streams, sampling, strict=True)]
    together: list[list[int]] = [[] for _ in range(N)]
    while not writers[0].finished:
        tokens = [writer.choose() for writer in writers]
        engine.feed_each(streams, tokens)
        for written, writer in zip(together, writers, strict=True):
            written.append(writer.record().token)
    assert all(writer.finished for writer in writers)

    for i in range(N):
        single = alone.stream()
        single.feed(prompts[i])
        assert [t.token for t in single.generate(40, sampling=sampling[i], ignore_eos=True)] == together[i]


def test_a_session_goes_on_in_another_sequence(load: Load, draw: Draw, tmp_path: Path) -> None:
    engine = load("gqa", n_parallel=2, n_ctx=48)
    first, other = engine.stream(seq_id=0), engine.stream(seq_id=1)
    other.feed(draw(30, seed=9))
    first.feed(draw(100))
    first.save(tmp_path / "s")
    expected = first.logits_of(draw(5, seed=1))
    moved = engine.restore(tmp_path / "s", seq_id=1)
    assert np.abs(moved.logits_of(draw(5, seed=1)) - expected).max() < 1e-4
    assert first.stats.n_past == moved.stats.n_past == 105


def test_what_cannot_be_fed_together(load: Load, draw: Draw) -> None:
    engine = load("gqa", n_parallel=2, n_ctx=48)
    a, b = engine.stream(seq_id=0), engine.stream(seq_id=1)
    a.feed(draw(10))
    for streams, tokens in (([a, b], [5, 5]), ([a, a], [5, 5]), ([a], [5, 6]), ([a], [-1]), ([], [])):
        with pytest.raises(EdgeStreamError):
            engine.feed_each(streams, tokens)
    assert a.stats.n_past == 10
    with pytest.raises(EdgeStreamError, match="seq_id"):
        engine.stream(seq_id=2)
    with pytest.raises(EdgeStreamError, match="n_parallel"):
        load("gqa", n_parallel=0)
